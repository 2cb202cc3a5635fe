"""Prompts in, responses out: the cached sampler against a loop that caches nothing."""

import pytest
import torch
from scipy.stats import chisquare

from nanorlhf import generate as generate_module
from nanorlhf.generate import generate, generate_rows, generate_texts, sample
from nanorlhf.logprobs import response_logprobs, response_tokens
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.support import UserError

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


def numbers(B, R, rng=None):
    return 1 - torch.rand(B, R, dtype=torch.float64, generator=rng)


def responses(tokens, prompt_len, mask):
    return [row[n : n + m].tolist() for row, n, m in zip(tokens, prompt_len, mask.sum(1))]


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


# --- what does not fit ---


def test_what_does_not_fit_is_said_in_a_sentence(model):
    with pytest.raises(UserError, match="prompt of 7 tokens and max_new_tokens of 26.* 32 pos"):
        generate(model, PROMPTS, 26)
    assert generate(model, PROMPTS, 25)[0].shape == (4, 32)  # to the very last position


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_a_response_needs_a_prompt(model, prompts):
    with pytest.raises(UserError, match="expected prompts of one token at least"):
        generate(model, prompts, 4)


# --- the sampler draws what the scorer scores ---


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_come_up_as_often_as_softmax_of_logits_over_temperature_says(temperature):
    torch.manual_seed(0)
    logits, n = torch.randn(12), 50_000
    drawn = sample(logits.expand(n, 12), temperature, numbers(n, 1)).bincount(minlength=12)
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


NUMBERS = [1.0, 0.5, 2**-24, 2**-53]  # the last one is the smallest that is drawn


@pytest.mark.parametrize("u", NUMBERS)
def test_a_token_of_probability_zero_is_never_drawn(u):
    impossible = float("-inf")
    logits = torch.tensor([[impossible, 1.0, impossible, 1.0, impossible]])
    assert sample(logits, 1.0, torch.tensor([[u]], dtype=torch.float64)).item() in (1, 3)


def test_no_random_number_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    assert (generate_module.draw_uniforms(2, 3) == 1).all()


def test_no_number_from_zero_to_one_leads_out_of_the_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(500, 1000)  # rounding leaves many a sum a little under 1
    for u in NUMBERS:
        assert sample(logits, 1.0, torch.full((500, 1), u, dtype=torch.float64)).max() < 1000


def seldom_tokens():
    """Of GPT-2's vocabulary a thousand tokens are likely, and each of the others has a chance of
    8e-10. -> logits (1, V), some of those, late ones, and the number that leads to each of them"""
    logits = torch.full((1, 50_257), -14.0)
    logits[0, :1000] = 0
    until = logits[0].double().softmax(0).cumsum(0)
    late = torch.arange(50_000, 50_200)
    return logits, late, (until[late] + until[late - 1])[:, None] / 2


def test_a_token_less_likely_than_the_last_digit_of_float32_can_be_drawn():
    logits, late, u = seldom_tokens()
    found = sample(logits.expand(200, -1), 1.0, u)
    assert torch.equal(found, late)
    assert logits[0].softmax(0)[late].max() < 2**-30
    in_float32 = sample(logits.expand(200, -1), 1.0, u.float())
    assert (in_float32 == late).float().mean() < 0.05  # the test can tell


def test_the_random_numbers_keep_all_their_digits_on_the_way_to_the_sampler(model, monkeypatch):
    logits, late, u = seldom_tokens()
    model.head = lambda hidden: logits.expand(len(hidden), -1)
    tokens, _, _ = generate(model, [[1]] * 200, 1, uniforms=u)
    assert torch.equal(tokens[:, 1], late)
    del model.head
    given = []
    monkeypatch.setattr(generate_module, "sample", lambda *a: given.append(a[2]) or sample(*a))
    generate(model, [[1]] * 200, 5)
    generate_rows(model, [[1]] * 200, 5, EOS, PAD)
    for u in given:
        assert u.shape == (200, 1) and u.dtype == torch.float64 and 0 < u.min() and u.max() <= 1
        assert (u.float() != u).float().mean() > 0.9  # these have digits that float32 has not
    assert len(given) == 10


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(100, 9)
    assert torch.equal(sample(logits, 0, numbers(100, 1)), logits.argmax(-1))


def test_the_same_seed_gives_the_same_responses(model):
    found = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        found.append(responses(*generate(model, PROMPTS, 10)))
    assert found[0] == found[1] != found[2]


# --- any number of prompts ---


@pytest.mark.parametrize("G", [1, 2, 4])
def test_how_the_prompts_are_split_into_batches_changes_no_response(model, G):
    uniforms = numbers(12 * G, 12, torch.Generator().manual_seed(5))
    batch = generate(model, PROMPTS * 3, 12, 0.9, EOS, PAD, G, uniforms)
    prompts = [prompt for prompt in PROMPTS * 3 for _ in range(G)]
    drawn = [(p + r, len(p)) for p, r in zip(prompts, responses(*batch), strict=True)]
    assert len({tuple(tokens) for tokens, _ in drawn}) > 10 * G
    for batch_size in 1, 3, 7, 0:
        rng = torch.Generator().manual_seed(5)
        rows = generate_rows(model, PROMPTS * 3, 12, EOS, PAD, 0.9, G, batch_size, rng=rng)
        assert rows == drawn


@pytest.mark.parametrize(
    "G, batch_size, sizes",
    [(1, 5, [5, 5, 2]), (2, 5, [4] * 6), (1, 0, [12]), (4, 3, [3] * 16)],
)
def test_a_batch_has_as_many_rows_as_it_may_and_whole_groups_where_they_fit(
    model, monkeypatch, G, batch_size, sizes
):
    seen, real = [], GPT.head  # of the language head, which the prefill's ends come to first
    monkeypatch.setattr(GPT, "head", lambda m, hidden: seen.append(len(hidden)) or real(m, hidden))
    generate_rows(model, PROMPTS * 3, 1, EOS, PAD, G=G, batch_size=batch_size)
    assert seen == sizes


class Letters:
    """A tokenizer whose tokens are digits."""

    eos, pad = EOS, PAD

    def decode(self, tokens):
        return "".join("0123456789_"[token] for token in tokens)


def test_texts_are_those_of_the_seed_and_leave_the_random_state_of_the_run_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    texts, again, others = (
        generate_texts(model, Letters(), PROMPTS, 10, 1.0, n) for n in (7, 7, 8)
    )
    assert torch.equal(torch.rand(3), expected)
    assert texts == again != others
    assert [prompt for prompt, _ in texts] == [Letters().decode(prompt) for prompt in PROMPTS]
    rng = torch.Generator().manual_seed(7)
    rows = generate_rows(model, PROMPTS, 10, EOS, PAD, rng=rng)
    assert [prompt + response for prompt, response in texts] == [
        Letters().decode(tokens) for tokens, _ in rows
    ]
    assert all(len(response) == 10 or response[-1] == "9" for _, response in texts)  # no padding
