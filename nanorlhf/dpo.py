"""Direct preference optimisation (Rafailov et al. 2023): the reward model's loss, without one.

    python -m nanorlhf.dpo                                  the built-in world
    python -m nanorlhf.dpo --data hh.jsonl.gz --sft out/hh-sft --out out/hh-dpo

A policy that is best for some reward under a KL price beta betrays that reward: it is
beta (log pi - log pi_ref), up to a constant that every response to a prompt shares. So the
Bradley-Terry loss can be put on the policy itself.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch

from nanorlhf import environment, tokenizer
from nanorlhf.generate import answer, sample_rows
from nanorlhf.logprobs import masked, response_logprobs
from nanorlhf.model import GPT
from nanorlhf.reward import annotate, bradley_terry_loss, by_prompt, gather, interval
from nanorlhf.support import checkpoint, data, memory, parallel
from nanorlhf.support.config import autocast, fuse, run, setup
from nanorlhf.support.data import endless, in_parts
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples

PANELS = [("Loss", "nats / pair", ["loss"]), ("Accuracy", "of the batch", ["accuracy"]),
          ("Implicit reward", "beta (log pi - log pi_ref)", ["chosen_reward", "rejected_reward"]),
          ("Gradient norm", "", ["grad_norm"])]


@dataclass
class DPOConfig:
    """Learn from comparisons what to say, without a reward model."""
    out: str = "out/dpo"              # the run folder
    sft: str = "out/sft"              # where the policy starts, what it is held to, what is sampled
    data: list[str] = field(default_factory=list)  # files of preferences; none: the built-in world
    prompts: int = 3000               # prompts to sample responses to (built-in world)
    responses: int = 4                # a prompt; annotators compare every two of them
    annotator_temperature: float = 0.45  # of annotators: they err on about 13 % of pairs
    likes_length: float = 0.0         # bias of annotators: true reward that each word is worth
    max_new_tokens: int = 80          # longest sampled response
    held_out_prompts: int = 1000      # prompts to measure on, one comparison each (built-in world)
    steps: int = 0                    # updates; 0: one pass over the comparisons
    batch_size: int = 4               # prompts an update, with all their comparisons
    micro_batch_size: int = 0         # prompts in memory at once, same result; 0: no limit
    learning_rate: float = 3e-4       # after 20 steps of warm-up; falls in a straight line to zero
    beta: float = 0.1                 # price of one nat away from the reference
    grad_clip: float = 1.0            # longest gradient step
    seed: int = 1                     # of the data order, samples and annotators
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False             # fuse with torch.compile: a long start, faster steps
    save_every: int = 200             # steps between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings
    RANGES = dict(responses=(2, math.inf))


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
             beta=0.1):
    """-log sigmoid of the margin between the implicit rewards (Rafailov et al. 2023, eq. 7)

    Log-probs of whole responses, summed over their tokens. All (B,) -> scalar
    """
    chosen, rejected = (beta * (logprobs - ref_logprobs) for logprobs, ref_logprobs in (
        (chosen_logprobs, ref_chosen_logprobs), (rejected_logprobs, ref_rejected_logprobs)))
    return bradley_terry_loss(chosen, rejected)


def whole_logprobs(model, tokens, prompt_len, mask):
    """Log-prob of each response, summed over its tokens. tokens (B, T), mask (B, R) -> (B,)"""
    return masked(response_logprobs(model, tokens, prompt_len, mask.shape[1]), mask).sum(1)


def compare(policy, reference, groups, pad, cfg):
    """Comparisons in one batch, groups as reward.by_prompt makes them. -> loss, metrics"""
    batch, i, j = gather(groups, pad, policy.device)
    with autocast(policy.device, cfg.dtype):
        logprobs = whole_logprobs(policy, *batch)
        with torch.no_grad():
            ref_logprobs = whole_logprobs(reference, *batch)
    loss = dpo_loss(logprobs[i], logprobs[j], ref_logprobs[i], ref_logprobs[j], cfg.beta)
    rewards = cfg.beta * (logprobs.detach() - ref_logprobs)
    margin = rewards[i] - rewards[j]
    accuracy = (1 + margin.sign()).mean() / 2        # a tie, as everywhere at first, is half right
    return loss, dict(loss=loss.detach(), accuracy=accuracy, margin=margin.mean(),
                      chosen_reward=rewards[i].mean(), rejected_reward=rewards[j].mean())


def train(policy, reference, groups, pad, cfg, log):
    """One pass over the comparisons. The policy learns in place. -> summary"""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    parts, seen = dict(policy=policy, optimizer=optimizer), dict(step=0, tokens=0)
    if cfg.resume:
        seen = checkpoint.load_state(cfg.out, parts)
    for model in policy, reference:
        model.eval()                     # dropout would change the log-probs
    steps = cfg.steps or math.ceil(len(groups) / cfg.batch_size)
    batches = endless(groups, cfg.batch_size, cfg.seed, seen["step"],
                      length=lambda group: max(len(tokens) for tokens, _ in group[0]))

    for step in log.steps(seen["step"], steps):
        lr = cfg.learning_rate * min((step + 1) / 20, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        batch, metrics = next(batches), Counter()
        for part in in_parts(parallel.mine(batch), cfg.micro_batch_size):
            loss, found = compare(policy, reference, part, pad, cfg)
            share = pairs_in(part) / pairs_in(batch)     # each comparison weighs the same
            (share * loss).backward()
            for name, x in found.items():
                metrics[name] += share * x
        metrics = parallel.total(metrics)
        grad_norm = parallel.clip_gradients(policy, cfg.grad_clip)
        optimizer.step()

        seen["step"] = step + 1
        seen["tokens"] += sum(len(tokens) for rows, _ in batch for tokens, _ in rows)
        log.batch = [row for rows, _ in batch for row in rows]
        log.write(step, **metrics, lr=lr, grad_norm=grad_norm)
        if log.due(seen["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **seen)
    return dict(steps=steps, tokens=seen["tokens"])


def pairs_in(groups):
    return sum(len(comparisons) for _, comparisons in groups)


@torch.no_grad()
def report(policy, reference, groups, pad, cfg):
    """What held-out comparisons say of the implicit reward. -> metrics, accuracy's 95 % interval"""
    metrics, pairs = Counter(), pairs_in(groups)
    for part in in_parts(groups, cfg.micro_batch_size or cfg.batch_size):
        for name, x in compare(policy, reference, part, pad, cfg)[1].items():
            metrics[name] += pairs_in(part) / pairs * x.item()
    low, high = interval(metrics["accuracy"] * pairs, pairs)
    return dict(metrics, accuracy_low=low, accuracy_high=high, pairs=pairs)


def main(cfg):
    device = setup(cfg)
    reference, tok = GPT.load(cfg.sft), tokenizer.load(cfg.sft)
    reference.resize_vocab(tok.vocab_size).to(device)
    if cfg.data:
        records, counts = data.preferences(cfg.data)
        groups, held_out = (
            by_prompt(data.encode_pairs(side, tok, reference.config.n_positions, counts))
            for side in data.split(records))
        print(f"data      {data.describe(counts)}")
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("loss", "accuracy", "margin", "lr"), decode=tok.decode)
    ceiling = {}
    if not cfg.data:
        groups, _ = compare_samples(reference, tok, cfg.prompts, cfg.responses, cfg, False)
        held_out, best = compare_samples(reference, tok, cfg.held_out_prompts, 2, cfg, True)
        ceiling = dict(accuracy_ceiling=best)
    print(f"pairs     {pairs_in(groups):,} comparisons of "
          f"{sum(len(rows) for rows, _ in groups):,} responses; {pairs_in(held_out):,} held out")

    policy = GPT.load(cfg.sft).resize_vocab(tok.vocab_size).to(device)
    print(f"policy    {policy}, on {device}")
    memory.tell(memory.comparisons(policy, reference, groups, cfg), device, cfg.micro_batch_size)
    fuse(cfg.compile, policy, reference)
    room = policy.config.n_positions - cfg.max_new_tokens
    shown = [tokens[:prompt_len][-room:] for [(tokens, prompt_len), *_], _ in held_out[:3]]
    before = answer(policy, tok, shown, cfg.max_new_tokens, seed=cfg.seed)
    log.every = max(1, len(groups) // cfg.batch_size // 20)
    summary = train(policy, reference, groups, tok.pad, cfg, log)
    parallel.finish()
    policy.save(cfg.out, **tok.special)
    tok.save(cfg.out)

    found = report(policy, reference, held_out, tok.pad, cfg)
    s = log.finish(**summary, **found, **ceiling)
    samples(cfg.out, before, answer(policy, tok, shown, cfg.max_new_tokens, seed=cfg.seed))
    curves(cfg.out, PANELS)
    print(f"accuracy  {s['accuracy']:.3f} of the implicit reward on {s['pairs']:,} held-out pairs "
          f"(95 %: {s['accuracy_low']:.3f} to {s['accuracy_high']:.3f})")
    if ceiling:
        print(f"ceiling   {best:.3f}, as annotators err")
    print(f"{s['seconds']:.0f} s; see {cfg.out}/curves.png and samples.md")
    print(f"next: python -m nanorlhf.evaluate --policy {cfg.out} --against {cfg.sft}")


def compare_samples(sft, tok, n, k, cfg, held_out):
    """The SFT model answers n prompts k times each, and annotators compare. -> groups, ceiling"""
    prompts = environment.prompts(n, cfg.seed, held_out)
    rows = sample_rows(sft, tok, [tok.encode(p) for p in prompts for _ in range(k)], cfg)
    return annotate(prompts, rows, tok, cfg)


if __name__ == "__main__":
    run(main, DPOConfig)
