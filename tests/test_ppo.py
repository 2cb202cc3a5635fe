"""PPO in pieces small enough to work by hand, and then whole, on a task that takes seconds."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanorlhf import generate, ppo
from nanorlhf.advantages import gae, grpo, reinforce, rloo
from nanorlhf.logprobs import (
    masked,
    masked_mean,
    response_logprobs,
    response_tokens,
    response_window,
)
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.ppo import (
    PPOConfig,
    Rollout,
    adapt,
    collect,
    diagnose,
    make_optimizers,
    policy_loss,
    shape_rewards,
    step,
    summarise,
    update,
    value_loss,
)
from nanorlhf.support import UserError
from nanorlhf.support.runlog import RunLog, read

TINY = GPTConfig(vocab_size=11, n_positions=20, n_layer=1, n_head=2, n_embd=16)
EOS, PAD, LIKED = 9, 10, 3
PROMPTS = [[1], [2, 4, 5], [6, 7], [8, 0, 1, 2]]
CFG = PPOConfig(
    device="cpu", dtype="float32", batch_size=4, max_new_tokens=8, kl_coef=0.1, epochs=2, warmup=0
)


def three_models(**changes):
    """A policy, the same as its reference, and a critic, all new."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changes)
    policy, critic = GPT(config), ScalarGPT(config)
    return policy, copy.deepcopy(policy), critic


def share_of_liked(tokens, prompt_len, mask):
    """The toy task: how much of the response is one certain token?"""
    liked = response_tokens(tokens, prompt_len, mask.shape[1]) == LIKED
    return (liked * mask).sum(1) / mask.sum(1)


def roll(cfg=CFG, prompts=PROMPTS, pad=PAD, seed=1, score=share_of_liked):
    """A rollout whose reference has been moved away from the policy: there is KL to price."""
    policy, reference, critic = three_models()
    with torch.no_grad():
        reference.transformer.wte.weight += 0.1 * torch.randn(11, 16)
    torch.manual_seed(seed)
    rollout = collect(policy, reference, critic, score, prompts, cfg, cfg.kl_coef, EOS, pad)
    return rollout, policy, reference, critic


# --- shape_rewards ---


def test_every_token_pays_for_its_kl_and_the_last_one_earns_the_score():
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.4, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = shape_rewards(torch.tensor([1.0, -2.0]), kl, mask, kl_coef=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.1, 0.85], [-2.2, 0, 0]]))


def test_nothing_behind_the_mask_is_ever_charged():
    mask = torch.tensor([[True, True, False]])
    scores, kl = torch.tensor([1.0]), torch.tensor([[0.1, 0.2, 1e6]])
    assert shape_rewards(scores, kl, mask, 0.1)[0, 2] == 0


def test_without_a_price_the_score_is_all_there_is():
    rewards = shape_rewards(torch.tensor([3.0]), torch.ones(1, 4), torch.ones(1, 4).bool(), 0.0)
    assert rewards.tolist() == [[0, 0, 0, 3]]


# --- the losses ---


def test_the_first_step_is_plain_policy_gradient():
    old_logprobs = -torch.rand(3, 4)
    logprobs, advantages = old_logprobs.clone().requires_grad_(), torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    loss = policy_loss(logprobs, old_logprobs, advantages, mask)
    loss.backward()
    assert torch.allclose(loss, -masked_mean(advantages, mask))
    assert torch.allclose(logprobs.grad, -advantages * mask / 7)  # -A / N


@pytest.mark.parametrize(
    "ratio, advantage, loss, pushed",
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # already far enough in its good direction
        (0.5, 2.0, -1.0, True),  # a good token made rarer: bring it back
        (0.9, -2.0, 1.8, True),
        (0.5, -2.0, 1.6, False),  # a bad token already rare enough
        (1.5, -2.0, 3.0, True),  # a bad token made likelier: push it down
    ],
)
def test_clipping_stops_the_push_in_the_good_direction_only(ratio, advantage, loss, pushed):
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    old_logprobs, mask = torch.zeros(1, 1), torch.ones(1, 1)
    out = policy_loss(logprobs, old_logprobs, torch.tensor([[advantage]]), mask, clip=0.2)
    out.backward()
    assert out.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(-ratio * advantage if pushed else 0)


@pytest.mark.parametrize(
    "value, target, loss",
    [
        (1.1, 2.0, 0.5 * 0.9**2),  # within the clip: the plain square
        (1.5, 2.0, 0.5 * 0.8**2),  # moved too far towards the target: as if held at 1.2
        (0.5, 2.0, 0.5 * 1.5**2),  # moved away: the plain square is the larger
    ],
)
def test_value_loss_by_hand(value, target, loss):
    value, target, old = torch.tensor([[value]]), torch.tensor([[target]]), torch.ones(1, 1)
    assert value_loss(value, old, target, torch.ones(1, 1), 0.2).item() == pytest.approx(loss)


def test_value_loss_is_a_mean_over_the_mask():
    values, mask = torch.tensor([[1.0, 3.0, 1e6]]), torch.tensor([[True, True, False]])
    assert value_loss(values, values, torch.zeros(1, 3), mask).item() == 0.5 * (1 + 9) / 2


# --- collect ---


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_rollout_agrees_with_itself(temperature):
    rollout, policy, reference, critic = roll(dataclasses.replace(CFG, temperature=temperature))
    tokens, prompt_len, mask = rollout.tokens, rollout.prompt_len, rollout.mask
    R = mask.shape[1]
    with torch.no_grad():
        again = [
            response_logprobs(m, tokens, prompt_len, R, temperature) for m in (policy, reference)
        ]
        values = response_window(critic(tokens), prompt_len, R)
    all_kept = rollout.old_logprobs, rollout.ref_logprobs, rollout.old_values
    for kept, recomputed in zip(all_kept, (*again, values), strict=True):
        assert torch.allclose(kept[mask], recomputed[mask], atol=1e-6)
    kl = rollout.old_logprobs - rollout.ref_logprobs
    assert (kl[mask].abs() > 0.01).any()  # or the next line would say little
    assert torch.equal(rollout.rewards, shape_rewards(rollout.scores, kl, mask, CFG.kl_coef))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_on_average_as_surprising_as_their_entropy_says(temperature):
    """They are, if and only if they were sampled at the temperature at which they are scored."""
    cfg = dataclasses.replace(CFG, temperature=temperature)
    rollout, *_ = roll(cfg, PROMPTS * 100)
    surprise = masked_mean(-rollout.old_logprobs, rollout.mask).item()
    assert surprise == pytest.approx(masked_mean(rollout.entropy, rollout.mask).item(), abs=0.06)


def test_returns_are_raw_advantages_plus_values_and_whitening_leaves_them_alone():
    rollout, *_ = roll()
    mask = rollout.mask
    raw = gae(rollout.rewards, rollout.old_values, mask, CFG.gamma, CFG.lam)
    assert torch.allclose(rollout.returns[mask], (raw + rollout.old_values)[mask])
    assert masked_mean(rollout.advantages, mask).abs() < 1e-6
    assert masked_mean(rollout.advantages**2, mask).item() == pytest.approx(1, abs=1e-5)
    assert masked_mean(raw, mask).abs() > 0.1  # or whitening would have had nothing to do


def test_with_lambda_one_the_first_return_is_all_that_the_response_earned():
    rollout, *_ = roll(dataclasses.replace(CFG, lam=1.0))
    assert torch.allclose(rollout.returns[:, 0], rollout.rewards.sum(1), atol=1e-6)


def test_the_mask_ends_with_the_end_token_or_with_the_limit():
    rollout, *_ = roll(prompts=PROMPTS * 25)
    chosen = response_tokens(rollout.tokens, rollout.prompt_len, rollout.mask.shape[1])
    for row, mask, ended in zip(chosen, rollout.mask, rollout.ended, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
        assert bool(ended) == (row[n - 1] == EOS) and EOS not in row[: n - 1]
        assert ended or n == CFG.max_new_tokens
    assert 0 < rollout.ended.float().mean() < 1  # both kinds were there


def test_the_pad_token_is_nobodys_business():
    one, other = roll(pad=PAD)[0], roll(pad=0)[0]
    for name in ("mask", "ended", "prompt_len"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for name in ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns"):
        a, b = (getattr(rollout, name)[rollout.mask] for rollout in (one, other))
        assert torch.allclose(a, b, atol=1e-6), name


def test_a_response_that_never_ends_can_be_fined_and_its_score_stays_what_it_was():
    free, fined = (
        roll(dataclasses.replace(CFG, no_end_penalty=fine), PROMPTS * 5)[0] for fine in (0.0, 2.0)
    )
    assert torch.equal(free.scores, fined.scores)
    difference = (free.rewards - fined.rewards).sum(1)
    assert torch.allclose(difference, 2.0 * ~free.ended, atol=1e-6)


def test_a_constant_added_to_every_score_reaches_only_the_critic():
    """With lambda 1 and a critic that says 0, whitened advantages cannot see the constant when
    every response has the same length."""
    cfg = dataclasses.replace(CFG, lam=1.0)
    policy, reference, critic = three_models()
    critic.score.weight.data.zero_()
    rollouts = []
    for constant in (0, 5):
        torch.manual_seed(3)
        score = lambda *batch: share_of_liked(*batch) + constant  # noqa: E731, B023
        rollouts.append(collect(policy, reference, critic, score, PROMPTS, cfg, 0.1, -1, PAD))
    assert torch.allclose(rollouts[0].advantages, rollouts[1].advantages, atol=1e-4)
    assert torch.allclose(rollouts[0].returns + 5, rollouts[1].returns, atol=1e-5)


@pytest.mark.parametrize("G, size, widest", [(1, 3, 3), (4, 8, 8), (4, 5, 4), (1, 0, 12)])
def test_a_micro_batch_bounds_what_is_sampled_at_once(monkeypatch, G, size, widest):
    """And what is measured. The rollout is the same: its random numbers are drawn beforehand."""
    sampled, measured, real = [], spy_on(monkeypatch, "measure"), generate.generate

    def spy(model, prompts, *given):
        batch = real(model, prompts, *given)
        sampled.append(len(batch[0]))
        return batch

    monkeypatch.setattr(generate, "generate", spy)
    cfg = dataclasses.replace(CFG, responses=G, batch_size=12, minibatches=1)
    prompts = (PROMPTS * 3)[: 12 // G]
    rollout, *_ = roll(dataclasses.replace(cfg, micro_batch_size=size), prompts)
    assert sum(sampled) == len(rollout) and max(sampled) == widest
    assert max(len(given[4]) for given in measured) == (size or len(rollout))
    whole, *_ = roll(cfg, prompts)
    for name in "tokens prompt_len mask ended".split():
        assert torch.equal(getattr(rollout, name), getattr(whole, name)), name
    for name in "old_logprobs ref_logprobs entropy old_values rewards advantages returns".split():
        kept, all_at_once = (getattr(x, name)[whole.mask] for x in (rollout, whole))
        assert torch.allclose(kept, all_at_once, atol=1e-5), name


# --- update ---


def one_update(policy, critic, rollout, cfg):
    return update(policy, critic, make_optimizers(policy, critic, cfg), rollout, cfg)


def plain_steps(policy, critic, lr):
    """Optimizers that move each network by the rate times its gradient."""
    networks = dict(policy_optimizer=policy, critic_optimizer=critic)
    return {name: torch.optim.SGD(model.parameters(), lr=lr) for name, model in networks.items()}


def test_the_first_ratio_is_one():
    rollout, policy, _, critic = roll()
    metrics = one_update(policy, critic, rollout, dataclasses.replace(CFG, epochs=1, minibatches=1))
    assert metrics["approx_kl"] < 1e-10 and metrics["clip_frac"] == 0
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-6)  # -mean of whitened advantages


def test_a_forgotten_temperature_is_caught():
    rollout, policy, _, critic = roll(dataclasses.replace(CFG, temperature=0.5))
    right, wrong = ([copy.deepcopy(model) for model in (policy, critic)] for _ in range(2))
    with pytest.raises(RuntimeError, match="expected a first ratio of 1"):
        one_update(*wrong, rollout, CFG)
    one_update(*right, rollout, dataclasses.replace(CFG, temperature=0.5))


def test_dropout_left_on_is_caught():
    policy, reference, critic = three_models(dropout=0.3)
    rollout = collect(policy, reference, critic, share_of_liked, PROMPTS, CFG, 0.1, EOS, PAD)
    with pytest.raises(RuntimeError, match="expected a first ratio of 1"):
        one_update(policy, critic, rollout, CFG)


def test_a_ratio_that_is_not_1_is_caught_under_python_without_asserts_too():
    """`python -O` leaves every assert out."""
    program = """
import dataclasses, torch
from test_ppo import CFG, one_update, roll
rollout, policy, _, critic = roll(dataclasses.replace(CFG, temperature=0.5))
one_update(policy, critic, rollout, CFG)
"""
    here = Path(__file__).parent
    words, folders = [sys.executable, "-O", "-c", program], os.pathsep.join(sys.path)
    done = subprocess.run(
        words, cwd=here, env=os.environ | dict(PYTHONPATH=folders), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RuntimeError: expected a first ratio of 1" in done.stderr


def test_an_update_does_not_turn_dropout_on():
    """It would stop the run, as the first ratio would not be 1."""
    policy, reference, critic = (model.eval() for model in three_models(dropout=0.3))
    rollout = collect(policy, reference, critic, share_of_liked, PROMPTS, CFG, 0.1, EOS, PAD)
    one_update(policy, critic, rollout, CFG)
    assert not any(module.training for model in (policy, critic) for module in model.modules())


def spy_on(monkeypatch, name):
    """The arguments of every call of a function of ppo.py, which goes on doing what it does."""
    seen, real = [], getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *given: seen.append(given) or real(*given))
    return seen


def deal(monkeypatch):
    """Eight responses, and who is in each minibatch of three epochs: known by their log-probs."""
    rollout, policy, _, critic = roll(prompts=PROMPTS * 2)
    calls = spy_on(monkeypatch, "policy_loss")
    one_update(policy, critic, rollout, dataclasses.replace(CFG, epochs=3, minibatches=2))
    seen = [sorted(old_logprobs[:, 0].tolist()) for _, old_logprobs, *_ in calls]
    return sorted(rollout.old_logprobs[:, 0].tolist()), seen


def test_every_response_is_in_one_minibatch_of_each_epoch(monkeypatch):
    everyone, seen = deal(monkeypatch)
    assert [len(batch) for batch in seen] == [4] * 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(first + second) == everyone


def test_every_epoch_deals_the_minibatches_anew(monkeypatch):
    assert len({tuple(batch) for batch in deal(monkeypatch)[1]}) == 6


def test_each_loss_has_its_own_clip(monkeypatch):
    rollout, policy, _, critic = roll()
    policy_calls, value_calls = (spy_on(monkeypatch, f"{who}_loss") for who in ("policy", "value"))
    cfg = dataclasses.replace(CFG, clip=0.11, value_clip=0.77, epochs=1, minibatches=1)
    one_update(policy, critic, rollout, cfg)
    assert (policy_calls[0][-1], value_calls[0][-1]) == (0.11, 0.77)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_how_the_rows_are_split_to_fit_into_memory_changes_nothing(size):
    """Rows differ in length, so that a mean of the parts' means would be another number."""
    found = []
    for micro_batch_size in 0, size:
        cfg = dataclasses.replace(CFG, micro_batch_size=micro_batch_size, epochs=2, minibatches=2)
        rollout, policy, _, critic = roll(cfg, PROMPTS * 3)
        assert len(set(rollout.mask.sum(1).tolist())) > 3
        torch.manual_seed(2)
        metrics = update(policy, critic, plain_steps(policy, critic, 0.1), rollout, cfg)
        weights = torch.cat([w.flatten() for m in (policy, critic) for w in m.parameters()])
        found.append((rollout.returns, weights, torch.tensor([*metrics.values()])))
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, atol=2e-5)


def test_a_step_is_no_longer_than_allowed():
    """Each network has a length of its own, and the length before the cut is what is logged."""
    moved, logged = [], []
    for grad_clip in 1e9, 1e-3:
        rollout, *models = roll()
        policy, critic = models[0], models[2]
        before = [[w.detach().clone() for w in model.parameters()] for model in (policy, critic)]
        cfg = dataclasses.replace(CFG, grad_clip=grad_clip)
        metrics = step(policy, critic, plain_steps(policy, critic, 1.0), rollout, cfg)
        logged += [metrics["policy_grad_norm"].item(), metrics["critic_grad_norm"].item()]
        moved += [
            sum((w - old).square().sum() for w, old in zip(model.parameters(), was, strict=True))
            for model, was in zip((policy, critic), before, strict=True)
        ]
    lengths = torch.stack(moved).sqrt().tolist()
    assert lengths == pytest.approx([*logged[:2], 1e-3, 1e-3], rel=1e-3)
    assert logged[:2] == logged[2:] and min(logged) > 0.1 and logged[0] != logged[1]


MASK = torch.tensor([[True, True], [True, False]])


def rollout_of(**known):
    """Two responses, of two tokens and of one; what is not given is 0."""
    names = "old_logprobs ref_logprobs entropy old_values rewards advantages returns".split()
    given = {name: torch.tensor(known.get(name, [[0.0, 0], [0, 0]])) for name in names}
    scores, ended = torch.tensor([1.0, 4.0]), torch.tensor([False, True])
    return Rollout(None, None, mask=MASK, ended=ended, scores=scores, **given)


def test_how_far_an_update_has_moved_by_hand():
    batch = rollout_of(old_logprobs=[[-1.0, -1], [-1, 0]])
    found = diagnose(batch.old_logprobs + torch.tensor([[0.5, -0.5], [0.1, 0]]), batch, 0.2)
    assert found["clip_frac"].item() == pytest.approx(2 / 3)  # one above 1.2, one below 0.8
    kl = sum(math.exp(d) - 1 - d for d in (0.5, -0.5, 0.1)) / 3
    assert found["approx_kl"].item() == pytest.approx(kl)


def test_the_numbers_of_an_update_are_means_over_its_steps(monkeypatch):
    rollout, policy, _, critic = roll()
    gap = torch.zeros(())
    numbers = iter([dict(loss=torch.tensor(x), ratio_gap=gap) for x in (1.0, 2.0, 6.0, 7.0)])
    monkeypatch.setattr(ppo, "step", lambda *_: next(numbers))
    assert update(policy, critic, {}, rollout, CFG) == dict(loss=4.0, ratio_gap=0.0)


# --- the KL price ---


def test_the_price_is_fixed_unless_there_is_a_target():
    assert adapt(0.05, kl=100.0, cfg=PPOConfig()) == 0.05


@pytest.mark.parametrize("kl, price", [(10.5, 1.005), (20.0, 1.02), (9.5, 0.995), (0.0, 0.98)])
def test_the_price_rises_above_the_target_and_falls_below(kl, price):
    cfg = PPOConfig(kl_target=10.0, batch_size=64)
    assert adapt(1.0, kl, cfg) == pytest.approx(price)


def test_the_price_goes_on_from_what_it_was_the_round_before(tmp_path):
    cfg = dataclasses.replace(CFG, steps=4, kl_target=1.0, batch_size=64, out=str(tmp_path))
    train(cfg, log=RunLog(tmp_path))
    rows = read(tmp_path)
    assert len(rows) == 4 and rows[0]["kl_coef"] == cfg.kl_coef
    for before, after in pairwise(rows):
        price = adapt(before["kl_coef"], before["kl"], cfg)
        assert after["kl_coef"] == pytest.approx(price, rel=1e-5)
        assert after["kl_coef"] < 0.99 * before["kl_coef"]  # so there was something to go on from


# --- train ---


def test_the_numbers_of_a_rollout_by_hand():
    rollout = rollout_of(
        old_logprobs=[[-1.0, -2], [-3, 0]], ref_logprobs=[[-1.5, -1], [-5, 0]],
        entropy=[[1.0, 2], [6, 0]], returns=[[1.0, 2], [3, 0]], old_values=[[1.0, 1.5], [2, 0]],
    )  # fmt: skip
    gaps = [0.5, -1, 2]
    expected = dict(
        score=2.5, kl=sum(gaps) / 2, kl_k3=sum(math.exp(-d) - 1 + d for d in gaps) / 2,
        entropy=3, response_len=1.5, ended=0.5,
        explained_variance=1 - 0.25 / 1,  # errors 0, 0.5 and 1; returns 1, 2 and 3
    )  # fmt: skip
    assert summarise(rollout) == pytest.approx(expected)


TOY = dataclasses.replace(
    CFG, batch_size=32, steps=25, learning_rate=1e-2, critic_learning_rate=1e-2, kl_coef=0.01
)


def diary(cfg):
    """A log with a folder if the test has given one; without, nothing is saved."""
    return RunLog(cfg.out if Path(cfg.out).is_absolute() else None)


def train(cfg, models=None, log=None):
    models = models or three_models()
    torch.manual_seed(cfg.seed)
    summary = ppo.train(*models, share_of_liked, PROMPTS * 16, EOS, PAD, cfg, log or diary(cfg))
    return summary, models


def test_the_score_goes_up_on_the_toy_task(tmp_path):
    cfg = dataclasses.replace(TOY, out=str(tmp_path))
    log = RunLog(tmp_path)
    _, (policy, reference, critic) = train(cfg, log=log)
    fresh_policy, fresh_reference, fresh_critic = three_models()
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    torch.manual_seed(1)
    before, after = (
        collect(model, reference, critic, share_of_liked, PROMPTS * 16, cfg, 0, EOS, PAD)
        for model in (fresh_policy, policy)
    )
    assert len(rows) == 25
    assert before.scores.mean() < 0.2 and after.scores.mean() > 0.6
    assert same(reference, fresh_reference) and not same(critic, fresh_critic)


def same(a, b):
    weights = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in weights)


def test_learning_rates_fall_in_a_straight_line(monkeypatch):
    rates, real = [], ppo.update

    def spy(policy, critic, optimizers, *rest):
        rates.append([o.param_groups[0]["lr"] for o in optimizers.values()])
        assert [*optimizers] == ["policy_optimizer", "critic_optimizer"]
        return real(policy, critic, optimizers, *rest)

    monkeypatch.setattr(ppo, "update", spy)
    train(dataclasses.replace(TOY, steps=4, learning_rate=0.004, critic_learning_rate=0.008))
    expected = [[0.004, 0.008], [0.003, 0.006], [0.002, 0.004], [0.001, 0.002]]
    assert torch.allclose(torch.tensor(rates), torch.tensor(expected))


def test_the_rate_of_a_step_is_in_the_log_and_may_warm_up_first(tmp_path):
    cfg = dataclasses.replace(TOY, steps=4, learning_rate=0.004, critic_learning_rate=0.008)
    train(dataclasses.replace(cfg, warmup=2, out=str(tmp_path)), log=RunLog(tmp_path))
    rows = read(tmp_path)
    assert [row["policy_lr"] for row in rows] == pytest.approx([0.002, 0.003, 0.002, 0.001])
    assert [row["critic_lr"] for row in rows] == pytest.approx([0.004, 0.006, 0.004, 0.002])


@pytest.mark.parametrize("advantage", ["reinforce", "rloo", "grpo"])
def test_without_a_critic_the_score_goes_up_too(advantage, tmp_path):
    cfg = dataclasses.replace(TOY, advantage=advantage, responses=4, out=str(tmp_path))
    policy, reference, _ = three_models()
    torch.manual_seed(1)
    log = RunLog(tmp_path)
    ppo.train(policy, reference, None, share_of_liked, PROMPTS * 16, EOS, PAD, cfg, log)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["score"] < 0.2 and rows[-1]["score"] > 0.5
    assert not {"value_loss", "critic_grad_norm", "explained_variance"} & rows[0].keys()


@pytest.mark.parametrize(
    "advantage, expected",
    [
        ("reinforce", lambda scores, penalty: reinforce(scores - penalty)),
        ("rloo", lambda scores, penalty: rloo(scores - penalty, G=4)),
        ("grpo", lambda scores, penalty: grpo(scores, G=4) - rloo(penalty, G=4)),
    ],
)
def test_without_a_critic_a_response_is_pushed_by_all_that_it_earned(advantage, expected):
    policy, reference, _ = three_models()
    with torch.no_grad():
        reference.transformer.wte.weight += 0.1 * torch.randn(11, 16)
    cfg = dataclasses.replace(CFG, advantage=advantage, responses=4, batch_size=16)
    cfg.no_end_penalty = 0.5
    rollout = collect(policy, reference, None, share_of_liked, PROMPTS, cfg, 0.1, EOS, PAD)
    assert rollout.old_values is None and rollout.returns is None
    assert rollout.prompt_len.tolist() == [n for n in (1, 3, 2, 4) for _ in range(4)]
    kl = masked(rollout.old_logprobs - rollout.ref_logprobs, rollout.mask).sum(1)
    scores = rollout.scores - 0.5 * ~rollout.ended
    pushed = expected(scores, 0.1 * kl)[:, None].expand_as(rollout.rewards)
    assert torch.allclose(rollout.advantages, pushed, atol=1e-5)
    assert torch.allclose(rollout.rewards.sum(1), scores - 0.1 * kl, atol=1e-5)
    assert kl.abs().max() > 0.1 and 0 < rollout.ended.sum() < 16  # each of the three had its say


def test_where_a_group_scores_alike_grpo_is_pushed_by_the_penalty_as_dear_as_it_is():
    """Divided by its own deviation, a penalty would weigh about 1 whatever its coefficient."""
    policy, reference, _ = three_models()
    with torch.no_grad():
        reference.transformer.wte.weight += 0.1 * torch.randn(11, 16)
    cfg = dataclasses.replace(CFG, advantage="grpo", responses=4, batch_size=16)
    pushed = []
    for kl_coef in 0.01, 0.1:
        torch.manual_seed(1)
        alike = lambda tokens, prompt_len, mask: torch.full((len(mask),), 2.0)  # noqa: E731
        rollout = collect(policy, reference, None, alike, PROMPTS, cfg, kl_coef, EOS, PAD)
        pushed.append(rollout.advantages)
    assert torch.allclose(10 * pushed[0], pushed[1], atol=1e-6)
    kl = masked(rollout.old_logprobs - rollout.ref_logprobs, rollout.mask).sum(1)
    assert torch.allclose(pushed[1][:, 0], -0.1 * rloo(kl, 4), atol=1e-6)
    assert 0.01 < pushed[1].abs().max() < 0.5


@pytest.mark.parametrize(
    "settings", [dict(advantage="rloo"), dict(responses=3, batch_size=64), dict(responses=0)]
)
def test_responses_that_cannot_be_compared_are_refused(settings):
    with pytest.raises(UserError, match="--responses: expected"):
        PPOConfig(**settings)


def test_a_dearer_kl_keeps_the_policy_closer():
    cheap, dear = (train(dataclasses.replace(TOY, kl_coef=c))[0]["kl"] for c in (0.01, 1.0))
    assert dear < 0.5 * cheap


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 5:
            raise KeyboardInterrupt


def test_without_a_critic_a_resumed_run_is_the_same_run_too(tmp_path):
    cfg = dataclasses.replace(
        TOY, advantage="rloo", responses=4, steps=6, save_every=3, out=str(tmp_path)
    )
    policies = []
    for kind, changes in (RunLog, {}), (Interrupted, {}), (RunLog, dict(resume=True)):
        log = kind(tmp_path)
        policy, reference, _ = three_models()
        torch.manual_seed(1)
        arguments = share_of_liked, PROMPTS * 16, EOS, PAD, dataclasses.replace(cfg, **changes), log
        with contextlib.suppress(KeyboardInterrupt):
            ppo.train(policy, reference, None, *arguments)
        policies.append(policy)
    assert same(policies[0], policies[2])


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    cfg = dataclasses.replace(TOY, steps=6, save_every=3, kl_target=1.0, out=str(tmp_path))
    whole, models = train(cfg)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, log=Interrupted(tmp_path))
    others = three_models()
    with torch.no_grad():
        for model in (others[0], others[2]):  # whatever stands in them, it is replaced
            model.transformer.wte.weight += 1
    torch.manual_seed(99)
    resumed, models_again = train(dataclasses.replace(cfg, resume=True), others)
    assert resumed == whole
    assert all(same(a, b) for a, b in zip(models, models_again, strict=True))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    cfg = dataclasses.replace(TOY, steps=2, save_every=1, out=str(tmp_path))
    _, models = train(cfg)
    summary, models_again = train(dataclasses.replace(cfg, resume=True))
    assert summary["steps"] == 2
    assert all(same(a, b) for a, b in zip(models, models_again, strict=True))


def test_a_single_token_is_a_rollout_too():
    """Whose variance by the unbiased formula would be NaN, and NaN stops a run."""
    one = torch.zeros(1, 1)
    rollout = Rollout(
        tokens=torch.zeros(1, 2, dtype=torch.long), prompt_len=torch.ones(1, dtype=torch.long),
        mask=torch.ones(1, 1, dtype=torch.bool), ended=torch.ones(1, dtype=torch.bool),
        old_logprobs=one, ref_logprobs=one, entropy=one, scores=one[0], rewards=one,
        advantages=one, old_values=one, returns=one + 1,
    )  # fmt: skip
    assert all(math.isfinite(x) for x in summarise(rollout).values())
