"""How much true reward does each method reach, and how far from the SFT model does it have to go?

    python -m nanorlhf.experiments.frontier             every method at every place of its dial
    python -m nanorlhf.experiments.frontier --quick     one seed, short runs, half of the places

A dial is the one setting that decides how far a method moves: the weight of the KL penalty for the
policy gradients, beta for DPO and ILQL, n for best-of-n. Distance is KL in nats a response.
Out: frontier.csv, frontier.png with true reward and win rate over KL, and a table.
"""
import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanorlhf import dpo, environment, ilql, ppo, reward
from nanorlhf.experiments import study
from nanorlhf.generate import generate_rows
from nanorlhf.model import QGPT, load_policy
from nanorlhf.support import plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog
from nanorlhf.support.stats import standardise


@dataclass
class FrontierConfig(study.StudyConfig):
    """Compare all methods: true reward and win rate at several distances from the SFT model."""
    out: str = "out/frontier"         # the folder of the results
    seeds: int = 5                    # runs of each setting; the first has the seed --seed


# --- the methods: yields a row for each place of its dial --------------------------------------

def policy_gradient(cfg, seed, dial, **settings):
    """PPO's loop with any of the advantages; the dial is kl_coef. settings: of PPOConfig"""
    for kl_coef in dial:
        rate = LEARNING_RATES.get(kl_coef, ppo.PPOConfig.learning_rate)
        trained = train_policy(cfg, seed, RunLog(), **dict(
            kl_coef=kl_coef, learning_rate=rate, steps=cfg.steps) | settings)
        yield dict(dial=kl_coef, **study.evaluate_policy(*trained, cfg, seed))


def train_policy(cfg, seed, log, **settings):
    """PPO's loop, with the score of the reward model in cfg.rm. -> policy, reference, tokenizer"""
    stage = ppo.PPOConfig(seed=seed, device=cfg.device, dtype=cfg.dtype, **settings)
    reference, tok = load_policy(cfg.sft, setup(stage))
    policy = copy.deepcopy(reference)
    reward_model, critic = (reward.load_for(cfg.rm, policy, tok) for _ in range(2))
    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
    ppo.train(policy, reference, critic if stage.advantage == "gae" else None,
              reward.by_model(reward_model), prompts, tok.eos, tok.pad, stage, log)
    return policy, reference, tok


def run_dpo(cfg, seed, dial):
    """The dial is beta. All places of it learn from the same comparisons."""
    stage = dpo.DPOConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype)
    reference, tok = load_policy(cfg.sft, setup(stage))
    groups, _ = reward.compare_samples(reference, tok, cfg.prompts, stage.responses, stage, False)
    for beta in dial:
        policy = copy.deepcopy(reference)
        dpo.train(policy, reference, groups, tok.pad, replace(stage, beta=beta), RunLog())
        yield dict(dial=beta, **study.evaluate_policy(policy, reference, tok, cfg, seed))


def run_ilql(cfg, seed, dial):
    """The dial is beta. It acts only when the model writes, so one training serves all places."""
    stage = ilql.ILQLConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype)
    reference, tok = load_policy(cfg.sft, setup(stage))
    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
    rows = generate_rows(reference, prompts, stage.max_new_tokens, tok.eos, tok.pad,
                         G=stage.responses, dtype=cfg.dtype)
    score = reward.by_model(reward.load_for(cfg.rm, reference, tok))
    scores = reward.score_rows(score, rows, tok.pad, reference.device, cfg.dtype)
    policy = QGPT(reference.config).to(reference.device)
    policy.transformer.load_state_dict(reference.transformer.state_dict())
    ilql.train(policy, rows, standardise(scores), tok.pad, stage, RunLog())
    for beta in dial:
        policy.beta.fill_(beta)
        yield dict(dial=beta, **study.evaluate_policy(policy, reference, tok, cfg, seed))


def run_best_of_n(cfg, seed, dial, pool=32):
    """The dial is n. Nothing is trained: of n responses, the reward model chooses the best."""
    sft, tok = load_policy(cfg.sft, setup(replace(cfg, seed=seed)))
    prompts = [tok.encode(p) for p in environment.prompts(cfg.eval_prompts, seed, held_out=True)]
    rows = generate_rows(sft, prompts, 80, tok.eos, tok.pad, G=pool, dtype=cfg.dtype)
    judges = reward.by_model(reward.load_for(cfg.rm, sft, tok)), reward.true_reward(tok)
    scores, gold = (reward.score_rows(judge, rows, tok.pad, sft.device, cfg.dtype).cpu()
                    .view(-1, pool) for judge in judges)                               # (P, pool)
    one, other = gold[:, :, None], gold[:, None, :]
    wins = ((one > other).double() + 0.5 * (one == other)).mean(2)  # how often it beats the others
    for n in dial:
        p = best_of_n(scores, n)
        sums = dict(kl=torch.xlogy(p, p * pool), proxy=p * scores, gold=p * gold, win_rate=p * wins)
        yield dict(dial=n, **{name: x.sum(1).mean().item() for name, x in sums.items()})


def best_of_n(scores: Tensor, n: int) -> Tensor:
    """The probability of each response in a pool to be the best of n drawn from it; ties share.

    So the reward of best-of-n is a mean over the pool, and its KL is the mean of
    log(N probability), to which best_of_n_kl can be compared. scores (P, N) -> (P, N)
    """
    one, other = scores[:, :, None], scores[:, None, :]
    below, up_to = (other < one).double().mean(2), (other <= one).double().mean(2)
    tied = (up_to - below) * scores.shape[1]
    return (up_to ** n - below ** n) / tied


def best_of_n_kl(n: int) -> float:
    """KL(best of n samples || one sample) in nats, log n - (n - 1) / n, whatever the model.

    Exact where no two responses score the same, and an upper bound otherwise (Stiennon et al. 2020,
    appendix G.3; Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


# --- the study -----------------------------------------------------------------------------------

# At a heavy KL penalty and the default rate, the noise of the gradient alone would cost a nat.
LEARNING_RATES = {1.0: 2e-4, 0.3: 2e-4, 0.1: 3e-4}
COLUMNS = "method", "dial", "seed", "kl", "gold", "win_rate"
KL_COEFS = (1.0, 0.3, 0.05)
METHODS = dict(
    sft=(partial(run_best_of_n, pool=1), (1,)),
    best_of_n=(run_best_of_n, (2, 4, 8, 16)),
    ppo=(partial(policy_gradient, advantage="gae"), (1.0, 0.3, 0.1, 0.05)),
    reinforce=(partial(policy_gradient, advantage="reinforce"), KL_COEFS),
    rloo=(partial(policy_gradient, advantage="rloo", responses=4), KL_COEFS),
    grpo=(partial(policy_gradient, advantage="grpo", responses=4), KL_COEFS),
    dpo=(run_dpo, (1.0, 0.3, 0.1)),
    ilql=(run_ilql, (1, 2, 4, 8, 16, 32)))


def frontier(cfg):
    """Every method, every seed, every place of the dial."""
    jobs = {(method, seed): partial(run_one, cfg, seed, dial[::2] if cfg.quick else dial)
            for seed in cfg.every_seed() for method, (run_one, dial) in METHODS.items()}
    rows = study.carry_out(jobs, Path(cfg.out) / "frontier.csv", COLUMNS, ("method", "seed"))
    study.print_means(rows, ("method", "dial"))
    panels = {"True reward": {}, "Win rate over SFT": {}}
    for (method, _), same in study.grouped(rows, ("method", "dial")).items():
        for panel, column in zip(panels.values(), ("gold", "win_rate")):
            panel.setdefault(method, []).append([(row["kl"], row[column]) for row in same])
    (Path(cfg.out) / "frontier.png").write_bytes(plotting.clouds([*panels.items()]).png())


if __name__ == "__main__":
    study.run_study(frontier, FrontierConfig)
