"""One optimiser step, and the loop around it: SFT, reward model, PPO, DPO and ILQL all use these.

    parts = dict(model=model, optimizer=adamw(model.parameters(), 1e-3))
    state = dict(step=0, tokens=0)
    for batch in batches(rows, parts, linear, cfg, log, state):
        metrics = step(loss_fn, batch, weight, parts, cfg)
        log.write(state["step"], **metrics)

A save holds `parts`, which are models and optimizers by name, and the numbers in `state`.
"""
import math
from collections import Counter

import torch

from nanorlhf.support import checkpoint, parallel
from nanorlhf.support.config import autocast
from nanorlhf.support.data import endless


def adamw(params, learning_rate, weight_decay=0.0, eps=1e-8):
    """AdamW. params: parameters, or groups (dicts) of which some may have a rate of their own."""
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.95), eps=eps,
                                  weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]          # the schedule multiplies this one
    return optimizer


def linear(step, steps, warmup):
    """Up in a straight line during the warm-up, then down in one to zero. -> factor from 0 to 1"""
    return min((step + 1) / max(1, warmup), 1 - step / steps)


def cosine(step, steps, warmup):
    """Up in a straight line, then down to a tenth along a cosine. -> factor from 0 to 1"""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def batches(items, parts, schedule, cfg, log, state, rows_of=lambda row: [row], batch_size=0):
    """Yield the batch of every step that is left to do: of cfg.steps, or of one pass if that is 0.

    The caller makes the step. Before it the learning rates are set, after it all is saved if due.
    `state` is changed in place: "step" counts the steps that are done, "tokens" what was read.
    schedule: linear or cosine; rows_of: item of a batch -> its rows (tokens, prompt_len)
    """
    def length(item):                     # items of similar length share a batch
        return max(len(tokens) for tokens, _ in rows_of(item))

    batch_size = batch_size or cfg.batch_size
    steps = cfg.steps or math.ceil(len(items) / batch_size)
    if cfg.resume:
        state |= checkpoint.load_state(cfg.out, parts)
    source = endless(items, batch_size, cfg.seed, state["step"], length)
    for number in log.steps(state["step"], steps):
        for optimizer in optimizers(parts).values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(number, steps, cfg.warmup)
        batch = next(source)
        log.batch = [row for item in batch for row in rows_of(item)]
        state["tokens"] += sum(len(tokens) for tokens, _ in log.batch)
        yield batch
        state["step"] = number + 1
        if log.due(state["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **state)


def step(loss_fn, batch, weight, parts, cfg):
    """One step of every optimizer in `parts`, on cfg.micro_batch_size rows at a time. -> metrics

    loss_fn: part of a batch -> loss, metrics; both are means over the tokens (or the pairs) in it
    weight:  part of a batch -> how many tokens (or pairs) that are

    Each part counts by its share, so that the gradient is the one of the whole batch.
    """
    for optimizer in optimizers(parts).values():
        optimizer.zero_grad()
    whole, metrics = weight(batch), Counter()
    device = next(iter(optimizers(parts).values())).param_groups[0]["params"][0].device
    for part in parallel.micro_batches(batch, cfg.micro_batch_size):
        with autocast(device, cfg.dtype):
            loss, numbers = loss_fn(part)
        share = weight(part) / whole
        (share * loss).backward()
        for name, x in numbers.items():
            metrics[name] += share * x.detach()
    metrics = parallel.sum_metrics(metrics)

    for name, optimizer in optimizers(parts).items():
        prefix = name.removesuffix("optimizer")        # "", or for example "policy_"
        params = [p for group in optimizer.param_groups for p in group["params"]]
        metrics[prefix + "grad_norm"] = parallel.clip_gradients(params, cfg.grad_clip)
        metrics[prefix + "lr"] = optimizer.param_groups[-1]["lr"]
        optimizer.step()
    return metrics


def optimizers(parts):
    return {name: x for name, x in parts.items() if isinstance(x, torch.optim.Optimizer)}
