"""A Bradley-Terry reward model: from choices between two responses to one number a response.

The SFT model's trunk with a scalar head, read at the last token of the response, one pass over the
comparisons with a learning rate annealed to zero (Ouyang et al. 2022, section 3.5). Afterwards shifted
and scaled so that the SFT model's own samples score mean 0 and standard deviation 1.
"""
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from nanorlhf import UserError, checkpoint
from nanorlhf.config import autocast
from nanorlhf.data import by_length, collate
from nanorlhf.evaluate import interval
from nanorlhf.logprobs import masked_mean, response_logprobs
from nanorlhf.model import ScalarGPT


@dataclass
class RMConfig:
    """Learn from comparisons how good a response is."""
    out: str = "out/rm"               # the run folder
    sft: str = "out/sft"              # whose trunk it starts from, and whose samples are compared
    data: list[str] = field(default_factory=list)  # files of preferences; none: the built-in annotators
    prompts: int = 2500               # prompts to sample responses to (built-in world)
    responses: int = 4                # a prompt; annotators compare every two of them
    annotator_temperature: float = 0.5  # how unsure annotators are: 0.5 errs on about 15 % of pairs
    max_new_tokens: int = 80          # longest sampled response
    steps: int = 0                    # updates; 0: one pass over the comparisons
    batch_size: int = 16              # prompts an update, with all their comparisons
    learning_rate: float = 1e-3       # at the first step; falls to zero in a straight line
    lm_coef: float = 0.5              # weight of the language-modelling loss that keeps the trunk alive
    weight_decay: float = 0.01        # on every weight
    grad_clip: float = 1.0            # longest gradient step
    seed: int = 1                     # of the head, data order, samples and annotators
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    save_every: int = 200             # steps between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings


# --- the loss ------------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected):
    """-log P(chosen beats rejected), P = sigmoid(chosen - rejected)   (Bradley & Terry 1952)

    Only differences count, so the scores of two reward models cannot be compared. (B,), (B,) -> scalar
    """
    return -F.logsigmoid(chosen - rejected).mean()


def score(model, tokens, prompt_len, mask):
    """The reward at the last token of each response. tokens (B, T), mask (B, R) -> (B,)"""
    last = prompt_len + mask.sum(1) - 1
    return model(tokens)[torch.arange(len(tokens), device=tokens.device), last]


# --- comparisons ---------------------------------------------------------------------------------

def by_prompt(pairs):
    """Pairs of rows -> one group a prompt: (rows, comparisons), each response once.

    All comparisons of a prompt go into one batch, so that each response is read once however often
    it was compared (Ouyang et al. 2022, section 3.5). comparisons: list of (chosen, rejected) indices
    """
    groups = {}
    for pair in pairs:
        tokens, prompt_len = pair[0]
        rows, comparisons = groups.setdefault(tuple(tokens[:prompt_len]), ({}, []))
        comparisons.append(tuple(rows.setdefault((tuple(t), n), len(rows)) for t, n in pair))
    return [([(list(t), n) for t, n in rows], comparisons) for rows, comparisons in groups.values()]


def gather(groups, pad, device):
    """Groups -> their rows in one batch, and where in it the chosen and the rejected stand."""
    rows, chosen, rejected = [], [], []
    for group, comparisons in groups:
        chosen += [len(rows) + i for i, _ in comparisons]
        rejected += [len(rows) + j for _, j in comparisons]
        rows += group
    return collate(rows, pad, device), chosen, rejected


# --- training ------------------------------------------------------------------------------------

def train(model, groups, pad, cfg, log):
    """One pass over the comparisons. model: ScalarGPT, groups as by_prompt makes them -> summary"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay, fused=True)
