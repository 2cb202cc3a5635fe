"""The ledger in README.md is whole and names tests that exist. Below: the tests that it asks for
and that belong to no other file."""

import ast
import copy
import dataclasses
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from nanorlhf import environment, generate, ppo, reward, sft, tokenizer
from nanorlhf.generate import sample
from nanorlhf.logprobs import kl_k1
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.ppo import PPOConfig, collect, diagnose, policy_loss, step, summarise, update
from nanorlhf.reward import RMConfig
from nanorlhf.sft import SFTConfig
from nanorlhf.support import UserError, config, loop
from nanorlhf.support.data import collate, split
from nanorlhf.support.runlog import RunLog

HERE = Path(__file__).parent
PITFALLS = range(1, 46)


# --- the ledger ---


def ledger():
    """The rows of the table: number, what goes wrong, how it is prevented, tests."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if re.match(r"\| *\d+ *\|", line)]
    return [[cell.strip() for cell in row] for row in rows]


def named(text):
    """Every `file.py::test_name` in a text."""
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)


def functions(file):
    path = HERE / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_each_pitfall_has_one_row_with_a_test_and_no_empty_cell():
    rows = ledger()
    assert [int(number) for number, *_ in rows] == [*PITFALLS]
    for row in rows:
        assert len(row) == 4 and all(row), row
        assert named(row[-1]), f"row {row[0]} names no test"


def test_every_test_that_the_page_names_is_there():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    missing = [(file, name) for file, name in named(text) if name not in functions(file)]
    assert not missing and len(named(text)) > 60
    assert text.count("::") == len(named(text))  # none is spelled so that nobody checks it


def test_every_file_of_tests_is_described():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(test_\w+\.py)`", text))
    assert described == {path.name for path in HERE.glob("test_*.py")}


# --- models to plant pitfalls in ---

TINY = GPTConfig(vocab_size=11, n_positions=20, n_layer=1, n_head=2, n_embd=16)
EOS, PAD = 9, 10
PROMPTS = [[1], [2, 4, 5], [6, 7], [8, 0, 1, 2]]
CFG = PPOConfig(device="cpu", dtype="float32", batch_size=4, steps=2, max_new_tokens=8)


def three_models():
    """A policy, a reference some way off, and a critic."""
    torch.manual_seed(0)
    policy, critic = GPT(TINY), ScalarGPT(TINY)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.transformer.wte.weight += 0.1 * torch.randn(11, 16)
    return policy, reference, critic


def length(tokens, prompt_len, mask):
    return mask.sum(1).float()


def roll(models, cfg=CFG, score=length):
    torch.manual_seed(1)
    return collect(*models, score, PROMPTS, cfg, cfg.kl_coef, EOS, PAD)


def weights(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def plain_steps(policy, critic, lr=0.0):
    networks = dict(policy_optimizer=policy, critic_optimizer=critic)
    return {name: torch.optim.SGD(model.parameters(), lr=lr) for name, model in networks.items()}


class Enough(Exception):
    """What a test raises to leave a run when it has seen what it came for."""


# --- data and models (1 to 12) ---


def test_sampled_tokens_are_never_read_back_from_text(monkeypatch):
    """An untrained model writes what no tokenizer would: reading the text back gives other ids."""
    tok, batches, real = tokenizer.learn(environment.prompts(50), 300), [], generate.generate
    torch.manual_seed(0)
    model = GPT(GPTConfig(tok.vocab_size, n_positions=96, n_layer=1, n_head=2, n_embd=16)).eval()
    prompts = [tok.encode(p) for p in environment.prompts(20)]
    monkeypatch.setattr(generate, "generate", lambda *a: batches.append(real(*a)) or batches[-1])
    rows = generate.generate_rows(model, prompts, 12, tok.eos, tok.pad, batch_size=8)
    assert len(batches) == 3
    drawn = [
        tokens[n : n + kept.sum()].tolist() for batch in batches for tokens, n, kept in zip(*batch)
    ]
    assert rows == [(p + r, len(p)) for p, r in zip(prompts, drawn, strict=True)]
    plain = [[t for t in response if t not in (tok.eos, tok.pad)] for response in drawn]
    assert sum(tok.encode(tok.decode(response)) != response for response in plain) > 15


def test_a_fresh_head_says_numbers_of_the_order_of_one():
    torch.manual_seed(0)
    heads = [ScalarGPT(dataclasses.replace(TINY, n_embd=c)).score for c in (512, 512, 64)]
    for head, c in zip(heads, (512, 512, 64), strict=True):
        assert head.bias is None and head.weight.shape == (1, c)
        scaled = (head.weight.double() ** 2).sum().item() * (c + 1)  # chi-square, c degrees
        assert abs(scaled - c) < 4 * math.sqrt(2 * c)
    assert not torch.equal(heads[0].weight, heads[1].weight)


class Notes(RunLog):
    """A log that only remembers."""

    def write(self, step, **metrics):
        self.__dict__.setdefault("rows", []).append(metrics)


def test_each_comparison_is_seen_once_at_a_rate_that_falls_to_zero(monkeypatch):
    rng, seen, real = random.Random(0), [], loop.step
    pairs = [tuple(([i % 9, rng.randrange(9), EOS], 1) for _ in "ab") for i in range(9)] * 20
    groups = [([a, b], [(0, 1)]) for a, b in pairs]
    monkeypatch.setattr(loop, "step", lambda f, batch, *a: seen.extend(batch) or real(f, batch, *a))
    cfg, log = RMConfig(device="cpu", dtype="float32", batch_size=4, learning_rate=1e-3), Notes()
    monkeypatch.setattr(reward, "FEWEST", 1)  # only fewer are seen several times
    reward.train(ScalarGPT(TINY), groups, PAD, cfg, log)
    assert sorted(seen) == sorted(groups)  # one pass
    rates = [row["lr"] for row in log.rows]  # of the trunk; the head's is ten times that
    assert rates == pytest.approx([1e-3 * min((i + 1) / 20, 1 - i / 45) for i in range(45)])


# --- sampling (13 to 17) ---


def test_the_kl_of_what_is_sampled_is_the_kl_and_truncation_would_show():
    """A thousand tokens and a policy flatter than its reference. Were only the 50 likeliest drawn,
    k1 would be negative on average."""
    torch.manual_seed(0)
    reference = torch.randn(1000)
    policy = 0.6 * reference
    logp, ref = policy.log_softmax(-1), reference.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    noise = (logp.exp() * (logp - ref - exact) ** 2).sum().sqrt()
    top_50 = policy.masked_fill(policy < policy.topk(50).values[-1], float("-inf"))
    n, kl = 20_000, []
    for logits in policy, top_50:
        drawn = sample(logits.expand(n, -1), 1.0, torch.rand(n, 1, dtype=torch.float64))
        kl.append(kl_k1(logp[drawn], ref[drawn]).mean())
    assert abs(kl[0] - exact) < 3 * noise / n**0.5
    assert exact > 20 * noise / n**0.5 and kl[1] < -exact  # the test can tell


@pytest.mark.parametrize("flag", ["--top-k", "--top-p"])
def test_there_is_no_way_to_truncate_what_ppo_samples(flag):
    with pytest.raises(UserError, match=f"{flag} is not a flag"):
        config.parse(PPOConfig, [flag, "50"])


# --- the update (18 to 32) ---


def test_in_bfloat16_the_first_ratio_is_one_though_the_sampler_rounds_otherwise(monkeypatch):
    """Old log-probs come from the update's own forward pass, and not from the sampler's."""
    models, cfg = three_models(), dataclasses.replace(CFG, dtype="bfloat16")
    rollout = roll(models, cfg)
    in_float32 = ppo.response_logprobs(
        models[0], rollout.tokens, rollout.prompt_len, rollout.mask.shape[1]
    )
    gap = (in_float32 - rollout.old_logprobs)[rollout.mask].abs().max().item()
    assert 1e-4 < gap < 0.1
    optimizers = plain_steps(models[0], models[2])
    one = dataclasses.replace(cfg, epochs=1, minibatches=1)
    metrics = update(models[0], models[2], optimizers, rollout, one)
    assert metrics["approx_kl"] < 1e-9 and metrics["clip_frac"] == 0


def test_minibatches_take_advantages_as_they_are(monkeypatch):
    """Whitened over the whole rollout; a minibatch is not whitened again by itself."""
    models, seen, real = three_models(), [], ppo.policy_loss
    rollout = roll(models)
    monkeypatch.setattr(ppo, "policy_loss", lambda *given: seen.append(given[2]) or real(*given))
    optimizers = plain_steps(models[0], models[2])
    update(models[0], models[2], optimizers, rollout, dataclasses.replace(CFG, epochs=1))
    assert len(seen) == 2
    assert sorted(torch.cat(seen).tolist()) == sorted(rollout.advantages.tolist())


def caught(monkeypatch, models):
    """The optimizers as ppo.train hands them to its first update."""
    given = []

    def stop(*arguments):
        given.extend(arguments)
        raise Enough

    monkeypatch.setattr(ppo, "update", stop)
    with pytest.raises(Enough):
        ppo.train(*models, length, PROMPTS, EOS, PAD, CFG, RunLog())
    return given[2]


def test_the_optimizers_are_adam_with_the_epsilon_and_betas_of_ppo(monkeypatch):
    """Two steps of each by hand: with epsilon 1e-5, a gradient of 1e-5 moves half as far."""
    models = three_models()
    optimizers = caught(monkeypatch, models)
    assert [*optimizers] == ["policy_optimizer", "critic_optimizer"]
    for model, optimizer in zip(models[::2], optimizers.values(), strict=True):
        [group], w = optimizer.param_groups, model.transformer.wpe.weight
        assert len(group["params"]) == len(list(model.parameters()))
        group["lr"], before = 0.1, w.detach().clone()
        w.grad = torch.full_like(w, 1e-5)
        optimizer.step()
        assert torch.allclose(w - before, torch.tensor(-0.05), atol=1e-6)
        before, w.grad = w.detach().clone(), torch.full_like(w, -3.0)
        optimizer.step()
        m = (0.9 * 0.1 * 1e-5 - 0.1 * 3) / (1 - 0.9**2)
        v = (0.95 * 0.05 * 1e-10 + 0.05 * 9) / (1 - 0.95**2)
        expected = torch.tensor(-0.1 * m / (v**0.5 + 1e-5))
        assert torch.allclose(w - before, expected, atol=1e-6)  # and no weight decay in it


ROWS = [([1, 2, 3, EOS], 1), ([4, 5, 6, 7, EOS], 2)]


def update_of_sft(model):
    cfg = SFTConfig(device="cpu", dtype="float32", steps=1, batch_size=2, save_every=9)
    sft.train(model, ROWS, ROWS, PAD, cfg, RunLog())


def update_of_reward(model):
    cfg = RMConfig(device="cpu", dtype="float32", steps=1, batch_size=2)
    reward.train(model, [(ROWS, [(0, 1)])], PAD, cfg, RunLog())


def update_of_ppo(model):
    _, reference, critic = three_models()
    rollout = roll((model, reference, critic))
    step(model, critic, plain_steps(model, critic, lr=0.1), rollout, CFG)


@pytest.mark.parametrize(
    "update_once, kind",
    [(update_of_sft, GPT), (update_of_reward, ScalarGPT), (update_of_ppo, GPT)],
)
def test_stale_gradients_do_not_reach_the_next_step(update_once, kind, monkeypatch):
    monkeypatch.setattr("nanorlhf.support.checkpoint.save_state", lambda *_, **__: None)
    learnt = []
    for stale in None, 100.0:
        torch.manual_seed(0)
        model = kind(TINY)
        for w in model.parameters():
            w.grad = stale and torch.full_like(w, stale)
        before = weights(model)
        update_once(model)
        learnt.append(weights(model))
        assert not torch.equal(learnt[-1], before)
    assert torch.equal(*learnt)


def test_approx_kl_is_the_kl_from_the_old_policy_to_the_new():
    """Exact where the old policy is uniform and each token stands once; the swap is another one."""
    torch.manual_seed(0)
    new = torch.randn(1, 50).log_softmax(-1)
    old = torch.full((1, 50), -math.log(50))
    batch = SimpleNamespace(old_logprobs=old, mask=torch.ones(1, 50).bool())
    found = diagnose(new, batch, 0.2)["approx_kl"]
    assert found.item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-5)
    assert abs(found - (new.exp() * (new - old)).sum()) > 0.05


def test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric():
    models = three_models()
    rollout = roll(models)
    mask = rollout.mask
    assert (~mask).sum() > 3
    names = "old_logprobs ref_logprobs entropy old_values rewards advantages returns".split()
    found = []
    for garbage in None, 3.0, -50.0, 1e5, float("nan"):
        spoilt = copy.deepcopy(rollout)
        logprobs = rollout.old_logprobs + 0.3 * torch.sin(torch.arange(mask.numel())).view_as(mask)
        if garbage is not None:
            logprobs = logprobs.masked_fill(~mask, 0.1 * garbage)
            for i, name in enumerate(names):
                getattr(spoilt, name)[~mask] = garbage + i
        logprobs.requires_grad_()
        loss = policy_loss(logprobs, spoilt.old_logprobs, spoilt.advantages, mask)
        loss.backward()
        assert (logprobs.grad[~mask] == 0).all() and logprobs.grad[mask].any()
        numbers = summarise(spoilt) | diagnose(logprobs.detach(), spoilt, 0.2)
        found.append(torch.tensor([loss.item(), *numbers.values()]))
    assert all(torch.allclose(found[0], other) for other in found)
    assert 0 < found[0][list(numbers).index("clip_frac") + 1] < 1
    assert found[0][list(numbers).index("ratio_gap") + 1] > 0.1


# --- KL (33 to 39) ---


def test_the_price_is_adapted_to_the_kl_summed_over_a_response(monkeypatch):
    asked, rollouts, real = [], [], ppo.update
    monkeypatch.setattr(ppo, "adapt", lambda coef, kl, cfg: asked.append(kl) or coef)
    monkeypatch.setattr(ppo, "update", lambda *a: rollouts.append(a[3]) or real(*a))
    ppo.train(*three_models(), length, PROMPTS, EOS, PAD, CFG, RunLog())
    for kl, rollout in zip(asked, rollouts, strict=True):
        gaps = (rollout.old_logprobs - rollout.ref_logprobs).masked_fill(~rollout.mask, 0)
        assert kl == pytest.approx(gaps.sum().item() / 4, rel=1e-5)
        assert abs(kl) > 1.5 * abs(gaps[rollout.mask].mean())  # and not the mean over tokens


@pytest.mark.parametrize("batch_size", [32, 64, 256])
def test_the_price_moves_in_proportion_to_the_responses_that_were_seen(batch_size):
    cfg = PPOConfig(kl_target=6.0, batch_size=batch_size)
    assert ppo.adapt(1.0, 6.6, cfg) == pytest.approx(1 + 0.01 * batch_size / 64)
    assert ppo.adapt(1.0, 600.0, cfg) == pytest.approx(1 + 0.02 * batch_size / 64)  # held at 20 %


def test_a_policy_that_has_not_moved_is_at_no_distance():
    policy, _, critic = three_models()
    rollout = roll((policy, copy.deepcopy(policy), critic))
    numbers = summarise(rollout)
    assert numbers["kl"] == 0 and numbers["kl_k3"] == 0
    assert torch.equal(rollout.rewards.sum(1), rollout.scores)


def start_of_ppo(monkeypatch, tmp_path, **settings):
    """train_ppo.py as far as ppo.train. -> the tokenizer, the SFT and the reward model that were
    saved, and what ppo.train is given"""
    tok, given = tokenizer.learn(environment.prompts(50), 300), []
    shape = GPTConfig(tok.vocab_size, n_positions=64, n_layer=1, n_head=2, n_embd=16)
    saved = GPT(shape), ScalarGPT(shape)
    for model, name in zip(saved, ("sft", "rm"), strict=True):
        model.save(tmp_path / name)
        tok.save(tmp_path / name)

    def stop(*arguments):
        given.extend(arguments)
        raise Enough

    monkeypatch.setattr(ppo, "train", stop)
    monkeypatch.setattr(train_ppo, "setup", lambda cfg: torch.device("cpu"))
    folders = {name: str(tmp_path / name) for name in ("sft", "rm")}
    cfg = PPOConfig(
        out=str(tmp_path / "out"), prompts=8, eval_prompts=3, max_new_tokens=8, dtype="float32",
        **folders, **settings,
    )  # fmt: skip
    with pytest.raises(Enough):
        train_ppo.main(cfg)
    return tok, saved, given


def test_ppo_starts_from_sft_stays_near_sft_and_asks_the_reward_model(monkeypatch, tmp_path):
    """The reference is the SFT model. The critic begins as the reward model, and then goes its own
    way: the one that scores is another copy."""
    tok, saved, given = start_of_ppo(monkeypatch, tmp_path)
    policy, reference, critic, score = given[:4]
    assert torch.equal(weights(policy), weights(saved[0]))
    assert torch.equal(weights(reference), weights(saved[0]))
    assert torch.equal(weights(critic), weights(saved[1]))

    batch = collate([([1, 2, 3, tok.eos], 2)], tok.pad)
    expected = reward.score(saved[1], *batch)
    with torch.no_grad():
        for model in policy, critic:
            for w in model.parameters():
                w += 1
        assert torch.equal(weights(reference), weights(saved[0]))
        assert torch.equal(score(*batch), expected)


def test_ppo_never_trains_on_a_prompt_that_is_held_out(monkeypatch, tmp_path):
    records = [dict(prompt=f"question {i}") for i in range(100)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tok, _, given = start_of_ppo(monkeypatch, tmp_path, data=[str(file)])
    train, held_out = split(records)
    assert {tok.decode(tokens) for tokens in given[4]} == {record["prompt"] for record in train}
    assert held_out


# --- memory (40) ---


def test_the_language_head_is_run_on_response_positions_alone(monkeypatch):
    widths, real = [], GPT.head
    models = three_models()
    monkeypatch.setattr(GPT, "head", lambda m, h: widths.append(h.shape[1:-1]) or real(m, h))
    rollout = roll(models)
    R = rollout.mask.shape[1]
    sampled, scored = widths[:-4], widths[-4:]  # policy and reference, in two parts
    assert set(sampled) == {()} and scored == [(R,)] * 4  # one position a step; then R
    assert rollout.tokens.shape[1] > R + 2  # prompts, too, have positions
    widths.clear()
    optimizers = plain_steps(models[0], models[2])
    update(models[0], models[2], optimizers, rollout, CFG)
    assert set(widths) == {(R,)}
    widths.clear()
    sft.loss(models[0], *collate(ROWS, PAD))
    assert widths == [(3,)]
