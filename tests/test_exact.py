"""Every formula against an exact answer: the sum over all responses of a world that has fifteen.

In `small_world` what training estimates from samples is a finite sum, so it must be right to the
last digits of float64: no lucky seeds, no tolerance for noise. Only two tests draw samples after
all, twenty thousand choices and PPO as a whole, and they end as near as their noise allows.
"""

import copy

import pytest
import torch
from scipy.stats import chi2
from small_world import (
    END,
    MASK,
    PLACE,
    PREFIXES,
    RESPONSES,
    THROUGH,
    TOKENS,
    R,
    V,
    best_of,
    best_of_n_kl,
    close,
    draw,
    expectile,
    gradient,
    kl,
    minimise,
    probability,
    table,
    tilted,
)

from nanorlhf import ppo
from nanorlhf.advantages import gae, grpo, reinforce, rloo
from nanorlhf.dpo import dpo_loss
from nanorlhf.ilql import expectile_loss
from nanorlhf.logprobs import (
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    response_logprobs,
    response_tokens,
    response_window,
    token_logprobs,
)
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.ppo import PPOConfig, policy_loss, shape_rewards
from nanorlhf.reward import bradley_terry_loss
from nanorlhf.support.data import collate
from nanorlhf.support.runlog import RunLog

LOGITS, REF = draw(7, V, seed=1), draw(7, V, seed=2)  # the policy and its reference
SCORES, CRITIC = draw(15, seed=3), draw(7, seed=4)  # a critic that knows nothing
BETA = 0.7  # the price of a nat

P, Q = probability(LOGITS), probability(REF)
REACH = THROUGH @ P  # (7,) how likely each place is to be reached
TRUE_VALUES = THROUGH @ (P * SCORES) / REACH  # (7,) the score to be expected there
ALL, FREE = torch.arange(15), torch.zeros(15, R).double()


# --- exact answers, and what the library says, averaged over all responses ---


def expected_score(logits, temperature=1.0):
    return probability(logits, temperature) @ SCORES


def objective(logits):
    return expected_score(logits) - BETA * kl(probability(logits), Q)


CLIMB = gradient(expected_score, LOGITS)


def token_logp(logits, temperature=1.0):
    return token_logprobs(logits[PLACE], TOKENS, temperature)


def response_logp(logits, temperature=1.0):
    return (token_logp(logits, temperature) * MASK).sum(1)


def rewards(token_kl=FREE, kl_coef=0.0):
    return shape_rewards(SCORES, token_kl, MASK, kl_coef)


def push(advantages, chances=P, rows=ALL, logits=LOGITS, temperature=1.0):
    """Which way policy_loss pushes the logits, on average over responses (rows) of these chances.

    The loss is linear in the advantages, so the chances go there. Its mean over tokens is made a
    sum again, whose expectation is the one that theorems speak of. advantages (N, R) or (N, 1)
    """

    def loss(logits):
        now, mask = token_logp(logits, temperature)[rows], MASK[rows]
        return policy_loss(now, now.detach(), chances[:, None] * advantages, mask) * mask.sum()

    return -gradient(loss, logits)


def draws(n):
    """Every way to draw n responses, (N, n) rows of RESPONSES, and the chance of each, (N,)"""
    ways = torch.cartesian_prod(*[ALL] * n).view(-1, n)
    return ways, P[ways].prod(1)


def push_of_groups(advantages, ways, chances):
    """The push of a mean over groups of G responses. advantages: one number a response, (N * G,)"""
    G = ways.shape[1]
    return push(advantages[:, None], chances.repeat_interleave(G) / G, ways.flatten())


def test_nothing_is_missing_from_the_world():
    assert len(RESPONSES) == 15 and len(PREFIXES) == 7
    for temperature in 1.0, 0.7:
        listed = probability(LOGITS, temperature)
        assert listed.sum().item() == pytest.approx(1, abs=1e-14)
        assert close(response_logp(LOGITS, temperature).exp(), listed)
    assert close(probability(table(P)), P)


def test_the_brute_force_has_the_gradient_that_finite_differences_have():
    at = LOGITS.clone().requires_grad_()
    for function in expected_score, objective:
        assert torch.autograd.gradcheck(function, at, eps=1e-5, atol=1e-9, rtol=0)


# --- policy gradients ---


@pytest.mark.parametrize("baseline", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_loss_climbs_the_expected_score(temperature, baseline):
    advantages = (SCORES - baseline)[:, None]
    pushed = push(advantages, probability(LOGITS, temperature), temperature=temperature)
    assert close(pushed, gradient(lambda x: expected_score(x, temperature), LOGITS))


def test_with_lambda_one_any_critic_is_a_fair_baseline():
    assert close(push(gae(rewards(), CRITIC[PLACE], MASK, gamma=1.0, lam=1.0)), CLIMB)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_below_lambda_one_only_a_critic_that_is_right_is_fair(lam):
    right, wrong = (
        push(gae(rewards(), values[PLACE], MASK, gamma=1.0, lam=lam))
        for values in (TRUE_VALUES, CRITIC)
    )
    assert close(right, CLIMB) and not close(wrong, CLIMB, atol=1e-2)


def test_with_lambda_zero_the_policy_climbs_what_the_critic_believes():
    """A token is worth the score if it is the last one, else what the critic says comes next."""
    worth = dict(zip(RESPONSES + PREFIXES, torch.cat([SCORES, CRITIC])))
    believed = torch.stack([torch.stack([worth[*s, a] for a in range(V)]) for s in PREFIXES])
    exact = gradient(lambda x: REACH @ (x.softmax(-1) * believed).sum(1), LOGITS)
    assert close(push(gae(rewards(), CRITIC[PLACE], MASK, gamma=1.0, lam=0.0)), exact)


# --- without a critic ---


@pytest.mark.parametrize("B", [2, 3])
def test_reinforce_climbs_the_expected_score_a_little_slower(B):
    """A score is in its own baseline with weight 1 / B, and that much of it is lost."""
    ways, chances = draws(B)
    advantages = torch.cat([reinforce(SCORES[batch]) for batch in ways])
    assert close(push_of_groups(advantages, ways, chances), (B - 1) / B * CLIMB)


@pytest.mark.parametrize("G", [2, 3])
def test_rloo_climbs_the_expected_score(G):
    ways, chances = draws(G)
    assert close(push_of_groups(rloo(SCORES[ways].flatten(), G), ways, chances), CLIMB)


def test_grpo_pushes_as_hard_for_a_tenth_of_the_stakes():
    """Two prompts with the same responses, on one of which there is ten times as much to win."""
    ways, chances = draws(3)
    scores = torch.cat([SCORES[ways], 10 * SCORES[ways]]).flatten()
    (small, large), (grpo_small, grpo_large) = (
        [push_of_groups(half, ways, chances) for half in answer(scores, 3).chunk(2)]
        for answer in (rloo, grpo)
    )
    assert close(small, CLIMB) and close(large, 10 * CLIMB)
    assert close(grpo_large, grpo_small, atol=1e-3) and grpo_small.abs().max() > 0.1


def test_grpo_of_two_responses_knows_only_which_is_better():
    """Scores d apart deviate by |d| / sqrt(2), so that the better one is pushed by 1 / sqrt(2),
    however large d is: the policy climbs how often it would win against itself as it was."""
    ways, chances = draws(2)
    pushed, *others = (
        push_of_groups(grpo(scores[ways].flatten(), 2), ways, chances)
        for scores in (SCORES, 10 * SCORES + 5, SCORES.exp())
    )
    d = SCORES[:, None] - SCORES
    wins = d / (2**0.5 * d.abs() + 2e-4) @ P  # 1e-4 keeps a deviation of 0 from dividing
    assert close(pushed, gradient(lambda x: probability(x) @ wins, LOGITS))
    for other in others:
        assert close(other, pushed, atol=1e-4)
    angle = torch.cosine_similarity(pushed.flatten(), CLIMB.flatten(), dim=0)
    assert angle < 0.99  # and that is another direction


# --- gae ---


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_is_the_mean_of_all_looks_ahead(gamma, lam):
    """A look k tokens ahead earns k rewards and then trusts the critic. It weighs (1 - lam)
    lam^(k-1), and the last one, which needs no critic any more, all that is left."""
    mask = torch.arange(8) < torch.arange(1, 9)[:, None]  # every length from 1 to 8
    earned, values = (draw(8, 8, seed=seed).where(mask, torch.tensor(1e6)) for seed in (5, 6))
    advantages = gae(earned, values, mask, gamma, lam)
    for b, n in enumerate(mask.sum(1).tolist()):
        r, v = earned[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]
        for t in range(n):
            exact = 0.0
            for k in range(1, n - t + 1):
                look = sum(gamma**i * r[t + i] for i in range(k)) + gamma**k * v[t + k] - v[t]
                exact += lam ** (k - 1) * (1 - lam if t + k < n else 1) * look
            assert advantages[b, t].item() == pytest.approx(exact, abs=1e-12)
    assert (advantages[~mask] == 0).all()


# --- KL and entropy of whole responses ---


@pytest.mark.parametrize("estimator, is_fair", [(kl_k1, True), (kl_k2, False), (kl_k3, True)])
def test_summed_over_tokens_k1_and_k3_are_the_kl_on_average_and_k2_is_not(estimator, is_fair):
    estimate = P @ (estimator(token_logp(LOGITS), token_logp(REF)) * MASK).sum(1)
    error = (estimate - kl(P, Q)).abs()
    assert error < 1e-12 if is_fair else error > 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_of_tokens_add_up_to_that_of_the_response(temperature):
    p = probability(LOGITS, temperature)
    found = p @ (entropy(LOGITS[PLACE], temperature) * MASK).sum(1)
    assert close(found, -(p * p.log()).sum())


def test_a_price_in_the_rewards_is_a_kl_in_the_objective():
    """As a loss k1 is idle, see below; as a reward it has the gradient of the KL, all of it."""
    priced = rewards(kl_k1(token_logp(LOGITS), token_logp(REF)), BETA)
    pushed = push(gae(priced, CRITIC[PLACE], MASK, gamma=1.0, lam=1.0))
    assert close(pushed, gradient(objective, LOGITS)) and not close(pushed, CLIMB, atol=0.01)


# As a loss, on average, each estimator has the gradient of another KL: none, that of the policy
# from the reference, and that of the reference from the policy.
AS_A_LOSS = pytest.mark.parametrize(
    "estimator, exact",
    [(kl_k1, lambda p, q: 0 * kl(p, q)), (kl_k2, kl), (kl_k3, lambda p, q: kl(q, p))],
    ids=["k1", "k2", "k3"],
)


@AS_A_LOSS
def test_as_a_loss_k1_is_idle_and_k2_right_and_k3_the_other_way_round(estimator, exact):
    """Of whole responses' log-probs, and with no gradient through the choice of the response."""
    found = gradient(lambda x: P @ estimator(response_logp(x), response_logp(REF)), LOGITS)
    assert close(found, gradient(lambda x: exact(probability(x), Q), LOGITS))


@AS_A_LOSS
def test_as_a_loss_over_tokens_they_forget_that_a_token_leads_somewhere(estimator, exact):
    """Each place gets the gradient of its own KL, times how likely it is to be reached now. That
    one could also stay away from a place is missing, so not even k2 is right of responses."""
    found = gradient(
        lambda x: P @ (estimator(token_logp(x), token_logp(REF)) * MASK).sum(1), LOGITS
    )
    by_place = gradient(lambda x: REACH @ exact(x.softmax(-1), REF.softmax(-1)), LOGITS)
    whole = gradient(lambda x: exact(probability(x), Q), LOGITS)
    assert close(found, by_place)
    assert close(found, whole, atol=1e-2) == (estimator is kl_k1)


# --- the optimum: pi_ref(y) exp(score(y) / beta), up to a factor ---

BEST = tilted(Q, SCORES, BETA)


def test_nothing_climbs_higher_than_the_tilted_reference():
    best = table(BEST)
    assert close(probability(best), BEST)
    assert gradient(objective, best).abs().max() < 1e-12
    assert all(objective(best + draw(7, V, seed=s) / 10) < objective(best) for s in range(20))


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_at_the_optimum_every_response_earns_the_same_and_no_token_beats_expectation(lam):
    best = table(BEST)
    earned = rewards(kl_k1(token_logp(best), token_logp(REF)), BETA)
    # To be earned from a place on: beta log E[exp(score / beta)] under the reference.
    to_go = BETA * (THROUGH @ (Q * (SCORES / BETA).exp()) / (THROUGH @ Q)).log()
    advantages = gae(earned, to_go[PLACE], MASK, gamma=1.0, lam=lam)
    assert close(earned.sum(1), to_go[0].expand(15))
    assert advantages.abs().max() < 1e-12
    assert push(advantages, BEST, logits=best).abs().max() < 1e-12


# --- learning from choices ---

# Any two responses may be shown to a judge, some pairs more often than others. CHOICES (225,): how
# likely it is that these two are shown and the first of them is chosen.
FIRST, SECOND = torch.cartesian_prod(ALL, ALL).unbind(1)
OFTEN = draw(15, 15, seed=7).exp()
SHOWN = (OFTEN + OFTEN.T).flatten() / OFTEN.sum()  # (a, b) and (b, a) are the same pair
CHOICES = SHOWN * (SCORES[FIRST] - SCORES[SECOND]).sigmoid()


def bradley_terry(scores, chances=CHOICES):
    """The mean loss of a judgement. vmap makes a mean over rows one number a row."""
    return chances @ torch.vmap(bradley_terry_loss)(scores[FIRST, None], scores[SECOND, None])


def test_all_the_choices_there_are_give_the_scores_back():
    found = minimise(bradley_terry, torch.zeros_like(SCORES))
    assert CHOICES.sum().item() == pytest.approx(1)
    assert close(found - found.mean(), SCORES - SCORES.mean(), atol=1e-7)


def test_twenty_thousand_choices_give_the_scores_back_as_closely_as_they_can():
    """Their error, measured by the information that the choices hold, is chi-squared with one
    degree of freedom a score, less one for the constant that no choice can show."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = CHOICES.multinomial(n, replacement=True, generator=generator).bincount(minlength=225)
    found = minimise(lambda x: bradley_terry(x, drawn.double() / n), torch.zeros_like(SCORES))
    error, information = found - SCORES, torch.autograd.functional.hessian(bradley_terry, SCORES)
    assert 0.01 < chi2.sf((n * error @ information @ error).item(), df=14) < 0.99
    assert 0.01 < (error - error.mean()).abs().max() < 0.3


def test_dpo_ends_where_rlhf_ends():
    """No reward model, no sampling, and yet the policy that is best by the judge's scores."""

    def loss(logits):
        now, ref = response_logp(logits), response_logp(REF)
        pairs = (x[pair, None] for x in (now, ref) for pair in (FIRST, SECOND))
        return CHOICES @ torch.vmap(lambda *pair: dpo_loss(*pair, beta=BETA))(*pairs)

    assert close(probability(minimise(loss, REF)), BEST, atol=1e-7)
    assert not close(Q, BEST, atol=0.1)  # it had some way to go


# --- best of n ---


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_nearer_than_its_bound(n):
    ways, chances = draws(n)
    for scores in SCORES, SCORES.sign():  # all of them different, and full of ties
        winner = ways.gather(1, scores[ways].argmax(1, keepdim=True)).squeeze(1)
        best = torch.zeros_like(P).index_add(0, winner, chances)
        assert kl(best, P) <= best_of_n_kl(n) + 1e-14
        if scores is SCORES:
            assert close(best[SCORES.argsort()], best_of(P[SCORES.argsort()], n))


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_where_no_response_is_likely_the_bound_is_the_kl(n):
    p = torch.full((10_000,), 1e-4).double()
    assert kl(best_of(p, n), p).item() == pytest.approx(best_of_n_kl(n), abs=1e-3)


# --- expectiles ---


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 1 - 1e-6])
def test_the_best_constant_for_the_expectile_loss_is_the_expectile(tau):
    q, padding = draw(15, R, seed=8), torch.tensor(1e6)
    v = expectile(q[MASK], tau)

    def loss(v):
        return expectile_loss(q.where(MASK, padding), v.expand(15, R), MASK, tau)

    assert gradient(loss, v).abs() < 1e-12
    assert loss(v) < loss(v + 1e-3) and loss(v) < loss(v - 1e-3)
    if tau == 0.5:
        assert close(v, q[MASK].mean()) and close(loss(v), q[MASK].var(unbiased=False) / 2)
    if tau > 0.99:
        assert q[MASK].max() - 1e-3 < v < q[MASK].max()


def test_expectile_loss_by_hand():
    q, v = torch.tensor([[2.0, -2.0, 1e6]]), torch.zeros(1, 3)
    for mask, exact in ([1, 0, 0], 0.7 * 4), ([0, 1, 0], 0.3 * 4), ([1, 1, 0], 2.0):
        assert expectile_loss(q, v, torch.tensor([mask]), 0.7).item() == pytest.approx(exact)


# --- the same world through a GPT ---

# Two prompts of different length, and after each of them all responses, in one batch (30, 5).
PROMPTS, PAD = [[1], [2, 1]], 2
BATCH = collate([([*prompt, *y], len(prompt)) for prompt in PROMPTS for y in RESPONSES], PAD)
EARNED = draw(2, 15, seed=5)  # each prompt has its own favourites


def tiny_models():
    """A policy, with stronger opinions than a fresh one has, and a critic that knows nothing."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=V, n_positions=5, n_layer=2, n_head=2, n_embd=16)
    policy, critic = GPT(config), ScalarGPT(config)
    policy.transformer.wte.weight.data *= 3
    return policy, critic


def listed(model, temperature):
    """Brute force: the logits at each place from a pass of its own, no padding. -> (2, 15)"""
    tables = [[model(torch.tensor([[*x, *s]]))[0, -1] for s in PREFIXES] for x in PROMPTS]
    return torch.stack([probability(torch.stack(rows), temperature) for rows in tables])


@torch.no_grad()
def said(model, temperature=1.0):
    """What the library says of every response to either prompt, in one batch. -> (2, 15)"""
    tokens, prompt_len, mask = BATCH
    logprobs = response_logprobs(model, tokens, prompt_len, R, temperature)
    return (logprobs * mask).sum(1).exp().view(2, 15)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_gpt_is_a_distribution_over_responses(temperature):
    policy = tiny_models()[0].double()
    found = said(policy, temperature)
    assert close(found.sum(1), torch.ones(2).double())
    assert close(found, listed(policy, temperature))
    assert not close(found[0], found[1], atol=0.01)  # the prompt matters


def test_every_weight_of_a_gpt_is_pushed_up_the_objective():
    """From tokens to gradients by the functions that PPO calls, in their order, against the sum
    over all responses of what they earn and cost; temperature, padding and a critic included."""
    policy, critic = (model.double() for model in tiny_models())
    reference, T = copy.deepcopy(policy), 0.7
    reference.transformer.wte.weight.data += 0.3 * draw(V, 16, seed=10)

    tokens, prompt_len, mask = BATCH
    now, ref = (response_logprobs(m, tokens, prompt_len, R, T) for m in (policy, reference))
    values = response_window(critic(tokens), prompt_len, R)
    priced = shape_rewards(EARNED.flatten(), kl_k1(now, ref).detach(), mask, BETA)
    advantages = gae(priced, values.detach(), mask, gamma=1.0, lam=1.0)
    weighted = said(policy, T).view(30, 1) * advantages  # see push
    loss = policy_loss(now, now.detach(), weighted, mask) * mask.sum()
    pushed = torch.autograd.grad(-loss, list(policy.parameters()))

    p, q = listed(policy, T), listed(reference, T)
    exact = torch.autograd.grad((p * EARNED).sum() - BETA * kl(p, q).sum(), policy.parameters())
    assert all(close(a, b) for a, b in zip(pushed, exact, strict=True))
    assert all(weight.abs().max() > 1e-3 for weight in exact)


def test_ppo_learns_the_optimum(tmp_path):
    """Sampling, pricing, GAE, clipping, Adam, round after round: they end where theory says."""
    policy, critic = tiny_models()
    reference, scores = copy.deepcopy(policy), EARNED.float()

    def score(tokens, prompt_len, mask):
        response = response_tokens(tokens, prompt_len, R) * mask
        which = (response[:, None] == TOKENS).all(2).int().argmax(1)
        return scores[prompt_len - 1, which]

    task = dict(kl_coef=BETA, lam=1.0, temperature=0.7, max_new_tokens=R, dtype="float32")
    pace = dict(steps=150, batch_size=128, minibatches=1, save_every=1000)
    rates = dict(learning_rate=3e-3, critic_learning_rate=1e-2)
    cfg = PPOConfig(out=str(tmp_path), **task, **pace, **rates)
    torch.manual_seed(1)
    ppo.train(policy, reference, critic, score, PROMPTS * 64, END, PAD, cfg, RunLog())
    before, after = (said(model, cfg.temperature) for model in (reference, policy))
    best = tilted(before, scores, BETA)
    start, end = ((p - best).abs().sum(1) / 2 for p in (before, after))  # total variation
    assert start.min() > 0.3 and end.max() < 0.03
