"""When does a higher score mean worse responses? (Gao et al. 2022)

    python -m nanorlhf.experiments.overoptimise         three seeds; --quick: one seed, short runs

A reward model is right about responses like those it learnt from. A policy that is trained far
leaves them: its score goes on rising while its true reward falls. Here reward models that learnt
from 100 to 6,400 comparisons are each used by PPO without a KL penalty, and by best-of-n. One more
learns from annotators who like long answers. Gao et al. found laws for the gain in true reward over
the SFT model, with d = sqrt(KL):

    best-of-n  d (a - b d)          PPO  d (a - b log d)

Out: overoptimise.csv, overoptimise.png, and a table with the laws fitted to each curve.
"""
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np

from nanorlhf import environment, reward, tokenizer
from nanorlhf.experiments import study
from nanorlhf.experiments.frontier import run_best_of_n, train_policy
from nanorlhf.generate import generate_rows
from nanorlhf.model import ScalarGPT, load_policy
from nanorlhf.support import plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog

LABELS = 100, 400, 1600, 6400         # comparisons that a reward model learns from
LIKES_LENGTH = 0.1                    # what a word is worth to annotators who like long answers
WINDOW = 4                            # rounds of PPO in one row: 64 responses are a noisy mean
COLUMNS = "labels", "method", "seed", "kl", "proxy", "gold"


@dataclass
class OveroptimiseConfig(study.StudyConfig):
    """Train policies far against reward models, and see where the true reward falls."""
    out: str = "out/overoptimise"     # the folder of the results
    steps: int = 60                   # rounds of PPO


class RoundsLog(RunLog):
    """Keeps kl, proxy (the mean score) and gold (the mean true reward) of each round of PPO."""
    rounds = ()

    def write(self, step, **metrics):
        super().write(step, **metrics)
        texts = [map(self.decode, (row[:n].tolist(), row[n:].tolist())) for row, n in self.batch]
        gold = mean(environment.gold(prompt, response) for prompt, response in texts)
        self.rounds += dict(kl=metrics["kl"], proxy=metrics["score"], gold=gold),


def train_reward_model(cfg, labels, bias, seed):
    """A reward model from so many comparisons, in a folder of its own. -> the folder"""
    stage = reward.RMConfig(likes_length=bias, seed=seed, device=cfg.device, dtype=cfg.dtype)
    sft, tok = load_policy(cfg.sft, setup(stage))
    prompts = -(-labels // 6)            # four responses to each, and six comparisons of them
    groups, _ = reward.compare_samples(sft, tok, prompts, 4, stage, held_out=False)
    # Few comparisons are seen several times, or the head would stay close to its random start.
    stage = replace(stage, steps=max(100, -(-len(groups) // stage.batch_size)))
    model = ScalarGPT.load(cfg.sft).resize_vocab(tok.vocab_size).to(sft.device)
    reward.train(model, groups, tok.pad, stage, RunLog())
    prompts = [tok.encode(p) for p in environment.prompts(256, seed)]
    rows = generate_rows(sft, prompts, 80, tok.eos, tok.pad, dtype=cfg.dtype)
    reward.normalise(model, rows, tok.pad, cfg.dtype)
    folder = f"{cfg.out}/rm-{labels}-{bias:g}-{seed}"
    model.save(folder, **tok.special)
    tok.save(folder)
    return folder


def follow_ppo(cfg, seed):
    """PPO without a KL penalty; the policy is saved beside the reward model. -> rounds"""
    log = RoundsLog(decode=tokenizer.load(cfg.sft).decode)
    policy, _, tok = train_policy(cfg, seed, log, steps=cfg.steps, kl_coef=0.0, learning_rate=3e-4)
    policy.save(f"{cfg.rm}-ppo", **tok.special)
    tok.save(f"{cfg.rm}-ppo")
    return log.rounds


def run_both(cfg, labels, likes_length, seed):
    """Train one reward model, and use it for PPO and for best-of-n. -> rows"""
    cfg = replace(cfg, rm=train_reward_model(cfg, labels, likes_length, seed))
    rounds = follow_ppo(cfg, seed)
    for i in range(0, len(rounds), WINDOW):
        yield {name: mean(row[name] for row in rounds[i:i + WINDOW]) for name in rounds[0]}
    if not likes_length:
        for row in run_best_of_n(cfg, seed, (1, 2, 4, 8, 16, 32)):
            yield dict(row, method="best_of_n")


def overoptimise(cfg):
    """Every reward model, every seed."""
    reward_models = [("ppo", n, 0.0) for n in LABELS] + [("ppo_biased", LABELS[-1], LIKES_LENGTH)]
    jobs = {(labels, method, seed): partial(run_both, cfg, labels, likes_length, seed)
            for seed in cfg.every_seed() for method, labels, likes_length in reward_models}
    rows = study.carry_out(jobs, Path(cfg.out) / "overoptimise.csv", COLUMNS, COLUMNS[:3])
    # {(labels, method): places of the curve, from the SFT model on; of each the rows of all seeds}
    curves = {key: list(zip(*study.grouped(same, ["seed"]).values()))
              for key, same in study.grouped(rows, ("labels", "method")).items()}
    print_laws(curves)
    panels = {}
    for (labels, method), places in curves.items():
        title = f"{labels:g} labels" + ", length liked" * (method == "ppo_biased")
        for column, name in ("proxy", "reward model"), ("gold", "true reward"):
            panels.setdefault(title, {})[f"{method}, {name}"] = [
                [(row["kl"], row[column]) for row in place] for place in places]
    (Path(cfg.out) / "overoptimise.png").write_bytes(plotting.clouds([*panels.items()]).png())


LAWS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}


def fit_law(kl, gain, decline):
    """Least squares of gain = d (a - b f(d)), d = sqrt(kl); decline: f. -> a, b, R squared"""
    d = np.sqrt(kl)
    terms = np.stack([d, -d * decline(d)], 1)
    (a, b), *_ = np.linalg.lstsq(terms, gain, rcond=None)
    residual = gain - terms @ (a, b)
    return a, b, 1 - (residual ** 2).sum() / ((gain - gain.mean()) ** 2).sum()


def print_laws(curves):
    """For each curve: the true reward at its start, its best place and its end; and the laws."""
    lines = []
    start = {labels: mean(row["gold"] for row in places[0])          # best of 1 is the SFT model
             for (labels, method), places in curves.items() if method == "best_of_n"}
    for (labels, method), places in curves.items():
        kl, proxy, gold = (np.array([mean(row[name] for row in place) for place in places])
                           for name in ("kl", "proxy", "gold"))
        best, moved = gold.argmax(), kl > 0
        laws = ["{}: {:.2f}, {:.2f}, {:.2f}".format(
            text, *fit_law(kl[moved], gold[moved] - start[labels], decline))
            for text, decline in LAWS.items() if len(set(gold[moved])) > 2]
        lines.append([f"{labels:g}", method, f"{proxy[-1]:.2f}", f"{start[labels]:.2f}",
                      f"{gold[best]:.2f} at {kl[best]:.1f}", f"{gold[-1]:.2f}", "; ".join(laws)])
    study.print_table(["labels", "method", "last score", "true reward of SFT", "best, at KL",
                       "last", "law: a, b, R squared"], lines)


if __name__ == "__main__":
    study.run_study(overoptimise, OveroptimiseConfig)
