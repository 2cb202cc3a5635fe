"""One question, four answers, each worked by hand; GAE also against its double sum."""

import pytest
import torch

from nanorlhf.advantages import gae, grpo, of_responses, reinforce, rloo


def batch(seed=0):
    """Rewards, values and a mask of rows of 6, 3 and 1 tokens."""
    torch.manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    return torch.randn(3, 6), torch.randn(3, 6), mask


def double_sum(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as the paper has it; slowly."""
    advantages = torch.zeros_like(rewards)
    for b, n in enumerate(mask.sum(1).tolist()):
        v = [*values[b, :n].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:]))
    return advantages


# --- gae ---


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.5), (1, 0), (1, 1), (0, 0.95)])
def test_gae_equals_its_double_sum(gamma, lam):
    rewards, values, mask = batch()
    expected = double_sum(rewards, values, mask, gamma, lam)
    assert torch.allclose(gae(rewards, values, mask, gamma, lam), expected, atol=1e-5)


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    # Deltas 0, 0 and 0.5; each step back halves what follows.
    advantages = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    assert torch.allclose(advantages, torch.tensor([[0.125, 0.25, 0.5]]))


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rewards, values, mask = batch()
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    expected = (to_go - values) * mask
    assert torch.allclose(gae(rewards, values, mask, lam=1.0), expected, atol=1e-6)


def test_gae_with_lambda_zero_looks_one_step_ahead():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    advantages = gae(rewards, values, torch.ones(1, 2), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[1 + 0.5 * 20 - 10, 2 - 20]]


def test_padding_cannot_change_an_advantage():
    rewards, values, mask = batch()
    expected = gae(rewards, values, mask)
    for number in (1e6, -1e6):
        rewards, values = (x.masked_fill(~mask, number) for x in (rewards, values))
        assert torch.equal(gae(rewards, values, mask), expected)
    assert (expected[~mask] == 0).all()


def test_nothing_is_expected_after_the_end():
    rewards, values = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 100.0]])
    advantages = gae(rewards, values, torch.tensor([[True, False]]))
    assert advantages.tolist() == [[0.75, 0.0]]  # and not 100.75: V after the last token is 0


def test_a_critic_that_is_right_leaves_no_advantage():
    rewards, _, mask = batch()
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert gae(rewards, to_go, mask).abs().max() < 1e-6


def test_gae_leaves_its_arguments_alone():
    rewards, values, mask = batch()
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


# --- one number a response ---


def test_reinforce_by_hand():
    assert reinforce(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-2, -1, 3]


def test_rloo_by_hand():
    scores = torch.tensor([0.0, 0.0, 3.0, 5.0, 5.0, 5.0])  # two prompts, three responses each
    assert rloo(scores, G=3).tolist() == [-1.5, -1.5, 3, 0, 0, 0]
    assert rloo(scores[:4], G=2).tolist() == [0, 0, -2, 2]


def test_the_baseline_of_rloo_does_not_know_the_response_it_judges():
    scores = torch.randn(8, requires_grad=True)
    for i, advantage in enumerate(rloo(scores, G=4)):
        slope = torch.autograd.grad(advantage, scores, retain_graph=True)[0][i]
        assert slope.item() == pytest.approx(1)


def test_grpo_by_hand():
    # Mean 1, unbiased deviation sqrt(2).
    advantages = grpo(torch.tensor([0.0, 2.0]), G=2)
    assert torch.allclose(advantages, torch.tensor([-1.0, 1.0]) / 2**0.5, atol=1e-4)


def test_grpo_makes_nothing_of_responses_that_are_all_alike():
    assert grpo(torch.full((4,), 2.5), G=4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("answer", [rloo, grpo])
def test_an_easy_prompt_is_no_merit_of_its_responses(answer):
    scores = torch.randn(6)
    easier = scores + torch.tensor([10.0, 10, 10, 0, 0, 0])
    assert torch.allclose(answer(scores, 3), answer(easier, 3), atol=1e-5)


# --- under a KL penalty ---

SCORES = torch.tensor([0.0, 2.0, 5.0, 5.0])  # two prompts, two responses each
KL = torch.tensor([3.0, 1.0, 2.0, 6.0])


@pytest.mark.parametrize("method, plain", [("reinforce", reinforce), ("rloo", rloo)])
def test_a_penalty_is_part_of_what_a_response_earns(method, plain):
    earned = SCORES - 0.1 * KL
    expected = plain(earned) if method == "reinforce" else plain(earned, 2)
    assert torch.equal(of_responses(method, SCORES, 0.1 * KL, 2), expected)
    assert torch.equal(of_responses(method, SCORES, 0 * KL, 2), of_responses(method, SCORES, 0, 2))


def test_grpo_under_a_penalty_by_hand():
    advantages = of_responses("grpo", SCORES, 0.1 * KL, 2)
    # The scores 0 and 2 in deviations of sqrt(2), 5 and 5 in none; less the penalty, of which the
    # other response's is the baseline.
    half = 1 / 2**0.5
    expected = torch.tensor([-half - 0.2, half + 0.2, 0.4, -0.4])
    assert torch.allclose(advantages, expected, atol=1e-4)


def test_grpo_divides_the_scores_alone_so_a_penalty_weighs_what_its_coefficient_says():
    """Divided as well it would come out the same for 0.01 and 0.1: about 1."""
    torch.manual_seed(0)
    alike, kl = torch.full((8,), 3.0), torch.rand(8, dtype=torch.float64)
    little, much = (of_responses("grpo", alike, c * kl, 4) for c in (0.01, 0.1))
    assert torch.allclose(10 * little, much, rtol=1e-12) and 0.01 < much.abs().max() < 0.2
    scores = torch.randn(8, dtype=torch.float64)
    without, dear = (of_responses("grpo", scores, c * kl, 4) for c in (0.0, 0.1))
    assert torch.equal(without, grpo(scores, 4)) and torch.allclose(dear - without, much)
