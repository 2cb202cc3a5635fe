"""Attention written out and attention fused are one function."""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf import attention, model
from nanorlhf.attention import attend, attend_fused, attend_plain, causal_mask
from nanorlhf.model import GPT, GPTConfig, KVCache


def inputs(T=5, S=5):
    torch.manual_seed(0)
    sizes = (2, 3, T, 16), (2, 3, S, 16), (2, 3, S, 16)  # (B, H, T, D) and twice (B, H, S, D)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def cached_mask(positions):
    """Tokens at their own positions (B, T) before a cache of eight. -> (B, 1, T, S)"""
    return torch.arange(8) <= torch.tensor(positions)[:, None, :, None]


MASKS = {
    "none": None,
    "causal": causal_mask(5, "cpu"),
    "five tokens and a cache": cached_mask([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]),
    "one token and a cache": cached_mask([[7], [2]]),  # every decoding step looks like this
}


def values_and_gradients(form, mask, dtype=torch.float64):
    """What comes out of one form, and what flows back to q, k and v; all in float64 again."""
    T, S = (5, 5) if mask is None else mask.shape[-2:]
    q, k, v = (x.bfloat16().to(dtype).detach().requires_grad_() for x in inputs(T, S))
    out = form(q, k, v, mask)
    (out * torch.arange(1, T + 1, dtype=dtype)[:, None]).sum().backward()
    return [x.detach().double() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_plain_equals_fused_in_values_and_gradients(mask):
    plain, fused, chosen = (
        values_and_gradients(form, mask) for form in (attend_plain, attend_fused, attend)
    )
    for other in fused, chosen:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, other, strict=True))
    assert all(x.abs().max() > 0.1 for x in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_both_forms_lose_no_more_than_the_digits_of_their_type(mask, dtype):
    """The inputs are numbers that bfloat16 can write, so that only the arithmetic is measured."""
    exact = values_and_gradients(attend_plain, mask)
    lost = []
    for form in attend_plain, attend_fused:
        found = values_and_gradients(form, mask, dtype)
        lost.append(torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact)]))
    plain, fused = lost
    assert torch.cat(lost).max() < 2 * torch.finfo(dtype).eps
    assert (plain < 3 * fused).all() and (fused < 3 * plain).all()  # neither form is the rough one


@pytest.mark.parametrize("form", [attend_plain, attend_fused])
def test_attention_by_hand(form):
    k = torch.tensor([[[[0.0, 0, 0, 0], [2.0, 0, 0, 0]]]])
    v = torch.tensor([[[[1.0], [5.0]]]]).expand(1, 1, 2, 4)
    q = torch.tensor([[[[9.0, 0, 0, 0], [torch.tensor(3.0).log(), 0, 0, 0]]]])
    out = form(q, k, v, causal_mask(2, "cpu"))
    # The first sees itself alone. The second's scores are 0 and 2 ln 3 / sqrt(4): weights 1 to 3.
    assert torch.allclose(out[0, 0, :, 0], torch.tensor([1.0, (1 + 3 * 5) / 4]))


def test_a_causal_mask_looks_back_and_at_itself():
    assert causal_mask(3, "cpu").tolist() == [[True, False, False], [True, True, False], [True] * 3]


@pytest.mark.parametrize("form", [attend_plain, attend_fused])
def test_the_future_has_no_say(form):
    q, k, v = inputs()
    form(q, k, v, causal_mask(5, "cpu"))[:, :, 2].sum().backward()
    assert k.grad[:, :, :3].abs().min() > 0 and v.grad[:, :, :3].abs().min() > 0
    assert k.grad[:, :, 3:].abs().max() == 0 and v.grad[:, :, 3:].abs().max() == 0


@pytest.mark.parametrize("form", [attend_plain, attend_fused, attend])
def test_no_mask_is_a_causal_mask(form):
    q, k, v = inputs()
    assert torch.allclose(form(q, k, v), form(q, k, v, causal_mask(5, "cpu")), rtol=0, atol=1e-14)
    assert torch.equal(attend_plain(q, k, v), attend_plain(q, k, v, causal_mask(5, "cpu")))


def spy_on_the_kernel(monkeypatch):
    """What F.scaled_dot_product_attention is told of who may see whom, at every call."""
    told, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        told.append((attn_mask, is_causal))
        return real(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return told


def test_without_a_mask_the_kernel_is_told_causal_and_given_none(monkeypatch):
    """CUDA's fastest kernel takes no mask; a tensor, though it says the same, rules it out."""
    told, mask = spy_on_the_kernel(monkeypatch), causal_mask(5, "cpu")
    attend_fused(*inputs())
    attend_fused(*inputs(), mask)
    assert told[0] == (None, True) and told[1][0] is mask and told[1][1] is False


@torch.no_grad()
def test_a_model_makes_a_mask_for_a_cache_alone(monkeypatch):
    told = spy_on_the_kernel(monkeypatch)
    monkeypatch.setattr(model, "attend", attend_fused)  # as on a GPU
    torch.manual_seed(0)
    gpt, tokens = GPT(GPTConfig(11, 8, 2, 2, 16)), torch.randint(11, (3, 5))
    hidden = gpt.transformer(tokens)
    assert told == [(None, True)] * 2  # one call a layer
    told.clear()
    cache = KVCache(gpt.config, 3, 8, "cpu", torch.float32)
    cached = gpt.transformer(tokens, cache, torch.arange(5).expand(3, 5))
    for mask, is_causal in told:
        assert mask.shape == (3, 1, 5, 8) and not is_causal
    assert len(told) == 2 and torch.allclose(hidden, cached, atol=1e-5)


@torch.no_grad()
def test_a_pass_that_fills_what_is_read_of_a_cache_is_causal(monkeypatch):
    """So the prompts, read on a GPU while the cache is empty, need no mask."""
    told = spy_on_the_kernel(monkeypatch)
    monkeypatch.setattr(model, "attend", attend_fused)
    torch.manual_seed(0)
    gpt, tokens = GPT(GPTConfig(11, 8, 2, 2, 16)), torch.randint(11, (3, 6))
    positions = torch.arange(6).expand(3, 6)
    cache = KVCache(gpt.config, 3, 8, "cpu", torch.float32)
    cache.filled = 5
    begun = gpt.transformer(tokens[:, :5], cache, positions[:, :5])
    assert told == [(None, True)] * 2
    cache.filled = 8
    ended = gpt.transformer(tokens[:, 5:], cache, positions[:, 5:])
    assert told[2][0].shape == (3, 1, 1, 8)
    assert torch.allclose(torch.cat([begun, ended], 1), gpt.transformer(tokens), atol=1e-5)


def test_a_cpu_takes_the_plain_form_and_a_gpu_the_fused_one(monkeypatch):
    taken = []
    for name in "attend_plain", "attend_fused":
        monkeypatch.setattr(attention, name, lambda *given, name=name: taken.append(name))
    for device in "cpu", "meta":
        attend(*torch.zeros(3, 1, 1, 2, 4, device=device))
    assert taken == ["attend_plain", "attend_fused"]
