"""The studies: what best-of-n is, what the laws say, and that no run is made twice or lost."""

import itertools
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_world import best_of_n_kl

from nanorlhf import environment, reward, tokenizer
from nanorlhf.experiments import claims, frontier, knobs, overoptimise, study
from nanorlhf.experiments.frontier import best_of_n
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.ppo import PPOConfig
from nanorlhf.support import UserError, plotting

# --- best of n ----------------------------------------------------------------------------------


def by_enumeration(scores, n):
    """How often each is the best of n, over all draws; those that tie for it share."""
    chance = [0.0] * len(scores)
    draws = list(itertools.product(range(len(scores)), repeat=n))
    for draw in draws:
        best = max(scores[i] for i in draw)
        # Of equal ones that were drawn or might have been, none is preferred.
        tied = [i for i, score in enumerate(scores) if score == best]
        for i in tied:
            chance[i] += 1 / len(tied) / len(draws)
    return chance


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("scores", [[1.0, 4.0, 2.0, 3.0], [1.0, 2.0, 2.0, 0.0], [5.0] * 4])
def test_the_best_of_n_is_as_likely_as_all_draws_say(scores, n):
    found = best_of_n(torch.tensor([scores]), n)[0]
    assert found.tolist() == pytest.approx(by_enumeration(scores, n), abs=1e-12)


def estimated_kl(chance):
    return torch.xlogy(chance, chance * chance.shape[1]).sum(1).mean().item()


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_estimated_kl_comes_to_the_exact_one_in_a_large_pool(n):
    scores = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[None].float()
    assert estimated_kl(best_of_n(scores, n)) == pytest.approx(best_of_n_kl(n), abs=0.002)


def test_ties_make_the_kl_smaller_than_the_formula():
    scores = torch.tensor([[0.0] * 50 + [1.0] * 50])
    worse = 2**-8  # the chance that all eight come from the lower half
    exact = worse * math.log(2 * worse) + (1 - worse) * math.log(2 * (1 - worse))
    assert estimated_kl(best_of_n(scores, 8)) == pytest.approx(exact)
    assert exact < best_of_n_kl(8)
    assert estimated_kl(best_of_n(torch.zeros(1, 100), 8)) == pytest.approx(0, abs=1e-9)


# --- many at a time ------------------------------------------------------------------------------

COLUMNS = "method", "seed", "kl"


def leave_a_mark(folder, method, seed):
    with open(folder / "calls", "a") as file:
        file.write(f"{method} {seed}\n")
    return [dict(method=method, seed=seed, kl=seed / 3, unasked="for")]


def fail():
    raise UserError("expected luck, came none")


def jobs_for(folder, *keys):
    return {key: partial(leave_a_mark, folder, *key) for key in keys}


def calls(folder):
    return sorted((folder / "calls").read_text().splitlines())


@pytest.fixture
def one_core(monkeypatch):
    """Every worker imports PyTorch anew."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_an_interrupted_study_makes_only_the_rows_that_are_missing(tmp_path, one_core):
    path, keys = tmp_path / "rows.csv", ("method", "seed")
    first = study.carry_out(jobs_for(tmp_path, ("ppo", 1), ("dpo", 1)), path, COLUMNS, keys)
    every = jobs_for(tmp_path, ("ppo", 1), ("dpo", 1), ("ppo", 2))
    second = study.carry_out(every, path, COLUMNS, keys)
    assert calls(tmp_path) == ["dpo 1", "ppo 1", "ppo 2"]
    assert {(row["method"], row["seed"]) for row in second} == set(every) and len(first) == 2
    assert path.read_text().splitlines()[0] == "method,seed,kl"
    assert all(row["kl"] == pytest.approx(row["seed"] / 3, rel=1e-5) for row in second)


def test_what_ended_before_a_failure_is_kept(tmp_path, one_core):
    path, keys = tmp_path / "rows.csv", ("method", "seed")
    study.carry_out(jobs_for(tmp_path, ("ppo", 1)), path, COLUMNS, keys)
    with pytest.raises(UserError, match="expected luck"):
        study.carry_out({("bad", 1): fail}, path, COLUMNS, keys)
    assert [row["method"] for row in study.read_csv(path)] == ["ppo"]


def test_intervals_are_students(tmp_path):
    rng = random.Random(0)
    for n in range(2, 10):
        xs = [rng.gauss(0, 1) for _ in range(n)]
        low, high = stats.t.interval(0.95, n - 1, np.mean(xs), stats.sem(xs))
        centre, half = study.mean_and_half_width(xs)
        assert (centre - half, centre + half) == pytest.approx((low, high), rel=0.01, abs=0.01)
    assert math.isnan(study.mean_and_half_width([1.0])[1])


# --- the laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", overoptimise.LAWS)
def test_a_law_is_found_again_in_numbers_that_follow_it(name):
    kl, decline = np.linspace(0.5, 40, 30), overoptimise.LAWS[name]
    d = np.sqrt(kl)
    a, b, r2 = overoptimise.fit_law(kl, d * (1.5 - 0.4 * decline(d)), decline)
    assert (a, b, r2) == pytest.approx((1.5, 0.4, 1.0))


def test_a_law_says_how_much_it_leaves_unexplained():
    kl = np.linspace(0.5, 40, 200)
    gain = np.random.default_rng(0).normal(size=200)  # no law at all
    assert overoptimise.fit_law(kl, gain, np.log)[2] < 0.1


# --- from end to end -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The smallest SFT model and reward model of the built-in world, untrained."""
    folder = tmp_path_factory.mktemp("start")
    texts = [r["prompt"] + r["response"] for r in environment.demonstrations(100)]
    tok = tokenizer.learn(texts, 300)
    torch.manual_seed(0)
    shape = GPTConfig(tok.vocab_size, 192, n_layer=1, n_head=1, n_embd=8)
    for name, kind in dict(sft=GPT, rm=ScalarGPT).items():
        kind(shape).save(folder / name, **tok.special)
        tok.save(folder / name)
    return folder


def config(start, tmp_path, **settings):
    tiny = dict(seeds=1, prompts=4, eval_prompts=2, steps=1, device="cpu", dtype="float32")
    folders = dict(sft=f"{start}/sft", rm=f"{start}/rm", out=str(tmp_path))
    return study.StudyConfig(**tiny | folders | settings)


def test_the_frontier_has_every_method_at_every_place_of_its_dial(start, tmp_path):
    flags = f"--sft {start}/sft --rm {start}/rm --out {tmp_path}/f --seeds 1 --prompts 4".split()
    flags += "--eval-prompts 2 --steps 1 --device cpu --dtype float32".split()
    words = [sys.executable, "-m", "nanorlhf.experiments.frontier", *flags]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    rows = study.read_csv(tmp_path / "f" / "frontier.csv")
    assert list(rows[0]) == ["method", "dial", "seed", "kl", "gold", "win_rate"]
    expected = {(m, float(dial)) for m, (_, dials) in frontier.METHODS.items() for dial in dials}
    assert {(row["method"], row["dial"]) for row in rows} == expected
    assert (tmp_path / "f" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    sft = next(row for row in rows if row["method"] == "sft")
    assert sft["kl"] == 0 and sft["win_rate"] == 0.5
    assert all(0 <= row["win_rate"] <= 1 and math.isfinite(row["gold"]) for row in rows)


def test_over_optimisation_follows_score_and_true_reward(start, tmp_path, monkeypatch, one_core):
    monkeypatch.setattr(overoptimise, "LABELS", (6, 12))
    overoptimise.overoptimise(config(start, tmp_path, steps=5))
    rows = study.read_csv(tmp_path / "overoptimise.csv")
    assert list(rows[0]) == ["labels", "method", "seed", "kl", "proxy", "gold"]
    made = {(row["labels"], row["method"]) for row in rows}
    assert made == {
        (6, "ppo"),
        (6, "best_of_n"),
        (12, "ppo"),
        (12, "best_of_n"),
        (12, "ppo_biased"),
    }
    assert sum(row["method"] == "ppo" for row in rows) == 2 * 2  # five rounds: windows of 4 and 1
    assert (tmp_path / "overoptimise.png").exists()
    assert GPT.load(tmp_path / "rm-12-0.1-1-ppo")


def test_the_true_reward_of_a_round_stands_beside_the_score_of_the_same_round(
    start, tmp_path, monkeypatch
):
    tok = tokenizer.load(start / "sft")
    monkeypatch.setattr(reward, "score", lambda _, *batch: reward.true_reward(tok)(*batch))
    rounds = overoptimise.follow_ppo(config(start, tmp_path, steps=3, prompts=16), seed=1)
    assert len(rounds) == 3 and len({row["gold"] for row in rounds}) == 3
    assert all(row["proxy"] == pytest.approx(row["gold"]) for row in rounds)


def test_every_knob_is_a_setting_of_ppo_and_its_default_lies_between():
    for name, (down, up) in knobs.KNOBS.items():
        default = getattr(PPOConfig, name)
        assert min(down, up) < default < max(down, up)


def test_a_cloud_joins_the_means_of_the_settings():
    lines = dict(ppo=[[(1.0, 2.0), (3.0, 4.0)], [(0.0, 0.0)]])
    ax = plotting.clouds([("True reward", lines)]).axes[0]
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [2, 3]]
    assert len(ax.collections[0].get_offsets()) == 3


# --- claims --------------------------------------------------------------------------------------


@pytest.fixture
def claimed(monkeypatch, tmp_path):
    """Claims whose commands do nothing but leave summaries, and the commands that were called."""
    called, summaries = [], dict(a='{"x": 2.0, "y": 4.0}', b='{"x": 1.0}')

    def run_command(command):
        called.append(command)
        for folder, text in summaries.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "summary.json").write_text(text)

    monkeypatch.setattr(claims, "run_command", run_command)
    monkeypatch.setattr(claims, "COMMANDS", ["one {out}", "two"])
    monkeypatch.setattr(claims, "CLAIMS", [
        ("half", "a", "x / y", 0.4, 0.6),
        ("four", "a", "y", 3.0, 5.0),
        ("one", "b", "x", 0.9, 1.1),
    ])  # fmt: skip
    return called, summaries


def test_claims_are_compared_with_what_their_commands_leave(claimed, tmp_path, capsys):
    claims.main(claims.ClaimsConfig(out=str(tmp_path), seed=7, device="cpu"))
    flags = "--seed 7 --device cpu --dtype auto --overwrite"
    assert claimed[0] == [f"one {tmp_path} {flags}", f"two {flags}"]  # each command once
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["holds"] * 3


def test_a_claim_that_no_longer_holds_is_named_and_ends_the_command(claimed, tmp_path, capsys):
    claimed[1]["b"] = '{"x": 0.5}'
    with pytest.raises(UserError, match="1 of 3 claims no longer hold"):
        claims.main(claims.ClaimsConfig(out=str(tmp_path)))
    assert "FAILS one: x is 0.500" in capsys.readouterr().out


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match=r"python -c 'raise SystemExit\(3\)' ended with 3"):
        claims.run_command("-c 'raise SystemExit(3)'")


def test_every_claim_runs_a_command_that_the_repository_has():
    for command in claims.COMMANDS:
        words = command.split()
        name = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
        assert (Path(__file__).parents[1] / name).exists()
    folders = {command.split("--out ")[1].split()[0] for command in claims.COMMANDS}
    assert {f"{{out}}/{folder}" for _, folder, *_ in claims.CLAIMS} <= folders
