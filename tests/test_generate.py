"""Prompts in, responses out: the cached sampler against a loop that caches nothing."""

import pytest
import torch
from scipy.stats import chisquare

from nanorlhf import UserError
from nanorlhf.generate import Decoder, generate, quick_batch, responses, sample
from nanorlhf.logprobs import response_logprobs, response_tokens
from nanorlhf.model import GPT, GPTConfig, KVCache

PROMPTS = [[1], [2, 4, 5, 6, 3, 1, 1], [6, 7], [8, 0, 1, 2]]
EOS, PAD = 9, 10


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_positions=32, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.5)  # or a random model says the same token for ever
    return model.eval()


@torch.no_grad()
def greedy_loop(model, prompt, max_new_tokens, eos=None):
    """The whole sequence through the model for every token: slow, and hard to get wrong."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


# --- greedy ---


def test_greedy_equals_the_uncached_loop_for_prompts_of_mixed_length(model):
    found = responses(*generate(model, PROMPTS, 20, temperature=0))
    assert found == [greedy_loop(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == 4 and len(set(found[0])) > 3  # not all the same


def test_greedy_stops_where_the_uncached_loop_stops(model):
    seldom = greedy_loop(model, PROMPTS[0], 20)[5]  # a token that comes up on the way
    found = responses(*generate(model, PROMPTS, 20, temperature=0, eos=seldom, pad=PAD))
    assert found == [greedy_loop(model, prompt, 20, seldom) for prompt in PROMPTS]
    assert len(found[0]) <= 6


def test_a_row_alone_equals_the_same_row_in_a_batch(model):
    together = responses(*generate(model, PROMPTS, 12, temperature=0, eos=EOS, pad=PAD))
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert responses(*generate(model, [prompt], 12, temperature=0, eos=EOS, pad=0)) == [row]


def test_generate_leaves_the_prompts_alone_and_in_place(model):
    tokens, prompt_len, mask = generate(model, PROMPTS, 5, pad=PAD)
    assert prompt_len.tolist() == [1, 7, 2, 4]
    assert [row[:n].tolist() for row, n in zip(tokens, prompt_len, strict=True)] == PROMPTS
    assert tokens.shape == (4, 7 + 5) and mask.shape == (4, 5)


# --- the end ---


def test_the_end_token_is_the_last_thing_inside_the_mask(model):
    tokens, prompt_len, mask = generate(model, PROMPTS * 50, 12, eos=EOS, pad=PAD)
    chosen = response_tokens(tokens, prompt_len, mask.shape[1])
    lengths = mask.sum(1).tolist()
    for row, kept, n in zip(chosen.tolist(), mask.tolist(), lengths, strict=True):
        assert kept == [True] * n + [False] * (mask.shape[1] - n)
        assert EOS not in row[: n - 1]
        assert row[n - 1] == EOS or n == 12  # a row cut by the limit has no end token
    assert min(lengths) < 4 and max(lengths) == 12
    for row, n, m in zip(tokens, prompt_len, lengths, strict=True):
        assert (row[n + m :] == PAD).all()


def test_the_batch_is_no_wider_than_its_longest_response(model):
    always_end = lambda hidden: torch.eye(11)[EOS].expand(len(hidden), 11)  # noqa: E731
    model.head = always_end
    tokens, _, mask = generate(model, PROMPTS, 25, temperature=0, eos=EOS, pad=PAD)
    assert mask.tolist() == [[True]] * 4 and tokens.shape == (4, 7 + 1)
    assert tokens[0].tolist() == [1, EOS] + [PAD] * 6


def test_without_an_end_token_every_response_has_full_length(model):
    assert generate(model, PROMPTS, 9)[2].all()


@pytest.mark.parametrize("G", [1, 3])
def test_responses_to_one_prompt_share_its_pass_and_are_what_they_would_be_alone(model, G):
    together = generate(model, PROMPTS, 12, temperature=0, eos=EOS, pad=PAD, G=G)
    apart = generate(model, [p for p in PROMPTS for _ in range(G)], 12, 0, EOS, PAD)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


def test_responses_to_one_prompt_are_drawn_independently(model):
    torch.manual_seed(0)
    tokens, prompt_len, _ = generate(model, [[2, 4]], 1, G=4000)
    drawn = tokens[:, 2].view(2, 2000)
    firsts, seconds = drawn[:, :1000].flatten(), drawn[:, 1000:].flatten()
    same = (firsts == seconds).float().mean().item()
    p = drawn.flatten().bincount().double() / 4000
    assert same == pytest.approx((p**2).sum().item(), abs=4 * (0.25 / 2000) ** 0.5)


# --- a step that can be captured ---


def decoder_on(model, device):
    tokens = torch.full((3, 12), PAD, device=device)
    cache = KVCache(model.config, 3, 12, device, torch.float32)
    prompt_len = torch.tensor([1, 3, 2], device=device)
    return Decoder(model.to(device), cache, tokens, prompt_len, 1.0, EOS, PAD)


@torch.no_grad()
def test_a_step_asks_the_device_nothing(model):
    """Tensors on the meta device have no data: whoever asks for it, or mixes devices, is told."""
    decoder = decoder_on(model, "meta")
    decoder.choose(torch.zeros(3, 16, device="meta"))
    decoder.step()
    with pytest.raises(RuntimeError, match="meta"):
        bool(decoder.alive.any())


@torch.no_grad()
def test_a_step_changes_its_rows_in_place(model):
    decoder = decoder_on(model, "cpu")
    decoder.choose(torch.zeros(3, 16))
    changing = ["token", "at", "alive", "tokens", "rows"]
    before = {name: getattr(decoder, name).data_ptr() for name in changing}
    at, keys = decoder.at.clone(), [k.data_ptr() for k in decoder.cache.k]
    for _ in range(2):
        decoder.step()
    assert {name: getattr(decoder, name).data_ptr() for name in changing} == before
    assert [k.data_ptr() for k in decoder.cache.k] == keys
    assert (decoder.at - at).tolist() == [2, 2, 2]


def test_shapes_stay_as_they_are_where_a_new_one_is_dear(model, monkeypatch):
    seldom = greedy_loop(model, PROMPTS[0], 20)[5]  # three of six rows end on the way
    asked = (PROMPTS[:1] * 2 + PROMPTS, 20, 0, seldom, PAD)
    shapes, plain = set(), generate(model, *asked)

    def step(decoder, real=Decoder.step):
        shapes.add((*decoder.token.shape, *decoder.cache.k[0].shape))
        real(decoder)

    monkeypatch.setattr(Decoder, "step", step)
    generate(model, *asked)
    assert len(shapes) > 1  # on a CPU, rows that have ended are dropped
    shapes.clear()
    model.fused = True
    fused = generate(model, *asked)
    assert shapes == {(6, 6, 2, 64, 8)}
    for ours, theirs in zip(plain, fused, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_captured_step_writes_what_the_plain_one_writes(model, temperature):
    model, found = model.to("cuda"), []
    for model.fused in (False, True):
        torch.manual_seed(0)
        found.append(generate(model, PROMPTS * 4, 20, temperature, EOS, PAD))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# --- what does not fit ---


def test_what_does_not_fit_is_said_in_a_sentence(model):
    with pytest.raises(UserError, match="prompt of 7 tokens and max_new_tokens of 26.* 32 pos"):
        generate(model, PROMPTS, 26)
    assert generate(model, PROMPTS, 25)[0].shape == (4, 32)  # to the very last position


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_a_response_needs_a_prompt(model, prompts):
    with pytest.raises(UserError, match="expected prompts of one token at least"):
        generate(model, prompts, 4)


def test_long_rows_of_a_large_model_are_answered_few_at_a_time():
    tiny, prompts = GPT(GPTConfig(12, 64, 2, 2, 16)), [[1] * 20, [1] * 30]
    assert quick_batch(tiny, prompts, 34) == 500
    row = 2 * 4 * 2 * 16 * 64 + 4 * 4 * 12  # keys, values; four forms of a token's logits
    assert quick_batch(tiny, prompts, 34, room=7.5 * row) == 7
    assert quick_batch(tiny, prompts, 34, room=row / 2) == 1
    assert quick_batch(tiny, [], 34) == 500


# --- the sampler draws what the scorer scores ---


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_come_up_as_often_as_softmax_of_logits_over_temperature_says(temperature):
    torch.manual_seed(0)
    logits, n = torch.randn(12), 50_000
    drawn = sample(logits.expand(n, 12), temperature).bincount(minlength=12)
    wanted = (logits.double() / temperature).softmax(0) * n
    assert chisquare(drawn, wanted).pvalue > 1e-3
    other = (logits.double() / (temperature + 0.1)).softmax(0) * n
    assert chisquare(drawn, other).pvalue < 1e-6  # the test can tell


@torch.no_grad()
def how_likely(drawn, said):
    """The p-value of n responses (n, R), if each is as likely as is said of it, (n,)."""
    n = len(drawn)
    kinds, at, counts = torch.unique(drawn, dim=0, return_inverse=True, return_counts=True)
    wanted = torch.zeros(len(kinds)).scatter(0, at, said.exp()) * n
    often = wanted >= 5  # the seldom ones are counted together, as the test asks for
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([wanted[often], (n - wanted[often].sum()).clamp(min=1e-6)[None]]).double()
    assert often.sum() > 10
    return chisquare(observed, expected / expected.sum() * n).pvalue


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_whole_responses_come_up_as_often_as_their_logprobs_say(model, temperature):
    """To each of three prompts of one, two and seven tokens, all in one batch."""
    torch.manual_seed(0)
    prompts = [[1], [2, 4], [2, 4, 5, 6, 3, 1, 1]]
    tokens, prompt_len, mask = generate(model, prompts * 6000, 2, temperature, eos=EOS, pad=PAD)
    drawn = response_tokens(tokens, prompt_len, 2)
    for i in range(3):
        found = []
        for scored_at in temperature, 1.3 * temperature:
            rows = tokens[i::3], prompt_len[i::3]
            said = (response_logprobs(model, *rows, 2, scored_at) * mask[i::3]).sum(1)
            found.append(how_likely(drawn[i::3], said))
        assert found[0] > 1e-3 and found[1] < 1e-6  # the test can tell


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(monkeypatch, u):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, u))
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 1.0, impossible, 1.0, impossible]])
    assert sample(logits, 1.0).item() in (1, 3)


def test_no_number_from_zero_to_one_leads_out_of_the_vocabulary(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(500, 1000)  # rounding leaves many a sum a little under 1
    for u in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, u))  # noqa: B023
        assert sample(logits, 1.0).max() < 1000


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(100, 9)
    assert torch.equal(sample(logits, 0), logits.argmax(-1))


def test_the_same_seed_gives_the_same_responses(model):
    found = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        found.append(responses(*generate(model, PROMPTS, 10)))
    assert found[0] == found[1] != found[2]
