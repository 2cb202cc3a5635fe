"""What a model says of a response: by hand, by a slow loop, summed over every possible token."""

import math

import pytest
import torch

from nanorlhf.logprobs import (
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    response_logits,
    response_logprobs,
    response_logprobs_and_entropy,
    response_tokens,
    response_window,
    tempered,
    token_logprobs,
    whiten,
)
from nanorlhf.model import GPT, GPTConfig

# --- means that respect the mask ---


def test_masked_mean_counts_tokens_and_not_rows():
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask).item() == 3  # (1 + 2 + 6) / 3, and not (1.5 + 6) / 2
    assert masked_mean(x, mask.bool()).item() == 3


def test_the_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2)).item() == 0


def test_whiten_by_hand():
    x, mask = torch.tensor([[1.0, 7.0], [5.0, -7.0]]), torch.tensor([[True, False], [True, False]])
    # Mean 3; the biased deviation is 2, the unbiased one would be 2.83.
    assert torch.allclose(whiten(x, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    keeps_mean = whiten(x, mask, shift_mean=False)
    assert torch.allclose(keeps_mean, torch.tensor([[2.0, 0.0], [4.0, 0.0]]))


def test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask():
    x, mask = 3 + 5 * torch.randn(6, 7), torch.rand(6, 7) < 0.6
    for shift_mean, mean in (True, 0.0), (False, x[mask].mean().item()):
        kept = whiten(x, mask, shift_mean)[mask]
        assert kept.mean().item() == pytest.approx(mean, abs=1e-5)
        assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_what_stands_behind_the_mask_cannot_change_what_is_whitened():
    x, mask = torch.randn(3, 5), torch.arange(5) < torch.tensor([[5], [2], [1]])
    assert torch.equal(whiten(x, mask), whiten(x.masked_fill(~mask, 1e6), mask))


def test_whitening_equal_numbers_is_no_division_by_zero():
    assert whiten(torch.full((2, 2), 4.0), torch.ones(2, 2)).abs().max() == 0


# --- the shift by one ---

PROMPT_LEN = torch.tensor([1, 4, 2])  # of rows of 9 tokens


def test_the_window_begins_one_before_the_response():
    x, R = torch.randn(3, 9, 2), 5
    window = response_window(x, PROMPT_LEN, R)
    assert window.shape == (3, R, 2)
    for b, prompt_len in enumerate(PROMPT_LEN):
        for r in range(R):
            assert torch.equal(window[b, r], x[b, prompt_len + r - 1])


def test_response_tokens_are_what_follows_the_prompt():
    tokens = torch.arange(27).view(3, 9)
    expected = [tokens[b, n : n + 5].tolist() for b, n in enumerate(PROMPT_LEN)]
    assert response_tokens(tokens, PROMPT_LEN, 5).tolist() == expected


def test_a_window_that_reaches_past_the_end_of_a_row_stays_inside_it():
    tokens = torch.arange(18).view(2, 9)
    long = response_tokens(tokens, torch.tensor([1, 7]), 8)
    assert long[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert long[1, :2].tolist() == [16, 17] and long[1].max() == 17  # the rest is off the mask


def test_response_logprobs_equal_a_slow_loop_over_all_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, n_positions=9, n_layer=1, n_head=2, n_embd=8))
    tokens, T = torch.randint(13, (3, 9)), 0.7
    with torch.no_grad():
        logp = (model(tokens) / T).log_softmax(-1)
        found = response_logprobs(model, tokens, PROMPT_LEN, 5, T)
        logits = response_logits(model, tokens, PROMPT_LEN, 5)
    for b, n in enumerate(PROMPT_LEN.tolist()):
        for r in range(5):
            expected = logp[b, n + r - 1, tokens[b, n + r]]
            assert found[b, r].item() == pytest.approx(expected.item(), abs=1e-5)
    assert logits.shape == (3, 5, 13)  # the head never sees the prompt


@torch.no_grad()
def test_log_probs_and_entropies_of_one_pass_are_those_of_two():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, n_positions=9, n_layer=1, n_head=2, n_embd=8))
    tokens, T = torch.randint(13, (3, 9)), 0.7
    logprobs, entropies = response_logprobs_and_entropy(model, tokens, PROMPT_LEN, 5, T)
    assert torch.equal(logprobs, response_logprobs(model, tokens, PROMPT_LEN, 5, T))
    assert torch.equal(entropies, entropy(response_logits(model, tokens, PROMPT_LEN, 5), T))
    assert entropies.std() > 1e-3  # or another entropy would do as well


# --- log-probs, temperature, entropy ---

HALF = torch.tensor([[[0.5, 0.25, 0.25]]]).log()  # logits (1, 1, 3)


def test_token_logprobs_by_hand():
    logits = HALF.expand(1, 3, 3) + 5.0  # a constant in the logits is no news
    found = token_logprobs(logits, torch.tensor([[0, 1, 2]])).exp()
    assert torch.allclose(found, torch.tensor([[0.5, 0.25, 0.25]]))


def test_temperature_divides_the_logits_once():
    # At T = 0.5 probabilities are squared: 1/4, 1/16, 1/16, of which the first is two thirds.
    assert token_logprobs(HALF, torch.tensor([[0]]), 0.5).exp().item() == pytest.approx(2 / 3)
    assert torch.allclose(tempered(HALF, 0.5), 2 * HALF)
    assert torch.allclose(entropy(HALF, 0.5), entropy(HALF / 0.5))
    assert entropy(HALF, 0.5) < entropy(HALF) - 0.1


def test_log_probs_are_float32_even_of_half_precision_logits():
    logits = (HALF * 3).bfloat16()
    chosen = torch.tensor([[1]])
    for of in (lambda x: token_logprobs(x, chosen), entropy, tempered):
        assert torch.equal(of(logits), of(logits.float()))
        assert of(logits).dtype == torch.float32 and of(logits.double()).dtype == torch.float64


def test_entropy_by_hand():
    assert entropy(HALF).item() == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[[100.0, 0.0]]])).item() == pytest.approx(0)


# --- KL, against its definition: a sum over every token there is ---


@pytest.fixture
def policy_and_reference():
    """Log-probs of two distributions over seven tokens, (7,) each, and their exact KL."""
    torch.manual_seed(0)
    policy, ref = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    return policy, ref, (policy.exp() * (policy - ref)).sum()


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_right_on_average(estimator, policy_and_reference):
    policy, ref, exact = policy_and_reference
    expectation = (policy.exp() * estimator(policy, ref)).sum()
    assert expectation.item() == pytest.approx(exact.item(), rel=1e-12)
    swapped = (policy.exp() * estimator(ref, policy)).sum()
    assert abs(swapped - exact) > 0.01  # with its arguments the wrong way round it is not


def test_k3_is_less_noisy_than_k1(policy_and_reference):
    policy, ref, exact = policy_and_reference
    noise = [(policy.exp() * (k(policy, ref) - exact) ** 2).sum() for k in (kl_k1, kl_k3)]
    assert noise[1] < noise[0]


@pytest.mark.parametrize("estimator, share", [(kl_k1, 0), (kl_k2, 1)])
def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_has_none(
    estimator, share, policy_and_reference
):
    """Tokens are sampled from the policy, but no gradient flows through the choosing."""
    policy, ref, _ = policy_and_reference
    logits = policy.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    sampled = torch.autograd.grad((policy.exp() * estimator(logp, ref)).sum(), logits)[0]
    assert torch.allclose(sampled, share * exact, atol=1e-12) and exact.abs().max() > 0.1


def test_by_hand_the_three_estimators_of_one_token():
    policy, ref = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert kl_k1(policy, ref).item() == pytest.approx(math.log(2))
    assert kl_k2(policy, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(policy, ref).item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("gap", [3.0, 1e-2, 1e-4, 1e-6])
def test_k3_is_never_negative_however_small_the_gap(gap):
    torch.manual_seed(0)
    logprobs = -3 * torch.rand(10_000)
    ref = logprobs + gap * torch.randn(10_000)
    k3 = kl_k3(logprobs, ref)
    assert k3.min() >= 0
    exact = kl_k3(logprobs.double(), ref.double()).mean()
    assert k3.mean().item() == pytest.approx(exact.item(), rel=1e-3)


def test_k3_does_not_overflow():
    assert kl_k3(torch.tensor(-1000.0), torch.tensor(0.0)).isfinite()
