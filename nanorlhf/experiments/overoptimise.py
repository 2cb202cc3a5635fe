"""When does more reward mean worse answers? A reward model is right where it was taught, and PPO
goes where it was not (Gao et al. 2022).

    python -m nanorlhf.evaluate overoptimise       reward models of 100 to 6,400 labels, pushed hard

Each reward model is pushed by PPO without a price for KL, and by best-of-n; the truth is asked at
every step. One more learns from annotators who like long answers, and shows what a policy makes of
that. Gao et al.'s laws say how the true reward grows and falls with d = sqrt(KL):

    best-of-n  d (a - b d)          PPO  d (a - b log d)
"""
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np

from nanorlhf import dpo, environment, ppo, reward
from nanorlhf.experiments.study import carry_out, grouped, run_best_of_n, start
from nanorlhf.generate import sample_rows
from nanorlhf.model import ScalarGPT
from nanorlhf.support import plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog

LABELS = 100, 400, 1600, 6400
BIAS = 0.1                 # true reward that a word is worth to an annotator who likes length
WINDOW = 4                 # rounds of PPO that make one row: 64 responses are few to tell the truth
COLUMNS = "labels", "method", "seed", "kl", "proxy", "gold"


class Diary(RunLog):
    """A log that keeps its rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def write(self, step, **metrics):
        self.rows.append(metrics)


def learn_reward(cfg, labels, bias, seed):
    """A reward model from so many labels, in a folder of its own. -> the folder"""
    stage = reward.RMConfig(seed=seed, likes_length=bias, device=cfg.device, dtype=cfg.dtype)
    device = setup(stage)
    tok, _, sft = start(cfg, device)
    prompts = -(-labels // 6)            # four responses to each, and six comparisons of them
    groups, _ = dpo.compare_samples(sft, tok, prompts, 4, stage, held_out=False)
    # Few labels are seen several times, or the head would hardly leave its random start.
    stage = replace(stage, steps=max(100, -(-len(groups) // stage.batch_size)))
    model = ScalarGPT.load(cfg.sft).to(device)
    reward.train(model, groups, tok.pad, stage, RunLog())
    rows = sample_rows(sft, tok, [tok.encode(p) for p in environment.prompts(256, seed)], stage)
    reward.normalise(model, rows, tok.pad, cfg.dtype)
    folder = Path(cfg.out) / f"rm-{labels}-{bias:g}-{seed}"
    model.save(folder, **tok.special)
    return str(folder)


def push(cfg, seed):
    """PPO at no price for KL. -> for every round its kl, proxy and gold"""
    stage = ppo.PPOConfig(kl_coef=0.0, learning_rate=3e-4, steps=cfg.steps or 60, seed=seed,
                          device=cfg.device, dtype=cfg.dtype)
    device = setup(stage)
    tok, policy, reference = start(cfg, device)
    proxy, critic = (reward.load(cfg.rm).to(device) for _ in range(2))
    gold, truth, diary = [], reward.true_reward(tok), Diary()

    def score(*responses):
        gold.append(truth(*responses).mean().item())
        return reward.score(proxy, *responses)

    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
    ppo.train(policy, reference, critic, score, prompts, tok.eos, tok.pad, stage, diary)
    policy.save(f"{cfg.rm}-ppo", **tok.special)          # to read what it writes in the end
    tok.save(f"{cfg.rm}-ppo")
    return [dict(row, proxy=row["score"], gold=true) for row, true in zip(diary.rows, gold)]


def pushed(cfg, labels, bias, seed):
    """One reward model, made and pushed in both ways. -> rows"""
    cfg = replace(cfg, rm=learn_reward(cfg, labels, bias, seed))
    method, rounds = "ppo_biased" if bias else "ppo", push(cfg, seed)
    rows = [dict(labels=labels, method=method, seed=seed,
                 **{name: mean(row[name] for row in rounds[i:i + WINDOW])
                    for name in ("kl", "proxy", "gold")})
            for i in range(0, len(rounds), WINDOW)]
    if not bias:
        for _, found in run_best_of_n(cfg, seed, (1, 2, 4, 8, 16, 32)):
            rows.append(dict(found, labels=labels, method="best_of_n", seed=seed))
    return rows


# --- the laws ------------------------------------------------------------------------------------

def law(kl, gain, decline):
    """Least squares of gain = d (a - b f(d)), d = sqrt(kl); decline: f. -> a, b, R squared"""
    d = np.sqrt(kl)
    terms = np.stack([d, -d * decline(d)], 1)
    (a, b), *_ = np.linalg.lstsq(terms, gain, rcond=None)
    left = gain - terms @ (a, b)
    return a, b, 1 - (left ** 2).sum() / ((gain - gain.mean()) ** 2).sum()


LAWS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}


def overoptimise(cfg):
    """Every reward model, every seed, pushed by PPO and by best-of-n."""
    tasks = [("ppo", labels, 0.0) for labels in LABELS] + [("ppo_biased", LABELS[-1], BIAS)]
    jobs = {(labels, method, seed): partial(pushed, cfg, labels, bias, seed)
            for seed in range(1, (cfg.seeds or 3) + 1) for method, labels, bias in tasks}
    rows = carry_out(jobs, Path(cfg.out) / "overoptimise.csv", COLUMNS,
                     ("labels", "method", "seed"))
    runs = {key: list(zip(*grouped(same, ("seed",)).values()))   # the seeds, place by place
            for key, same in grouped(rows, ("labels", "method")).items()}
    tell(runs)
    (Path(cfg.out) / "overoptimise.png").write_bytes(picture_of(runs).png())


def tell(runs):
    """For each reward model: where the truth turned, and which law says so."""
    print("| labels | method | proxy | true reward: SFT, best (at KL), last | law: a, b, R2 |")
    print("|---|---|---|---|---|")
    before = {labels: mean(row["gold"] for row in places[0])
              for (labels, method), places in runs.items() if method == "best_of_n"}
    for (labels, method), places in runs.items():
        kl, proxy, gold = (np.array([mean(row[name] for row in place) for place in places])
                           for name in ("kl", "proxy", "gold"))
        best, moved, sft = gold.argmax(), kl > 0, before[labels]
        fits = [f"{text}: {a:.2f}, {b:.2f}, {r2:.2f}" for text, decline in LAWS.items()
                for a, b, r2 in [law(kl[moved], gold[moved] - sft, decline)]
                if len(set(gold[moved])) > 2]
        print(f"| {labels:g} | {method} | {proxy[-1]:.2f} | {sft:.2f}, {gold[best]:.2f} "
              f"({kl[best]:.1f}), {gold[-1]:.2f} | {'; '.join(fits)} |")


def picture_of(runs):
    """A panel for each reward model: what it says, and what is true."""
    panels = {}
    for (labels, method), places in runs.items():
        panel = panels.setdefault((labels, method == "ppo_biased"), {})
        for name, what in ("proxy", "reward model"), ("gold", "true reward"):
            panel[f"{method}, {what}"] = [[(row["kl"], row[name]) for row in place]
                                          for place in places]
    return plotting.clouds([(f"{labels:g} labels" + ", length liked" * biased, panel)
                            for (labels, biased), panel in panels.items()])
