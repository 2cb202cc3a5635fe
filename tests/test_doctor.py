"""The doctor: every fault in a log is named by its own sentence, and a healthy log by none."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanorlhf.experiments import doctor
from nanorlhf.experiments.doctor import FREE, MEANINGS, ORDER, RULES, examine, make_bands, phases
from nanorlhf.ppo import PPOConfig
from nanorlhf.support import UserError
from nanorlhf.support.config import parse
from nanorlhf.support.runlog import NOT_SETTINGS, open_run

ROOT = Path(__file__).parents[1]
N = 40  # rounds


def healthy(seed, n=N):
    """{metric: n values} of a run as it should be, with some noise."""
    rng, t = np.random.default_rng(seed), np.arange(n) / N
    noise = lambda size: size * rng.standard_normal(n)  # noqa: E731
    schedule = np.minimum((np.arange(n) + 1) / 10, 1 - t)
    log = dict(
        kl_coef=np.full(n, 0.05),
        policy_lr=8e-4 * schedule,
        critic_lr=1e-3 * schedule,
        response_len=40 + noise(1),
        ended=np.minimum(1, 0.97 + noise(0.01)),
        entropy=0.9 - 0.5 * t + noise(0.02),
        kl=9 * t * (1 + noise(0.05)),
        score=1.5 * t + noise(0.1),
        explained_variance=0.3 + 0.4 * t + noise(0.03),
        policy_loss=noise(0.005),
        value_loss=0.5 - 0.4 * t + noise(0.02),
        ratio_gap=0.05 * schedule * (1 + noise(0.1)),
        clip_frac=0.1 * schedule * (1 + noise(0.1)),
        approx_kl=0.01 * schedule * (1 + noise(0.1)),
        policy_grad_norm=0.8 + noise(0.05),
        critic_grad_norm=2 + noise(0.1),
    )
    return log | dict(kl_k3=log["kl"] * (1 + noise(0.1)))


def write(folder, log, **settings):
    """A run folder with that log. -> the folder"""
    cfg = PPOConfig(out=str(folder), rm=str(folder / "rm"), **settings)
    open_run(folder, cfg)
    names = log.keys()
    rows = [dict(zip(names, map(float, row))) for row in zip(*log.values())]
    text = "".join(json.dumps(dict(step=i, **row)) + "\n" for i, row in enumerate(rows))
    (folder / "log.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Of five healthy runs."""
    folder = tmp_path_factory.mktemp("healthy")
    return make_bands([write(folder / str(seed), healthy(seed)) for seed in range(5)])


@pytest.mark.parametrize("seed", range(5, 10))
def test_of_a_healthy_run_it_says_nothing(tmp_path, bands, seed):
    faults, compared = examine(write(tmp_path, healthy(seed)), bands)
    assert faults == [] and compared == "40 rounds, compared with 5 healthy runs"


@pytest.mark.parametrize("n", [1, 2, 7, 19])
def test_nor_of_one_that_has_just_begun(tmp_path, bands, n):
    assert examine(write(tmp_path, {k: x[:n] for k, x in healthy(5).items()}), bands)[0] == []


def test_a_run_without_a_critic_is_judged_by_the_rules_that_are_left(tmp_path, bands):
    log = {k: x for k, x in healthy(5).items() if not k.startswith(("critic", "value", "expl"))}
    faults, compared = examine(write(tmp_path, log, advantage="rloo", responses=4), bands)
    assert faults == [] and "advantage is rloo, not gae" in compared


# --- the rules for any run ---

t = np.arange(N) / N
FAULTS = dict(  # what to change in a healthy log; one rule is broken, and no other
    impossible=lambda log: dict(entropy=-log["entropy"]),
    first_kl=lambda log: dict(kl=log["kl"] + 0.5 * (t == 0)),
    first_ratio=lambda log: dict(ratio_gap=log["ratio_gap"] + 0.4 * (t == 0)),
    still=lambda log: {k: 0 * t for k in ("ratio_gap", "clip_frac", "approx_kl", "kl", "kl_k3")},
    kl_stays_zero=lambda log: dict(kl=0 * t, kl_k3=0 * t),
    kl_below_zero=lambda log: dict(kl=-log["kl"]),
    kl_unlike_k3=lambda log: dict(kl=log["kl"] / 40),
    rate=lambda log: dict(policy_lr=log["policy_lr"] * (t > 0)),
    clip=lambda log: dict(clip_frac=0.5 + 0 * t),
    never_ends=lambda log: dict(ended=0 * t),
    entropy=lambda log: dict(entropy=0.9 * 0.01**t),
    length=lambda log: dict(response_len=30 + 50 * t, ended=1 - 0.5 * t),
    short=lambda log: dict(response_len=40 * np.exp(-9 * t) + 3),
    critic=lambda log: dict(explained_variance=log["explained_variance"] - 1),
    score=lambda log: dict(score=log["score"] - 1.5 * t),
    score_falls=lambda log: dict(score=log["score"] - 3 * t),
)  # fmt: skip
SIGNS = "clip", "never_ends", "entropy", "length", "short", "critic", "score", "score_falls"


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_rule_is_named_by_its_sentence_and_by_no_other(tmp_path, bands, name):
    log = healthy(5)
    other = write(tmp_path, log | FAULTS[name](log), kl_coef=0.06)  # not the bands' settings
    assert examine(other, bands)[0] == [RULES[name]]


@pytest.mark.parametrize("name", FAULTS)
def test_beside_healthy_runs_it_is_still_said(tmp_path, bands, name):
    log = healthy(5)
    faults, _ = examine(write(tmp_path, log | FAULTS[name](log)), bands)
    at = 1 if name in SIGNS else 0  # what may have many causes comes after what is seen first
    assert len(faults) == 2 and faults[at] == RULES[name]


def test_the_other_rules_look_beside_the_log(tmp_path, bands):
    run = write(tmp_path / "run", healthy(5))
    (run / "bad_batch.jsonl").write_text("")
    assert examine(run, bands)[0] == [RULES["not_finite"]]
    (run / "bad_batch.jsonl").unlink()
    (run / "rm").mkdir()
    # Of few pairs, as a person labels them, nobody can say whether the model is at chance.
    for low, pairs, sentences in (0.7, 500, []), (0.48, 500, [RULES["reward_model"]]), (0.3, 6, []):
        judged = dict(accuracy=0.5, accuracy_low=low, pairs=pairs)
        (run / "rm/summary.json").write_text(json.dumps(judged))
        assert examine(run, bands)[0] == sentences
    (run / "log.jsonl").write_text("")
    assert examine(run, bands)[0] == [RULES["empty"]]


def test_a_price_of_kl_that_moves_the_wrong_way(tmp_path, bands):
    log = healthy(5)
    right = 0.05 * np.cumprod(np.where(np.roll(log["kl"], 1) > 4, 1.02, 0.98))
    anew = 0.05 * np.where(np.roll(log["kl"], 1) > 4, 1 + 0.01 * t[::-1], 0.98)
    for name, price in ("right", right), ("wrong", 0.05**2 / right), ("anew", anew):
        run = write(tmp_path / name, log | dict(kl_coef=price), kl_target=4.0)
        assert examine(run, bands)[0] == [RULES["kl_target"]] * (name != "right")


def test_no_rule_is_without_a_test():
    assert FAULTS.keys() | {"empty", "not_finite", "reward_model", "kl_target"} == RULES.keys()


# --- the bands ---


@pytest.mark.parametrize("phase", [0, 3])
@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("name", ORDER)
def test_a_number_outside_its_band_is_named_with_its_meaning(bands, name, side, phase):
    log = healthy(5)
    low, high = bands["bands"][name][phase]
    wanted = low - (high - low) if side == "below" else high + (high - low)
    rounds = slice(0, 1) if phase == 0 else slice(5 * phase - 4, 5 * phase + 1)
    log[name][rounds] = wanted
    [said] = doctor.outside(log, bands["bands"])
    when = "the first round" if phase == 0 else "rounds 11 to 15"
    assert said.startswith(f"{name} is {wanted:.3g} in {when}; the band of healthy "
                           f"runs is {low:.3g} to {high:.3g}: ")
    assert said.endswith(MEANINGS[f"{name} {side}"])


def test_the_earliest_counts_and_then_what_comes_first_in_a_round(bands):
    log = healthy(5)
    log["score"][11:] += 9
    log["entropy"][6:] += 9
    log["kl"][6:] += 99
    [said] = doctor.outside(log, bands["bands"])
    assert said.startswith("entropy") and said.endswith("(Also unusual: kl, score.)")


def test_a_phase_is_the_first_round_or_the_mean_of_five():
    assert phases(np.arange(12.0)) == [0, 3, 8]
    assert phases(np.arange(5.0)) == [0]


def test_bands_reach_three_times_as_far_again_as_the_healthy_runs_differ(tmp_path):
    logs = [dict(score=np.array([x, 0, 0, 0, 0, 10 * x])) for x in (0.0, 1.0)]
    bands = make_bands([write(tmp_path / str(i), log) for i, log in enumerate(logs)])
    assert bands["runs"] == 2
    assert np.allclose(bands["bands"]["score"], [[-4.52, 5.52], [-6.02, 8.02]])


def test_no_meaning_is_missing():
    assert MEANINGS.keys() == {f"{name} {side}" for name in ORDER for side in ("below", "above")}


def test_the_bands_that_are_shipped_are_those_of_the_command_without_flags():
    shipped = json.loads((ROOT / "nanorlhf/experiments/bands.json").read_bytes())
    settings = dataclasses.asdict(PPOConfig())
    assert shipped["settings"] == {k: x for k, x in settings.items()
                                   if k not in FREE + NOT_SETTINGS}  # fmt: skip
    assert [*shipped["bands"]] == [*ORDER]
    assert {len(band) for band in shipped["bands"].values()} == {len(phases(np.zeros(N)))}


# --- the command ---


def test_the_command_from_bands_to_a_verdict(tmp_path, capsys):
    runs = [str(write(tmp_path / str(seed), healthy(seed))) for seed in range(6)]
    flags = ["--bands", str(tmp_path / "bands.json")]
    doctor.main(parse(doctor.DoctorConfig, ["--make-bands", *runs[:5], *flags]))
    for log, status, said in (
        (healthy(6), 0, "nothing unusual"),
        (healthy(6) | dict(kl=-healthy(6)["kl"]), 1, RULES["kl_below_zero"]),
    ):
        run = write(tmp_path / f"status-{status}", log)
        with pytest.raises(SystemExit) as stop:
            doctor.main(parse(doctor.DoctorConfig, ["--runs", str(run), *flags]))
        assert stop.value.code == status
        assert said in capsys.readouterr().out.splitlines()


def test_the_folder_stands_without_a_flag_and_a_wrong_one_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "nanorlhf.experiments.doctor"]
    done = subprocess.run(
        [*command, str(tmp_path / "gone")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "gone is no run: expected a JSON object" in done.stderr


@pytest.mark.parametrize("settings, said", [
    (None, "expected the folder of a PPO run"),
    ("{}", "came one of another program"),
    ('{"kl_coef": 0.05}', "log.jsonl"),
])  # fmt: skip
def test_what_is_no_run_of_ppo_is_refused(tmp_path, settings, said):
    if settings:
        (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(UserError, match=said):
        doctor.main(doctor.DoctorConfig(runs=[str(tmp_path)] * bool(settings)))
