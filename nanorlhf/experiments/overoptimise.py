"""When does a higher score mean worse responses? (Gao et al. 2022)

    python -m nanorlhf.experiments.overoptimise         three seeds; --quick: one seed, short runs

Reward models that learnt from 100 to 6,400 comparisons are used by PPO without a KL penalty, whose
score goes on rising while its true reward falls, and by best-of-n. d in the laws is sqrt(KL).
"""
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np

from nanorlhf import environment, reward, tokenizer
from nanorlhf.experiments import study
from nanorlhf.experiments.frontier import run_best_of_n, train_policy
from nanorlhf.generate import generate_rows
from nanorlhf.model import load_policy
from nanorlhf.support import plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog

LABELS = 100, 800, 6400               # comparisons that a reward model learns from
WINDOW = 4                            # rounds of PPO in one row: 64 responses are a noisy mean
LAWS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}      # of best-of-n, of PPO
COLUMNS = "labels", "method", "seed", "kl", "proxy", "gold"


def overoptimise(cfg):
    """Every seed, every reward model; to the last one's annotators a word is worth 0.1."""
    reward_models = [("ppo", labels, 0.0) for labels in LABELS] + [("ppo_biased", LABELS[-1], 0.1)]
    jobs = {(labels, method, seed): partial(run_both, cfg, labels, likes_length, seed)
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)
            for method, labels, likes_length in reward_models}
    rows = study.carry_out(jobs, Path(cfg.out) / "overoptimise.csv", COLUMNS, COLUMNS[:3])
    curves, panels = {}, {}
    for (labels, method), same in study.grouped(rows, ("labels", "method")).items():
        runs = [[[row[name] for name in ("kl", "proxy", "gold")] for row in run]
                for run in study.grouped(same, ["seed"]).values()]
        curves[labels, method] = curve = np.array(runs).swapaxes(0, 1)       # (places, seeds, 3)
        panel = panels.setdefault(f"{labels} labels" + ", length liked" * ("biased" in method), {})
        panel[f"{method}, reward model"] = curve[:, :, [0, 1]].tolist()
        panel[f"{method}, true reward"] = curve[:, :, [0, 2]].tolist()
    (Path(cfg.out) / "overoptimise.png").write_bytes(plotting.clouds([*panels.items()]).png())
    print_laws(curves)


def run_both(cfg, labels, likes_length, seed):
    """Train one reward model, and use it for PPO and for best-of-n. -> rows"""
    cfg = replace(cfg, rm=f"{cfg.out}/rm-{labels}-{likes_length:g}-{seed}")
    train_reward_model(cfg, labels, likes_length, seed)
    rounds = follow_ppo(cfg, seed)
    for i in range(0, len(rounds), WINDOW):
        yield {name: mean(row[name] for row in rounds[i:i + WINDOW]) for name in rounds[0]}
    if not likes_length:
        for row in run_best_of_n(cfg, seed, (1, 2, 4, 8, 16)):
            yield dict(row, method="best_of_n")


def train_reward_model(cfg, labels, likes_length, seed):
    """A reward model from so many comparisons, saved in cfg.rm."""
    prompts = -(-labels // 6)            # four responses to each, and six comparisons of them
    stage = reward.RMConfig(sft=cfg.sft, likes_length=likes_length, seed=seed, device=cfg.device,
                            dtype=cfg.dtype)
    sft, tok = load_policy(cfg.sft, setup(stage))
    groups, _ = reward.compare_samples(sft, tok, prompts, 4, stage, held_out=False)
    model = reward.new_model(stage, sft, tok)
    reward.train(model, groups, tok.pad, stage, RunLog(every=25, columns=["loss", "accuracy"]))
    prompts = [tok.encode(p) for p in environment.prompts(256, seed)]
    rows = generate_rows(sft, prompts, 80, tok.eos, tok.pad, dtype=cfg.dtype)
    reward.normalise(model, rows, tok.pad, cfg.dtype)
    model.save(cfg.rm, tok)


def follow_ppo(cfg, seed):
    """PPO without a KL penalty; the policy is saved beside the reward model. -> rounds"""
    log = RoundsLog(decode=tokenizer.load(cfg.sft).decode)
    policy, _, tok = train_policy(cfg, seed, log, steps=cfg.steps, kl_coef=0.0)
    policy.save(f"{cfg.rm}-ppo", tok)
    return log.rounds


class RoundsLog(RunLog):
    """Keeps kl, proxy (the mean score) and gold (the mean true reward) of each round of PPO."""
    rounds = ()

    def write(self, step, **metrics):
        super().write(step, **metrics)
        texts = [map(self.decode, (row[:n].tolist(), row[n:].tolist())) for row, n in self.batch]
        gold = mean(environment.gold(prompt, response) for prompt, response in texts)
        self.rounds += dict(kl=metrics["kl"], proxy=metrics["score"], gold=gold),


def print_laws(curves):
    """For each curve: the true reward at its start, its best place and its end; and the laws."""
    lines = []
    for (labels, method), curve in curves.items():
        kl, proxy, gold = curve.mean(1).T
        start = curves[labels, "best_of_n"][0, :, 2].mean()        # best of 1 is the SFT model
        best, moved = gold.argmax(), kl > 0
        laws = ["{}: {:.2f}, {:.2f}, {:.2f}".format(
            text, *fit_law(kl[moved], gold[moved] - start, decline))
            for text, decline in LAWS.items() if len(set(gold[moved])) > 2]
        lines.append([labels, method, f"{proxy[-1]:.2f}", f"{start:.2f}",
                      f"{gold[best]:.2f} at {kl[best]:.1f}", f"{gold[-1]:.2f}", "; ".join(laws)])
    study.print_table(["labels", "method", "last score", "true reward of SFT", "best, at KL",
                       "last", "law: a, b, R squared"], lines)


def fit_law(kl, gain, decline):
    """Least squares of gain = d (a - b f(d)), d = sqrt(kl); decline: f. -> a, b, R squared"""
    d = np.sqrt(kl)
    terms = np.stack([d, -d * decline(d)], 1)
    (a, b), *_ = np.linalg.lstsq(terms, gain, rcond=None)
    residual = gain - terms @ (a, b)
    return a, b, 1 - (residual ** 2).sum() / ((gain - gain.mean()) ** 2).sum()


if __name__ == "__main__":
    study.main(overoptimise)
