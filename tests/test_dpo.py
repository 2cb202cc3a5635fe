"""Preferences straight into a policy: the loss, its gradient, what is learnt, and the command."""

import copy
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import dpo, environment, reward, tokenizer
from nanorlhf.dpo import DPOConfig, dpo_loss, implicit_reward, loss_of, whole_logprobs
from nanorlhf.generate import generate_rows
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.reward import compare_samples
from nanorlhf.support.data import collate
from nanorlhf.support.runlog import RunLog, read
from nanorlhf.support.stats import interval

TINY = GPTConfig(vocab_size=12, n_positions=16, n_layer=1, n_head=2, n_embd=16)
LIKED, EOS, PAD = 3, 9, 11
CFG = DPOConfig(device="cpu", dtype="float32", batch_size=4, learning_rate=3e-3, beta=0.1)


def new_policy(**changes):
    torch.manual_seed(0)
    return GPT(dataclasses.replace(TINY, **changes))


def apart():
    """A policy and a reference that disagree."""
    torch.manual_seed(0)
    return GPT(TINY).eval(), GPT(TINY).eval()


def report(policy, reference, groups, beta=CFG.beta):
    """What the command says of held-out comparisons. -> metrics, the margin of each pair"""
    learnt = implicit_reward(policy, reference, beta)
    return reward.report(learnt, groups, PAD, policy.device, "float32")


def toy_comparisons(n, seed):
    """Three responses a prompt, compared each with each: the more of one token, the better."""
    rng, groups = random.Random(seed), []
    for _ in range(n):
        prompt = [rng.randrange(11), rng.randrange(11)]
        liked = rng.sample(range(5), 3)
        rows = [(prompt + [LIKED] * k + [5] * (4 - k) + [EOS], 2) for k in liked]
        first, second, third = sorted(range(3), key=lambda i: -liked[i])
        groups.append((rows, [(first, second), (first, third), (second, third)]))
    return groups


# --- the loss ---


def test_the_loss_by_hand():
    # Implicit rewards ln 3 and 0, then 0 and ln 7: probabilities 3/4 and 1/8 of what was chosen.
    log3, log7 = math.log(3), math.log(7)
    logprobs = torch.tensor([[-4 + 2 * log3, -9.0], [-5.0, -6 + 2 * log7]]).double()
    ref_logprobs = torch.tensor([[-4.0, -9.0], [-5.0, -6.0]]).double()
    loss = dpo_loss(*logprobs, *ref_logprobs, beta=0.5)
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 8)) / 2, abs=1e-7)


def test_only_margins_count():
    logprobs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    loss = dpo_loss(*logprobs)
    for together in (0, 1), (2, 3), (0, 2), (1, 3):  # both of a model, or both of a response
        shifted = logprobs.clone()
        shifted[list(together)] += 100
        assert dpo_loss(*shifted).item() == pytest.approx(loss.item(), abs=1e-9)


def test_where_policy_and_reference_agree_the_loss_is_ln_2_and_the_gradient_half_of_beta():
    same = torch.tensor([-20.0, -30.0, -7.0]).double()
    chosen, rejected = same.clone().requires_grad_(), (same - 5).requires_grad_()
    loss = dpo_loss(chosen, rejected, same, same - 5, beta=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-9)
    # Down the gradient, the chosen become likelier and the rejected less so: 0.3 / 2, over three.
    assert chosen.grad.tolist() == pytest.approx([-0.05] * 3, abs=1e-9)
    assert rejected.grad.tolist() == pytest.approx([0.05] * 3, abs=1e-9)


# --- whole responses ---


def test_the_log_prob_of_a_response_is_the_sum_over_its_tokens_and_no_others():
    policy = new_policy().double().eval()
    rows = [([1, 2, 3, 4, 5], 2), ([6, 7], 1), ([8, 9, 10, 1], 1)]
    found = whole_logprobs(policy, *collate(rows, PAD))
    for (tokens, prompt_len), logprob in zip(rows, found, strict=True):
        said = policy(torch.tensor([tokens])).log_softmax(-1)[0]
        slow = sum(said[t - 1, tokens[t]].item() for t in range(prompt_len, len(tokens)))
        assert logprob.item() == pytest.approx(slow, abs=1e-9)


def test_the_metrics_are_those_of_a_slow_loop_over_the_pairs():
    policy, reference = (model.double() for model in apart())
    groups = toy_comparisons(5, 1)
    groups[0][1].pop()  # prompts differ in their comparisons

    def implicit(row):
        batch = collate([row], PAD)
        return 0.3 * (whole_logprobs(policy, *batch) - whole_logprobs(reference, *batch)).item()

    pairs = [(implicit(rows[i]), implicit(rows[j])) for rows, wins in groups for i, j in wins]
    assert len(pairs) == 14
    right = sum(chosen > rejected for chosen, rejected in pairs)
    expected = dict(
        loss=sum(math.log1p(math.exp(rejected - chosen)) for chosen, rejected in pairs) / 14,
        accuracy=right / 14,
        margin=sum(chosen - rejected for chosen, rejected in pairs) / 14,
        chosen_reward=sum(chosen for chosen, _ in pairs) / 14,
        rejected_reward=sum(rejected for _, rejected in pairs) / 14,
    )
    loss, metrics = loss_of(policy, reference, groups, PAD, beta=0.3)
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, abs=1e-9)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-9)

    low, high = interval(right, 14)
    found, margin = report(policy, reference, groups, beta=0.3)
    assert margin.tolist() == pytest.approx([chosen - rejected for chosen, rejected in pairs])
    expected = dict(
        held_out_loss=expected["loss"],
        accuracy=right / 14,
        accuracy_low=low,
        accuracy_high=high,
        pairs=14,
        length_accuracy=0.5,  # here all responses are of one length
    )
    assert found == pytest.approx(expected, abs=1e-9)


def test_before_the_first_step_the_policy_has_no_opinion():
    policy = new_policy().eval()
    found, margin = report(policy, copy.deepcopy(policy), toy_comparisons(5, 1))
    assert found["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["accuracy"] == 0.5 and not margin.any()


def one_step(**changes):
    """One step on one pair. -> implicit rewards of the chosen and of the rejected, and how far the
    weight that moved most has moved"""
    policy, groups = new_policy(), toy_comparisons(1, 1)
    groups[0][1][1:] = []
    reference = copy.deepcopy(policy)
    cfg = dataclasses.replace(CFG, steps=1, **changes)
    dpo.train(policy, reference, groups, PAD, cfg, RunLog())
    moves = [(a - b).abs().max() for a, b in zip(policy.parameters(), reference.parameters())]
    with torch.no_grad():
        found = loss_of(policy, reference, groups, PAD, cfg.beta)[1]
    return found["chosen_reward"], found["rejected_reward"], max(moves).item()


def test_a_step_makes_the_chosen_likelier_and_the_rejected_less_so():
    chosen, rejected, _ = one_step()
    assert chosen > 0 > rejected


def test_a_step_is_as_long_as_its_settings_allow():
    # Adam's first step is as long as the rate, which warms up over 20 steps.
    assert one_step()[-1] == pytest.approx(CFG.learning_rate / 20, rel=1e-3)
    assert one_step(grad_clip=0.0)[-1] == 0


# --- it learns ---


def diary(cfg):
    """A log with a folder if the test has given one; without, nothing is saved."""
    return RunLog(cfg.out if Path(cfg.out).is_absolute() else None)


def learn(cfg, log=None, groups=None):
    """-> policy, its reference, summary. With dropout, which training has to switch off."""
    policy = new_policy(dropout=0.1)
    reference = copy.deepcopy(policy)
    groups = groups or toy_comparisons(200, 1)
    return policy, reference, dpo.train(policy, reference, groups, PAD, cfg, log or diary(cfg))


def test_it_learns_a_known_order_and_says_what_is_liked():
    policy, reference, summary = learn(CFG)
    assert summary["steps"] == 50  # one pass: 200 prompts, four an update
    assert summary["tokens"] == 200 * 3 * 7
    assert report(policy, reference, toy_comparisons(100, 2))[0]["accuracy"] > 0.9

    shares = []
    for model in reference, policy:
        torch.manual_seed(1)
        rows = generate_rows(model, [[1, 2]] * 200, 4, EOS, PAD)
        said = [tokens[n:] for tokens, n in rows]
        shares.append(sum(r.count(LIKED) for r in said) / sum(map(len, said)))
    assert shares[0] < 0.2 and shares[1] > 2 * shares[0]


def test_the_reference_stays_where_it_was():
    _, reference, _ = learn(dataclasses.replace(CFG, steps=2))
    untouched = new_policy().parameters()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), untouched, strict=True))
    assert all(p.grad is None for p in reference.parameters())


class Notes(RunLog):
    def write(self, step, **metrics):
        self.__dict__.setdefault("rows", []).append({k: float(x) for k, x in metrics.items()})


def test_the_first_line_of_the_log_says_that_nothing_has_been_learnt():
    log = Notes()
    learn(CFG, log)
    assert log.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (log.rows[0]["accuracy"], log.rows[0]["margin"]) == (0.5, 0)
    rates = [row["lr"] for row in log.rows]
    assert rates[0] == pytest.approx(CFG.learning_rate / 20) and max(rates[20:]) == rates[20]
    assert rates[-1] == pytest.approx(CFG.learning_rate / 50)


@pytest.mark.parametrize("size", [1, 3])
def test_how_the_prompts_are_split_to_fit_into_memory_changes_nothing(size):
    """Prompts differ in their comparisons, so that a mean of means would be another number."""
    groups = [(rows, wins[: 1 + i % 3]) for i, (rows, wins) in enumerate(toy_comparisons(12, 1))]
    found = []
    for micro_batch_size in 0, size:
        log = Notes()
        cfg = dataclasses.replace(CFG, micro_batch_size=micro_batch_size)
        *_, summary = learn(cfg, log, groups)
        found.append((log.rows, summary))
    assert found[0][1] == found[1][1]
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        assert parts == pytest.approx(whole, abs=1e-4)


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    cfg = dataclasses.replace(CFG, steps=9, save_every=5, out=str(tmp_path))
    policy, _, summary = learn(cfg)
    with pytest.raises(KeyboardInterrupt):
        learn(cfg, Interrupted(tmp_path))
    again, _, summary_again = learn(dataclasses.replace(cfg, resume=True))
    assert summary == summary_again and summary["steps"] == 9
    weights = zip(policy.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


# --- comparisons ---


def test_annotators_who_never_err_choose_by_the_true_reward():
    tok = tokenizer.learn(environment.prompts(50), 400)
    torch.manual_seed(0)
    sft = GPT(GPTConfig(tok.vocab_size, 160, n_layer=1, n_head=2, n_embd=16)).eval()
    cfg = dataclasses.replace(
        CFG, annotator_temperature=0.0, max_new_tokens=12, near_misses=False
    )
    groups, ceiling = compare_samples(sft, tok, 6, 3, cfg, held_out=False)
    margins = []
    for prompt, (rows, wins) in zip(environment.prompts(6, cfg.seed), groups, strict=True):
        assert len(rows) == len(wins) == 3
        assert {tok.decode(tokens[:n]) for tokens, n in rows} == {prompt}
        gold = [environment.gold(prompt, tok.decode(tokens[n:])) for tokens, n in rows]
        margins += [gold[i] - gold[j] for i, j in wins]
    assert min(margins) >= 0 and max(margins) > 0.1
    assert ceiling == pytest.approx(sum(1 if m else 0.5 for m in margins) / 18)


# --- the command ---

ROOT = Path(__file__).parents[1]
SFT = (
    "train_sft.py --steps 3 --device cpu --dtype float32 --demos 150 --vocab-size 300 --n-layer 1"
    " --n-head 2 --n-embd 16 --batch-size 4"
)
DPO = (
    "-m nanorlhf.dpo --steps 3 --device cpu --dtype float32 --prompts 6 --responses 3"
    " --held-out-prompts 8 --max-new-tokens 12 --save-every 2"
)


def command(folder, words):
    """Run a command in a folder. -> status, standard output, standard error"""
    script, *flags = words.split()
    done = subprocess.run(
        [sys.executable, ROOT / script if script.endswith(".py") else script, *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder where a tiny model has been through SFT and DPO; and what the latter printed."""
    folder = tmp_path_factory.mktemp("workshop")
    for words in SFT, DPO:
        status, printed, errors = command(folder, words)
        assert status == 0, errors
    return folder, printed


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_command_leaves_a_policy_and_its_diary(workshop):
    folder, printed = workshop
    out = folder / "out" / "dpo"
    names = {path.name for path in out.iterdir()}
    assert names >= {"settings.json", "log.jsonl", "samples.md", "curves.png", "state.pt"}
    tok = tokenizer.load(out)
    assert GPT.load(out).config.vocab_size == tok.vocab_size
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tok.eos, tok.pad)
    page = (out / "samples.md").read_text()
    assert page.count("**after**") == 3
    assert all(prompt in page for prompt in environment.prompts(3, seed=1, held_out=True))
    assert "next: python -m nanorlhf.evaluate --policy out/dpo --against out/sft" in printed


def test_the_summary_holds_every_promised_number(workshop):
    out = workshop[0] / "out" / "dpo"
    found = summary_of(out)
    promised = "held_out_loss accuracy accuracy_low accuracy_high accuracy_ceiling"
    assert found.keys() >= {"seconds", "steps", "tokens", *promised.split()}
    assert found["steps"] == len(read(out)) == 3 and found["tokens"] > 0 and found["pairs"] == 8
    assert 0 <= found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] <= 1
    assert 0.5 <= found["accuracy_ceiling"] <= 1
    assert read(out)[0]["margin"] == 0 != read(out)[-1]["margin"]  # it has left its reference


def test_the_same_command_can_be_run_again_or_resumed_and_gives_the_same(workshop):
    folder, _ = workshop
    before = summary_of(folder / "out" / "dpo") | {"seconds": 0}
    for words in DPO, DPO + " --resume":
        status, _, errors = command(folder, words)
        assert status == 0, errors
        assert summary_of(folder / "out" / "dpo") | {"seconds": 0} == before


def test_other_settings_do_not_overwrite_a_run(workshop):
    out = workshop[0] / "out" / "dpo"
    before = {p: p.read_bytes() for p in out.iterdir()}
    status, _, errors = command(workshop[0], DPO + " --beta 0.5")
    assert status == 2 and errors.count("\n") == 1
    assert "out/dpo holds a run with other settings (beta 0.1 there, 0.5 here)" in errors
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_preferences_can_come_from_a_file(workshop):
    folder, _ = workshop
    lines = [
        dict(prompt=prompt, chosen="A happy fox ran home.", rejected=f"No {n}.")
        for n, prompt in enumerate(environment.prompts(40))
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, printed, errors = command(folder, DPO + " --data mine.jsonl --out out/mine")
    assert status == 0, errors
    assert "data      40 records" in printed
    found = summary_of(folder / "out" / "mine")
    assert 1 <= found["pairs"] < 40 and "accuracy_ceiling" not in found


def test_a_model_that_is_nowhere_is_one_line_and_leaves_nothing_in_the_way(workshop):
    status, _, errors = command(workshop[0], DPO + " --sft nowhere --out out/none")
    assert status == 2 and errors.count("\n") == 1 and "nowhere is no checkpoint" in errors
    assert not (workshop[0] / "out" / "none").exists()
