"""Which of PPO's settings matter? PPO as it is, and with one setting at a time lowered and raised.

    python -m nanorlhf.experiments.knobs                three seeds; --quick: one seed, short runs

Out: knobs.csv, and a table of KL, true reward and win rate for each value. Its line "none" is PPO
with all settings at their defaults.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanorlhf.experiments import study
from nanorlhf.experiments.frontier import policy_gradient
from nanorlhf.ppo import PPOConfig

# A value below the default and one above. Of lam, the distance from 1 is halved and doubled.
KNOBS = dict(learning_rate=(3e-4, 12e-4), critic_learning_rate=(5e-4, 2e-3), kl_coef=(0.05, 0.2),
             clip=(0.1, 0.4), lam=(0.975, 0.9), epochs=(1, 4), minibatches=(1, 4),
             batch_size=(32, 128), steps=(20, 80))


@dataclass
class KnobsConfig(study.StudyConfig):
    """Lower and raise PPO's settings, one at a time, to see which of them matter."""
    out: str = "out/knobs"            # the folder of the results


def knobs(cfg):
    """Every setting, every seed."""
    changes = [("none", 0.0)] + [(knob, value) for knob in KNOBS for value in KNOBS[knob]]
    jobs = {}
    for seed in cfg.every_seed():
        for knob, value in changes:
            settings = dict(learning_rate=PPOConfig.learning_rate)
            settings |= {} if knob == "none" else {knob: value}
            jobs[knob, value, seed] = partial(policy_gradient, cfg, seed, [PPOConfig.kl_coef],
                                              advantage="gae", **settings)
    columns = "knob", "value", "seed", "kl", "gold", "win_rate"
    rows = study.carry_out(jobs, Path(cfg.out) / "knobs.csv", columns, columns[:3])
    study.print_means(rows, columns[:2])


if __name__ == "__main__":
    study.run_study(knobs, KnobsConfig)
