"""Which pairs should people label: any, or those on which reward models disagree?

    python -m nanorlhf.experiments.active               five seeds; --quick: one seed, fewer pairs

Both rules start from the same 100 labels of the built-in annotators, chosen at random, and double
them three times. Each time an ensemble, reward models that differ in their seed alone, learns from
all labels so far. By the rule "disagreement" it names the pairs to label next, as in Christiano et
al. 2017, section 2.2.4. Gleave & Irving 2022 found no gain over random pairs with language models.
"""
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanorlhf import reward
from nanorlhf.experiments import study
from nanorlhf.model import load_policy
from nanorlhf.support import UserError, plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog
from nanorlhf.support.stats import accuracy_of, disagreement

LABELS = 100, 200, 400, 800
MODELS = 3                            # in an ensemble
RULES = "random", "disagreement"
PANELS = dict(accuracy="Right by the true reward", agreement="Right by noisy choices")
COLUMNS = "rule", "labels", "seed", *PANELS, "ceiling", "right_labels"


def active(cfg):
    """Every seed: both rules, side by side."""
    if cfg.prompts < LABELS[-1]:
        raise UserError(f"--prompts: expected {LABELS[-1]} or more, to choose pairs from; came "
                        f"{cfg.prompts}")
    jobs = {(seed,): partial(label_in_rounds, cfg, seed)
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)}
    rows = study.carry_out(jobs, Path(cfg.out) / "active.csv", COLUMNS, ["seed"])
    lines, panels = [], {title: {} for title in PANELS.values()}
    for (rule, labels), same in study.grouped(rows, ("rule", "labels")).items():
        means = [study.mean_and_half_width([row[name] for row in same]) for name in COLUMNS[3:]]
        lines.append([rule, labels, *("{:.3f} ± {:.3f}".format(*mean) for mean in means)])
        for name, title in PANELS.items():
            panels[title].setdefault(rule, []).append([(labels, row[name]) for row in same])
    study.print_table(["rule", "labels", *COLUMNS[3:]], lines)
    for n in LABELS[1:]:
        found = [[row["accuracy"] for row in rows if (row["rule"], row["labels"]) == (rule, n)]
                 for rule in RULES]                              # each in the order of the seeds
        gains = [one - other for other, one in zip(*found, strict=True)]
        print("{} labels: disagreement - random {:+.3f} ± {:.3f}".format(
            n, *study.mean_and_half_width(gains)))
    picture = plotting.clouds([*panels.items()], "labels", LABELS)
    ceiling = study.mean_and_half_width([row["ceiling"] for row in rows])[0]
    picture.axes[1].axhline(ceiling, color=plotting.GREY, linestyle=":")
    (Path(cfg.out) / "active.png").write_bytes(picture.png())


def label_in_rounds(cfg, seed):
    """Both rules with one seed, on one pool of pairs. -> rows"""
    stage = reward.RMConfig(sft=cfg.sft, seed=seed, device=cfg.device, dtype=cfg.dtype,
                            steps=cfg.steps, batch_size=8)
    sft, tok = load_policy(cfg.sft, setup(stage))
    pool, _ = reward.compare_samples(sft, tok, cfg.prompts, 2, stage, held_out=False)
    held_out, ceiling = reward.compare_samples(sft, tok, cfg.eval_prompts, 2, stage, held_out=True)

    def margins(score, groups):
        return reward.report(score, groups, tok.pad, sft.device, cfg.dtype)[1]

    def ensemble_margins(models, groups):                                      # (MODELS, pairs)
        return torch.stack([margins(reward.by_model(model), groups) for model in models])

    truth, known = (margins(reward.true_reward(tok), groups) for groups in (held_out, pool))
    order = random.Random(seed).sample(range(len(pool)), len(pool))
    first = order[:LABELS[0]]
    start = train_ensemble([pool[i] for i in first], stage, sft, tok)
    for rule in RULES:
        labelled, models = first, start
        for n in LABELS:
            if n > len(labelled):
                rest = [i for i in order if i not in labelled]
                if rule == "disagreement":
                    disputed = disagreement(ensemble_margins(models, [pool[i] for i in rest]))
                    rest = [rest[i] for i in disputed.argsort(descending=True)]
                labelled = labelled + rest[:n - len(labelled)]
                models = train_ensemble([pool[i] for i in labelled], stage, sft, tok)
            margin = ensemble_margins(models, held_out).mean(0)
            yield dict(rule=rule, labels=n, seed=seed, ceiling=ceiling,
                       accuracy=accuracy_of((margin * truth)[truth != 0]).item(),
                       agreement=accuracy_of(margin).item(),
                       right_labels=accuracy_of(known[labelled]).item())


def train_ensemble(groups, stage, sft, tok):
    """Reward models that learn from the same pairs, each in an order of its own."""
    models, one_pass = [], -(-len(groups) // stage.batch_size)
    for number in range(MODELS):
        stage = replace(stage, seed=1000 * number + stage.seed, steps=max(stage.steps, one_pass))
        setup(stage)
        models.append(reward.new_model(stage, sft, tok))
        reward.train(models[-1], groups, tok.pad, stage, RunLog())
    return models


if __name__ == "__main__":
    study.main(active, seeds=5, steps=50)
