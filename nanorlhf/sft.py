"""Supervised fine-tuning: raise the probability of responses that somebody wrote.

The loss is the cross-entropy of the response, end token included (Ouyang et al. 2022, section 3.5).
Plain text has no prompt, so all of its tokens are trained on: that is pretraining.
"""
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nanorlhf.logprobs import masked_mean, response_logprobs, whole_logprobs
from nanorlhf.model import GPT
from nanorlhf.support import loop
from nanorlhf.support.config import TrainConfig
from nanorlhf.support.data import collate, response_len, score_rows


@dataclass
class SFTConfig(TrainConfig):
    """Teach a GPT to imitate demonstrations, or pretrain it on plain text."""
    out: str = "out/sft"              # the run folder
    data: list[str] = field(default_factory=list)  # files of records; none: the built-in world
    demos: int = 16000                # demonstrations that the built-in authors write
    tokenizer: str = "builtin"        # builtin (learned from the data), gpt2, or a run folder
    init: str = "scratch"             # scratch, a run folder, or gpt2, gpt2-medium, -large, -xl
    vocab_size: int = 1024            # of a tokenizer that is learned
    n_layer: int = 2                  # size of a model from scratch
    n_head: int = 2                   # attention heads
    n_embd: int = 128                 # channels
    block_size: int = 160             # longest sequence, in tokens
    dropout: float = 0.0              # useful where data is scarce
    steps: int = 800                  # updates; 0: one pass over the data
    batch_size: int = 16              # sequences an update; many small steps beat few large ones
    learning_rate: float = 3e-3       # peak, after the warm-up; a cosine to a tenth follows
    warmup: int = 100                 # steps over which the learning rate rises from zero
    weight_decay: float = 0.01        # on matrices; none on biases and LayerNorms
    save_every: int = 500             # steps between saves that --resume continues from


def loss(model: GPT, tokens: Tensor, prompt_len: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats. tokens (B, T), mask (B, R) -> scalar"""
    return -masked_mean(response_logprobs(model, tokens, prompt_len, mask.shape[1]), mask)


def train(model: GPT, rows: list, held_out: list, pad: int, cfg: SFTConfig, log) -> dict:
    """Imitate rows of (tokens, prompt_len), as data.encode makes them. -> summary"""
    parts, state = dict(model=model, optimizer=make_optimizer(model, cfg)), dict(step=0, tokens=0)

    def loss_fn(batch):
        cross_entropy = loss(model, *collate(batch, pad, model.device))
        return cross_entropy, dict(loss=cross_entropy)

    for batch in loop.batches(rows, parts, loop.cosine, cfg, log, state):
        model.train()
        metrics = loop.step(loss_fn, batch, response_len, parts, cfg)
        if state["step"] + 1 == cfg.steps or (state["step"] + 1) % cfg.save_every == 0:
            metrics["held_out_loss"] = held_out_loss(model, held_out, pad, cfg)
        log.write(state["step"], **metrics)
    final = held_out_loss(model, held_out, pad, cfg)
    return dict(loss=final, perplexity=math.exp(final), steps=state["step"], tokens=state["tokens"])


def make_optimizer(model: GPT, cfg: SFTConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return loop.adamw([dict(params=matrices, weight_decay=cfg.weight_decay),
                       dict(params=vectors, weight_decay=0.0)], cfg.learning_rate)


def held_out_loss(model: GPT, rows: list, pad: int, cfg: SFTConfig) -> float:
    """Cross-entropy over held-out rows, each token counted once. -> nats a token"""
    model.eval()
    logprobs = score_rows(partial(whole_logprobs, model), rows, pad, model.device, cfg.dtype,
                          cfg.micro_batch_size or cfg.batch_size)
    return -logprobs.cpu().double().sum().item() / response_len(rows)
