"""How much true reward does each method reach, and how far from the SFT model does it go for it?

    python -m nanorlhf.experiments.frontier             three seeds; --quick: one seed, short runs

A dial is the setting that decides how far a method moves: n, beta, or the weight of the KL penalty.
"""
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanorlhf import dpo, environment, ilql, ppo, reward
from nanorlhf.evaluate import EvaluateConfig, compare
from nanorlhf.experiments import study
from nanorlhf.generate import generate_rows
from nanorlhf.model import load_policy
from nanorlhf.support import plotting
from nanorlhf.support.config import setup
from nanorlhf.support.runlog import RunLog


def policy_gradient(cfg, seed, dial, **settings):
    """PPO's loop; the dial is kl_coef. Like all methods, yields a row for each place of it."""
    for kl_coef in dial:
        usual = dict(kl_coef=kl_coef, steps=cfg.steps)
        yield measure(*train_policy(cfg, seed, RunLog(), **usual | settings), cfg, seed, kl_coef)


def train_policy(cfg, seed, log, by_truth=False, **settings):
    """PPO's loop, with the score of the reward model in cfg.rm, or with the true reward on the same
    scale: mean 0 and deviation 1 for the SFT model. -> policy, reference, tokenizer"""
    stage = ppo.PPOConfig(seed=seed, device=cfg.device, dtype=cfg.dtype, **settings)
    reference, tok = load_policy(cfg.sft, setup(stage))
    policy = copy.deepcopy(reference)
    reward_model, critic = (reward.load_for(cfg.rm, policy, tok) for _ in range(2))
    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
    score = reward.by_model(reward_model)
    if by_truth:
        truth = reward.true_reward(tok)
        rows = generate_rows(policy, prompts[:256], 80, tok.eos, tok.pad, dtype=cfg.dtype)
        usual = reward.score_rows(truth, rows, tok.pad, policy.device, cfg.dtype)

        def score(*batch):
            return (truth(*batch) - usual.mean()) / usual.std()
    ppo.train(policy, reference, critic if stage.advantage == "gae" else None, score, prompts,
              tok.eos, tok.pad, stage, log)
    return policy, reference, tok


def run_dpo(cfg, seed, dial):
    """The dial is beta. All places of it learn from the same comparisons."""
    stage = dpo.DPOConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype)
    reference, tok = load_policy(cfg.sft, setup(stage))
    groups, _ = reward.compare_samples(reference, tok, cfg.prompts, stage.responses, stage, False)
    for beta in dial:
        policy = copy.deepcopy(reference)
        dpo.train(policy, reference, groups, tok.pad, replace(stage, beta=beta), RunLog())
        yield measure(policy, reference, tok, cfg, seed, beta)


def run_ilql(cfg, seed, dial):
    """The dial is beta. It acts only when the model writes, so one training serves all places."""
    folder = f"{cfg.out}/ilql-{seed}"
    ilql.main(ilql.ILQLConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype,
                              sft=cfg.sft, rm=cfg.rm, out=folder, overwrite=True))
    reference, tok = load_policy(cfg.sft, setup(replace(cfg, seed=seed)))
    policy, _ = load_policy(folder, reference.device)
    for beta in dial:
        policy.beta.fill_(beta)
        yield measure(policy, reference, tok, cfg, seed, beta)


def measure(policy, reference, tok, cfg, seed, dial):
    """On held-out prompts: KL in nats a response, mean true reward, win rate over the reference."""
    prompts = environment.prompts(cfg.eval_prompts, seed, held_out=True)
    result = compare(policy, reference, tok, prompts, reward.true_reward(tok),
                     EvaluateConfig(seed=seed, dtype=cfg.dtype))
    return dict(dial=dial, kl=result["kl_policy"], gold=result["score_policy"],
                win_rate=result["win_rate"])


def run_best_of_n(cfg, seed, dial, pool=16):
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
    """The chance of each of N responses to be the best of n drawn; ties share. (P, N) -> (P, N)"""
    one, other = scores[:, :, None], scores[:, None, :]
    below, up_to = (other < one).double().mean(2), (other <= one).double().mean(2)
    tied = (up_to - below) * scores.shape[1]
    return (up_to ** n - below ** n) / tied


METHODS = dict(                       # and the places of their dials
    sft=(partial(run_best_of_n, pool=1), (1,)),
    best_of_n=(run_best_of_n, (2, 4, 8, 16)),
    ppo=(policy_gradient, (0.2, 0.1, 0.05)),
    ppo_true_reward=(partial(policy_gradient, by_truth=True), (0.05,)),
    reinforce=(partial(policy_gradient, advantage="reinforce"), (0.05,)),
    rloo=(partial(policy_gradient, advantage="rloo", responses=4), (0.05,)),
    grpo=(partial(policy_gradient, advantage="grpo", responses=4), (0.05,)),
    dpo=(run_dpo, (0.3, 0.1)),
    ilql=(run_ilql, (2, 4, 8, 16)))


def frontier(cfg):
    """Every method, every seed, every place of the dial; --quick: every other place."""
    jobs = {(method, seed): partial(run_one, cfg, seed, dial[::2] if cfg.quick else dial)
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)
            for method, (run_one, dial) in METHODS.items()}
    columns = "method", "dial", "seed", "kl", "gold", "win_rate"
    rows = study.carry_out(jobs, Path(cfg.out) / "frontier.csv", columns, ("method", "seed"))
    study.print_means(rows, ("method", "dial"))
    panels = {"True reward": {}, "Win rate over SFT": {}}
    for (method, _), same in study.grouped(rows, ("method", "dial")).items():
        for panel, column in zip(panels.values(), ("gold", "win_rate")):
            panel.setdefault(method, []).append([(row["kl"], row[column]) for row in same])
    (Path(cfg.out) / "frontier.png").write_bytes(plotting.clouds([*panels.items()]).png())


if __name__ == "__main__":
    study.main(frontier)
