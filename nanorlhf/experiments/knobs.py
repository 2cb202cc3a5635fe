"""Which of PPO's settings matter? Each of them is lowered and raised, one at a time.

    python -m nanorlhf.experiments.knobs                three seeds; --quick: one seed, short runs
"""
from functools import partial
from pathlib import Path

from nanorlhf.experiments import study
from nanorlhf.experiments.frontier import policy_gradient
from nanorlhf.ppo import PPOConfig

# A value below the default and one above. Of lam, the distance from 1 is halved and doubled.
KNOBS = dict(learning_rate=(4e-4, 16e-4), critic_learning_rate=(5e-4, 2e-3), kl_coef=(0.025, 0.1),
             clip=(0.1, 0.4), lam=(0.975, 0.9), minibatches=(1, 4), batch_size=(32, 128),
             steps=(20, 80))


def knobs(cfg):
    """PPO as it is, and with every value of every setting."""
    jobs, columns = {}, ("knob", "value", "seed", "kl", "gold", "win_rate")
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        jobs["none", 0.0, seed] = ppo = partial(policy_gradient, cfg, seed, [PPOConfig.kl_coef])
        jobs |= {(knob, value, seed): partial(ppo, **{knob: value})
                 for knob, values in KNOBS.items() for value in values}
    rows = study.carry_out(jobs, Path(cfg.out) / "knobs.csv", columns, columns[:3])
    study.print_means(rows, columns[:2])


if __name__ == "__main__":
    study.main(knobs)
