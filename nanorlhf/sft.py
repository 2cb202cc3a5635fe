"""Imitate: cross-entropy on the response, the end token included (Ouyang et al. 2022, section 3.5).

A record that is plain text has no prompt, so every one of its tokens is trained on: pretraining is
this same file. In: a GPT and rows (tokens, prompt_len). Out: the GPT, better.
"""
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from nanorlhf.logprobs import masked_mean, response_logprobs
from nanorlhf.support import checkpoint, parallel
from nanorlhf.support.config import autocast
from nanorlhf.support.data import collate, endless, in_parts


@dataclass
class SFTConfig:
    """Teach a GPT to imitate demonstrations, or pretrain it on plain text."""
    out: str = "out/sft"              # the run folder
    data: list[str] = field(default_factory=list)  # files of records; none: the built-in world
    demos: int = 16000                # demonstrations that the built-in authors write
    tokenizer: str = "builtin"        # builtin (learned from the data), gpt2, or a run folder
    init: str = "scratch"             # scratch, a run folder, or gpt2, gpt2-medium, -large, -xl
    vocab_size: int = 1024            # of a tokenizer that is learned
    n_layer: int = 4                  # size of a model from scratch
    n_head: int = 4                   # attention heads
    n_embd: int = 128                 # channels
    block_size: int = 160             # longest sequence, in tokens
    dropout: float = 0.0          # worth having where data is scarce
    steps: int = 1000                 # updates
    batch_size: int = 16              # sequences an update; many small steps beat few large ones
    micro_batch_size: int = 0         # sequences in memory at once, same result; 0: no limit
    learning_rate: float = 2e-3       # peak, after the warm-up
    warmup: int = 100                 # steps of linear warm-up; a cosine to a tenth follows
    weight_decay: float = 0.01        # on matrices; biases and LayerNorms go free
    grad_clip: float = 1.0            # longest gradient step
    seed: int = 1                     # of weights, data order and built-in authors
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False             # fuse with torch.compile: a long start, faster steps
    save_every: int = 500             # steps between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings


def loss(model, tokens, prompt_len, mask):
    """Mean cross-entropy of the response tokens, in nats. tokens (B, T), mask (B, R) -> scalar"""
    return -masked_mean(response_logprobs(model, tokens, prompt_len, mask.shape[1]), mask)


def learning_rate(step, cfg):
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < cfg.warmup:
        return cfg.learning_rate * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, cfg):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=cfg.weight_decay),
                              dict(params=others, weight_decay=0.0)],
                             lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def held_out_loss(model, rows, pad, batch_size, dtype):
    """Cross-entropy over held-out rows, each token counted once. -> nats a token"""
    model.eval()
    total = count = 0
    for part in in_parts(rows, batch_size):
        tokens, prompt_len, mask = collate(part, pad, model.device)
        with autocast(model.device, dtype):
            total += loss(model, tokens, prompt_len, mask).item() * mask.sum().item()
        count += mask.sum().item()
    return total / count


def train(model, rows, held_out, pad, cfg, log):
    """Imitate rows of (tokens, prompt_len), as data.encode makes them. -> summary"""
    optimizer = make_optimizer(model, cfg)
    parts, seen = dict(model=model, optimizer=optimizer), dict(step=0, tokens=0)
    if cfg.resume:
        seen = checkpoint.load_state(cfg.out, parts)
    batches = endless(rows, cfg.batch_size, cfg.seed, seen["step"])
    measure = partial(held_out_loss, model, held_out, pad, cfg.batch_size, cfg.dtype)
    final = None

    for step in log.steps(seen["step"], cfg.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.zero_grad()
        batch, metrics = next(batches), dict(loss=0.0)
        targets = sum(len(tokens) - prompt_len for tokens, prompt_len in batch)
        for rows in parallel.parts(batch, cfg.micro_batch_size):
            tokens, prompt_len, mask = collate(rows, pad, model.device)
            with autocast(model.device, cfg.dtype):
                part = loss(model, tokens, prompt_len, mask) * mask.sum() / targets
            part.backward()
            metrics["loss"] += part.detach()
        metrics = parallel.total(metrics)
        grad_norm = parallel.clip_gradients(model, cfg.grad_clip)
        optimizer.step()

        seen = dict(step=step + 1, tokens=seen["tokens"] + targets)
        metrics |= dict(lr=learning_rate(step, cfg), grad_norm=grad_norm)
        if seen["step"] % cfg.save_every == 0 or seen["step"] == cfg.steps:
            final = metrics["held_out_loss"] = measure()
        log.batch = batch
        log.write(step, **metrics)
        if log.due(seen["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **seen)
    if final is None:       # nothing was left to do
        final = measure()
    return dict(loss=final, perplexity=math.exp(final), steps=cfg.steps, tokens=seen["tokens"])
