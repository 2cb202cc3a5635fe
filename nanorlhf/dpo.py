"""Direct preference optimisation (Rafailov et al. 2023): the reward model's loss, without a model.

    python -m nanorlhf.dpo                                  the built-in world
    python -m nanorlhf.dpo --data hh.jsonl.gz --sft out/hh-sft --out out/hh-dpo

Whichever policy is the best one for some reward under a KL penalty of weight beta, that reward can
be read off from it: beta (log pi - log pi_ref), up to a constant that all responses to a prompt
share. So the Bradley-Terry loss can be put on the policy itself.
"""
import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from nanorlhf import reward
from nanorlhf.generate import generate_texts
from nanorlhf.logprobs import whole_logprobs
from nanorlhf.model import GPT, load_policy
from nanorlhf.reward import bradley_terry_loss
from nanorlhf.support import loop, parallel
from nanorlhf.support.config import compile_trunks, named, run, setup
from nanorlhf.support.data import collate, flatten, from_files, pairs_in, prompts_of, rows_of
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples
from nanorlhf.support.stats import accuracy_of


@dataclass
class DPOConfig(reward.ComparisonConfig):
    """Learn from comparisons what to say, without a reward model."""
    out: str = "out/dpo"              # the run folder
    learning_rate: float = 3e-4       # peak, after the warm-up; falls in a straight line to zero
    beta: float = 0.1                 # weight of the KL penalty for leaving the SFT model


def dpo_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor,
             ref_rejected_logprobs: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid of the margin between the implicit rewards (Rafailov et al. 2023, eq. 7)

    Log-probs of whole responses, summed over their tokens. All (B,) -> scalar
    """
    chosen = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected = beta * (rejected_logprobs - ref_rejected_logprobs)
    return bradley_terry_loss(chosen, rejected)


def loss_of(policy: GPT, reference: GPT, groups: list, pad: int, beta: float):
    """The loss of some comparisons, groups as in support/data.py. -> loss, metrics"""
    rows, i, j = flatten(groups)                   # i: where the chosen rows stand, j: the rejected
    batch = collate(rows, pad, policy.device)
    logprobs = whole_logprobs(policy, *batch)
    with torch.no_grad():
        ref_logprobs = whole_logprobs(reference, *batch)
    loss = dpo_loss(logprobs[i], logprobs[j], ref_logprobs[i], ref_logprobs[j], beta)
    rewards = beta * (logprobs.detach() - ref_logprobs)
    margin = rewards[i] - rewards[j]
    return loss, dict(loss=loss, accuracy=accuracy_of(margin), margin=margin.mean(),
                      chosen_reward=rewards[i].mean(), rejected_reward=rewards[j].mean())


def train(policy: GPT, reference: GPT, groups: list, pad: int, cfg: DPOConfig, log) -> dict:
    """One pass over the comparisons; the policy learns in place. -> summary"""
    policy.eval()                        # dropout would change the log-probs
    reference.eval()
    optimizer = loop.adamw(policy.parameters(), cfg.learning_rate)
    parts, state = dict(policy=policy, optimizer=optimizer), dict(step=0, tokens=0)

    def loss_fn(groups):
        return loss_of(policy, reference, groups, pad, cfg.beta)

    for batch in loop.batches(groups, parts, loop.linear, cfg, log, state, rows_of):
        log.write(state["step"], **loop.step(loss_fn, batch, pairs_in, parts, cfg))
    return dict(steps=state["step"], tokens=state["tokens"])


def implicit_reward(policy: GPT, reference: GPT, beta: float):
    """The reward that a policy learnt, up to a constant for each prompt: a score function."""
    return lambda *batch: beta * (whole_logprobs(policy, *batch)
                                  - whole_logprobs(reference, *batch))


def main(cfg: DPOConfig):
    device = setup(cfg)
    reference, tok = load_policy(cfg.sft, device)
    if cfg.data:
        groups, held_out = from_files(cfg.data, tok, reference.config.n_positions)
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log, best = RunLog(cfg.out, columns=("loss", "accuracy", "margin"), decode=tok.decode), {}
    if not cfg.data:
        groups, held_out, best["accuracy_ceiling"] = reward.from_samples(reference, tok, cfg)
    print(f"pairs     {pairs_in(groups):,} comparisons; {pairs_in(held_out):,} held out")

    policy = copy.deepcopy(reference)
    print(f"policy    {policy}, on {named(device, cfg.dtype)}")
    compile_trunks(cfg.compile, policy, reference)
    summary = best | train(policy, reference, groups, tok.pad, cfg, log)
    parallel.finish()
    policy.save(cfg.out, tok)

    score = implicit_reward(policy, reference, cfg.beta)
    metrics, _ = reward.report(score, held_out, tok.pad, device, cfg.dtype,
                               cfg.micro_batch_size or 64)
    s = log.finish(**summary, **metrics)
    shown = prompts_of(held_out[:3], policy.config.n_positions - cfg.max_new_tokens)
    samples(cfg.out, *(generate_texts(model, tok, shown, cfg.max_new_tokens, seed=cfg.seed)
                       for model in (reference, policy)))
    curves(cfg.out)
    print(f"accuracy  {s['accuracy']:.3f} of the implicit reward on {s['pairs']:,} held-out pairs "
          f"(95 %: {s['accuracy_low']:.3f} to {s['accuracy_high']:.3f})")
    print(f"{s['seconds']:.0f} s; see {cfg.out}/curves.png and samples.md")
    print(f"next: python -m nanorlhf.evaluate --policy {cfg.out} --against {cfg.sft}")


if __name__ == "__main__":
    run(main, DPOConfig)
