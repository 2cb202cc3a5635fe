"""Attention written out and attention fused are one function."""

import pytest
import torch

from nanorlhf.attention import attend, attend_fused, attend_plain, causal_mask


def inputs(S=5):
    torch.manual_seed(0)
    sizes = (2, 3, 5, 4), (2, 3, S, 4), (2, 3, S, 4)  # (B, H, T, D) and twice (B, H, S, D)
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def cached_mask():
    """Five tokens of two rows, at their own positions, before a cache of eight: (B, 1, T, S)"""
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    return torch.arange(8) <= positions[:, None, :, None]


@pytest.mark.parametrize("S, mask", [(5, causal_mask(5, "cpu")), (8, cached_mask())])
def test_plain_equals_fused_in_values_and_gradients(S, mask):
    found = []
    for form in attend_plain, attend_fused, attend:
        q, k, v = inputs(S)
        out = form(q, k, v, mask)
        (out * torch.arange(5.0)[:, None]).sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found[0], other, strict=True))


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
