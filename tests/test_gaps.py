"""What mutants.py found that no other test noticed."""

import copy
import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch

import train_ppo
from nanorlhf import data, environment, ppo, reward, tokenizer
from nanorlhf.evaluate import EvaluateConfig, describe
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.ppo import PPOConfig, Rollout, adapt, diagnose, step, summarise, update
from nanorlhf.reward import RMConfig
from nanorlhf.runlog import RunLog, read

TINY = GPTConfig(vocab_size=11, n_positions=20, n_layer=1, n_head=2, n_embd=16, dropout=0.3)
EOS, PAD = 9, 10
CFG = PPOConfig(device="cpu", dtype="float32", batch_size=4, max_new_tokens=8)
PROMPTS = [[1], [2, 4, 5], [6, 7], [8, 0, 1, 2]]


def three_models():
    """A policy, the same as its reference, and a critic, all in eval mode, with dropout to miss."""
    torch.manual_seed(0)
    policy, critic = GPT(TINY).eval(), ScalarGPT(TINY).eval()
    return policy, copy.deepcopy(policy), critic


def length(tokens, prompt_len, mask):
    return mask.sum(1).float()


# --- reward.py ---


def test_a_trained_reward_model_throws_no_dice():
    model, cfg = ScalarGPT(TINY), RMConfig(device="cpu", dtype="float32", steps=1)
    reward.train(model, [([([1, 2, 9], 1), ([1, 3, 9], 1)], [(0, 1)])], PAD, cfg, RunLog())
    assert not any(module.training for module in model.modules())


# --- ppo.py: the update ---


def minibatches(monkeypatch, **changes):
    """What an update gives to policy_loss: the old log-probs of each minibatch."""
    policy, reference, critic = three_models()
    rollout = ppo.collect(policy, reference, critic, length, PROMPTS * 2, CFG, 0.1, EOS, PAD)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (policy, critic)]
    seen, real = [], ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *given: seen.append(given[1]) or real(*given))
    update(policy, critic, optimizers, rollout, dataclasses.replace(CFG, **changes))
    return seen


def test_an_update_does_not_turn_dropout_on(monkeypatch):
    """It would raise, as the first ratio would not be 1."""
    assert len(minibatches(monkeypatch, epochs=1, minibatches=1)) == 1


def test_every_epoch_deals_the_minibatches_anew(monkeypatch):
    seen = minibatches(monkeypatch, epochs=3, minibatches=2)
    assert len({tuple(sorted(batch[:, 0].tolist())) for batch in seen}) == 6


def test_a_step_is_no_longer_than_allowed():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = step(model, optimizer, -model(torch.tensor([30.0, 40.0])).sum(), grad_clip=0.5)
    assert norm.item() == pytest.approx(50)  # before clipping
    assert torch.allclose(model.weight, torch.tensor([[0.3, 0.4]]))


MASK = torch.tensor([[True, True], [True, False]])


def rollout_of(**known):
    """Two responses, of two tokens and of one; what is not given is 0."""
    names = "old_logprobs ref_logprobs entropy old_values rewards advantages returns".split()
    given = {name: torch.tensor(known.get(name, [[0.0, 0], [0, 0]])) for name in names}
    scores, ended = torch.tensor([1.0, 4.0]), torch.tensor([False, True])
    return Rollout(None, None, mask=MASK, ended=ended, scores=scores, **given)


def test_the_numbers_of_an_update_by_hand():
    batch = rollout_of(old_logprobs=[[-1.0, -1], [-1, 0]])
    logprobs = batch.old_logprobs + torch.tensor([[0.5, -0.5], [0.1, 0]])
    losses = torch.tensor(3.0), torch.tensor(5.0)
    found = diagnose(logprobs, batch, 0.2, losses, (torch.tensor(7.0), torch.tensor(9.0)))
    kl = sum(math.exp(d) - 1 - d for d in (0.5, -0.5, 0.1)) / 3
    expected = dict(
        policy_loss=3, value_loss=5, approx_kl=kl, policy_grad_norm=7, value_grad_norm=9,
        clip_frac=2 / 3,  # one ratio above 1.2, one below 0.8
    )  # fmt: skip
    assert {name: x.item() for name, x in found.items()} == pytest.approx(expected)


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
    found = {name: x.item() for name, x in summarise(rollout).items()}
    assert found == pytest.approx(expected)


# --- ppo.py: train ---


def test_the_price_goes_on_from_what_it_was_the_round_before(tmp_path):
    cfg = dataclasses.replace(CFG, steps=4, kl_target=1.0, batch_size=64)
    ppo.train(*three_models(), length, PROMPTS * 16, EOS, PAD, cfg, RunLog(tmp_path))
    rows = read(tmp_path)
    assert rows[0]["kl_coef"] == cfg.kl_coef
    for before, after in pairwise(rows):
        price = adapt(before["kl_coef"], before["kl"], cfg)
        assert after["kl_coef"] == pytest.approx(price, rel=1e-5)
        assert after["kl_coef"] < 0.99 * before["kl_coef"]  # so there was something to go on from


# --- evaluate.py ---


def test_padding_is_no_part_of_what_a_response_is_like():
    torch.manual_seed(0)
    model, other = GPT(TINY).eval(), GPT(TINY).eval()
    rows = [([1, 2, 3, 4, 5, EOS], 2), ([6, EOS], 1)]

    def sums(rows):
        cfg = EvaluateConfig(device="cpu", dtype="float32")
        found = describe(model, other, [data.collate(rows, PAD)], ["text"] * len(rows), cfg)
        surprise = math.log(found["perplexity"]) * found["response_len"]
        return torch.tensor([found["kl"], found["response_len"], surprise]) * len(rows)

    assert torch.allclose(sums(rows), sums(rows[:1]) + sums(rows[1:]), atol=1e-5)


# --- train_ppo.py ---


def test_ppo_never_trains_on_a_prompt_that_is_held_out(tmp_path, monkeypatch):
    texts, given = [f"question {i}" for i in range(100)], []
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=text)) + "\n" for text in texts))
    tok = tokenizer.learn(environment.prompts(50), 300)
    config = GPTConfig(tok.vocab_size, n_positions=96, n_layer=1, n_head=2, n_embd=16)
    GPT(config).save(tmp_path / "sft")
    tok.save(tmp_path / "sft")
    ScalarGPT(config).save(tmp_path / "rm")
    paths = {name: str(tmp_path / name) for name in ("out", "sft", "rm")}
    cfg = PPOConfig(**paths, data=[str(file)], device="cpu", eval_prompts=3, max_new_tokens=5)

    class Enough(Exception):
        pass

    def stop(*arguments):
        given.extend(arguments)
        raise Enough

    monkeypatch.setattr(ppo, "train", stop)
    with pytest.raises(Enough):
        train_ppo.main(cfg)
    train, held_out = data.split([dict(prompt=text) for text in texts])
    assert {tok.decode(tokens) for tokens in given[4]} == {record["prompt"] for record in train}
    assert held_out
