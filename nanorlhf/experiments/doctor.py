"""What is wrong with this run? Reads the log of a PPO run and names the likely fault in a sentence.

    python -m nanorlhf.experiments.doctor out/ppo
    python -m nanorlhf.experiments.doctor --make-bands out/1/ppo out/2/ppo ...

Some rules hold for any run: KL cannot be below zero, for example. Bands say where each number lies
in healthy runs that differ in their seed alone. bands.json holds those of `train_ppo.py` without
flags; they are used where the settings are the same. Exit status 1: something is unusual.
"""
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanorlhf.support import UserError
from nanorlhf.support.checkpoint import read_json, write_whole
from nanorlhf.support.config import run
from nanorlhf.support.runlog import read

HERE = Path(__file__).parent
# What to say where a rule is broken, and where a number is below or above its band.
RULES, MEANINGS = json.loads((HERE / "doctor.json").read_bytes()).values()
# The numbers in the order in which a round makes them: what stands first can change the others.
ORDER = [*dict.fromkeys(key.split()[0] for key in MEANINGS)]
# Settings that may differ from those of the bands: a healthy run looks the same with them.
FREE = "seed", "sft", "rm", "dtype", "prompts", "eval_prompts", "save_every", "overwrite"


@dataclass
class DoctorConfig:
    """Read the logs of PPO runs, and name the likely fault of each."""
    runs: list[str] = field(default_factory=list)  # their folders; --runs may be left out
    make_bands: list[str] = field(default_factory=list)  # make the bands from these healthy runs
    bands: str = str(HERE / "bands.json")  # the file of the bands


def main(cfg):
    if cfg.make_bands:
        lines = [f'"{name}": {json.dumps(x)}' for name, x in make_bands(cfg.make_bands).items()]
        return write_whole(Path(cfg.bands), "{" + ",\n".join(lines).replace("]],", "]],\n") + "}\n")
    if not cfg.runs:
        raise UserError("expected the folder of a PPO run, for example out/ppo, came none")
    bands, unusual = read_json(Path(cfg.bands), "--bands"), False
    for folder in cfg.runs:
        faults, compared = examine(folder, bands)
        print(f"{folder}: {compared}", *faults or ["nothing unusual"], sep="\n")
        unusual |= bool(faults)
    sys.exit(unusual)


def examine(folder, bands):
    """-> sentences about what is unusual, the likely fault first; and what the run is compared with
    bands: as make_bands returns them"""
    settings, rows = settings_of(folder), read(folder)
    if not rows:
        return [RULES["empty"]], "no round"
    log = defaultdict(lambda: np.full(len(rows), np.nan))
    log |= {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[0]}
    sure, signs = ([RULES[name] for name, broken in group.items() if broken]
                   for group in rules(log, settings, folder))
    other = [f"{name} is {settings.get(name)}, not {x}" for name, x in bands["settings"].items()
             if settings.get(name) != x]
    if other:
        return sure + signs, (f"{len(rows)} rounds, compared with no healthy runs "
                              f"({'; '.join(other)}), only with what holds for any run")
    return (sure + outside(log, bands["bands"]) + signs,
            f"{len(rows)} rounds, compared with {bands['runs']} healthy runs")


def settings_of(folder):
    """Raises UserError where the folder is no run of PPO."""
    settings = read_json(Path(folder) / "settings.json", f"{folder} is no run")
    if "kl_coef" not in settings:
        raise UserError(f"{folder}: expected a run of train_ppo.py, came one of another program")
    return settings


def rules(log, settings, folder):
    """What holds for any run, what explains most first. -> {rule: is it broken?} twice: what no
    right program can do, and what a run does that goes wrong, whatever the cause

    A number that is not logged is NaN, and a comparison with NaN is False.
    """
    n, kl, k3, target = len(log["step"]), log["kl"], log["kl_k3"], settings["kl_target"]
    entropy, length, ended, gap = (
        log[name] for name in ("entropy", "response_len", "ended", "ratio_gap"))
    first, long = log["step"][0] == 0, n >= 20
    judge = Path(settings["rm"]) / "summary.json"
    judge = read_json(judge, "--rm") if settings["reward"] == "rm" and judge.exists() else {}

    def start(x):
        return x[:max(1, n // 4)].mean()

    def end(x):
        return x[n // 2:].mean()

    score = log["score"]
    rise, noise = end(score) - start(score), np.diff(score, prepend=score[0]).std() / n ** 0.5
    sure = dict(
        not_finite=(Path(folder) / "bad_batch.jsonl").exists(),
        impossible=min(entropy.min(), k3.min() + 1e-3, log["approx_kl"].min() + 1e-3) < 0
        or log["explained_variance"].max() > 1.001,
        reward_model=judge.get("accuracy_low", 1) <= 0.5 and judge["pairs"] >= 50,  # fewer: unknown
        first_kl=first and abs(kl[0]) + k3[0] > 0.01,
        first_ratio=first and gap[0] > 0.3,
        still=n > 1 and gap.max() < 1e-6,
        kl_stays_zero=n > 3 and k3.max() < 1e-6 < gap.max(),
        kl_below_zero=n > 3 and end(kl) < -0.01 and (kl[n // 2:] < 0).mean() > 0.8,
        kl_unlike_k3=long and end(k3) > 0.5 + 2 * abs(end(kl)),
        kl_target=target and (np.diff(log["kl_coef"]) * (kl[:-1] - target) < 0).any(),
        rate=first and log["policy_lr"][0] == 0)
    signs = dict(
        clip=end(log["clip_frac"]) > 0.4,
        never_ends=ended.max() == 0,
        entropy=long and abs(end(entropy)) < 0.1 * abs(entropy[0]),
        length=long and end(length) > 1.5 * start(length) and end(ended) < start(ended) - 0.1,
        short=long and end(length) < start(length) / 3,
        score_falls=long and rise < -5 * noise,
        score=long and gap.max() > 1e-6 and abs(rise) < 5 * noise,
        critic=long and end(log["explained_variance"]) < 0)
    return sure, signs


def phases(values):
    """The first round alone, in which nothing has been learnt; then means of five: less noise."""
    return [values[0], *(values[i:i + 5].mean() for i in range(1, len(values) - 4, 5))]


def make_bands(folders):
    """The bands of healthy runs of equal settings, from the least to the greatest number, and three
    times as much on either side. -> dict(settings, runs, bands={name: [[low, high] of a phase]})"""
    settings, logs, bands = settings_of(folders[0]), [read(folder) for folder in folders], {}
    for name in [name for name in ORDER if name in logs[0][0]]:
        x = np.array([phases(np.array([row[name] for row in log])) for log in logs])
        low, high = x.min(0), x.max(0)
        width = np.maximum(high - low, (high - low).mean())
        if name in ("kl", "kl_k3"):  # before anything is learnt they are 0 in every run
            width[0] = 0
        margin = 3 * width + abs(x).max() / 100
        bands[name] = np.stack([low - margin, high + margin], 1).round(6).tolist()
    settings = {name: x for name, x in settings.items() if name not in FREE}
    return dict(settings=settings, runs=len(folders), bands=bands)


def outside(log, bands):
    """The number that leaves its band first: what others do later may follow from it. In the same
    phase, the first of ORDER is the nearest to the cause. -> a sentence, or none"""
    left = [(phase, ORDER.index(name), x, low, high) for name, band in bands.items()
            for phase, (x, (low, high)) in enumerate(zip(phases(log[name]), band))
            if not low <= x <= high]
    if not left:
        return []
    phase, at, x, low, high = min(left)
    name, when = ORDER[at], f"rounds {5 * phase - 4} to {5 * phase}" if phase else "the first round"
    others = sorted({ORDER[other] for _, other, *_ in left} - {name})
    return [f"{name} is {x:.3g} in {when}; the band of healthy runs is {low:.3g} to {high:.3g}: "
            + MEANINGS[f"{name} {'below' if x < low else 'above'}"]
            + f" (Also unusual: {', '.join(others)}.)" * bool(others)]


if __name__ == "__main__":
    sys.argv[1:1] = ["--runs"]
    run(main, DoctorConfig)
