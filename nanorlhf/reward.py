"""A Bradley-Terry reward model: from choices between two responses to one number for a response.

It is the SFT model's trunk with a head of model.py, ReadingGPT unless told otherwise, read at the
last token of the response. It learns in one pass (Ouyang et al. 2022, section 3.5).
"""
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorlhf import environment, tokenizer
from nanorlhf.generate import generate_rows
from nanorlhf.model import GPT, ReadingGPT, ScalarGPT
from nanorlhf.support import UserError, data, loop, user_code
from nanorlhf.support.config import SampleConfig
from nanorlhf.support.data import collate, flatten, in_parts, pairs_in, rows_of, score_rows
from nanorlhf.support.stats import accuracy_of, interval

FEWEST = 100             # updates by default; with fewer the model would stay close to its start
HEADS = dict(reading=ReadingGPT, scalar=ScalarGPT)


@dataclass
class ComparisonConfig(SampleConfig):
    """The comparisons that reward models and DPO learn from."""
    responses: int = 4                # to each prompt; annotators compare every two of them
    annotator_temperature: float = 0.45  # of annotators: they err on about 13 % of pairs
    likes_length: float = 0.0         # bias of annotators: reward they add for each word
    near_misses: bool = True          # also compare answers to a request that differs in one word
    held_out_prompts: int = 1000      # prompts to measure on, one comparison each (built-in world)
    batch_size: int = 4               # prompts an update, with all their comparisons
    micro_batch_size: int = 0         # prompts in memory at once, same result; 0: no limit
    RANGES = dict(responses=(2, math.inf))


@dataclass
class RMConfig(ComparisonConfig):
    """Learn from comparisons how good a response is."""
    out: str = "out/rm"               # the run folder
    init: str = ""                    # a reward model whose head goes on learning; none: a new one
    annotator: str = ""               # of files of labels, this person's alone; none: everyone's
    head: Literal["auto", *HEADS] = "auto"  # of model.py; auto: reading; for files: scalar
    steps: int = 0                    # updates; 0: one pass over the data, and at least 100
    learning_rate: float = 4e-4       # peak, after the warm-up; falls in a straight line to zero
    weight_decay: float = 0.01        # on every weight


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P(chosen beats rejected), P = sigmoid(chosen - rejected)   (Bradley & Terry 1952)

    Only differences count, so scores of two reward models cannot be compared. (B,), (B,) -> scalar
    """
    return -F.logsigmoid(chosen - rejected).mean()


def score(model: ScalarGPT, tokens: Tensor, prompt_len: Tensor, mask: Tensor) -> Tensor:
    """The score: the number at each response's last token. tokens (B, T), mask (B, R) -> (B,)"""
    last = prompt_len + mask.sum(1) - 1
    return model(tokens, prompt_len)[torch.arange(len(tokens), device=tokens.device), last]


def from_samples(sft: GPT, tok, cfg: ComparisonConfig):
    """Comparisons of the SFT model's samples. -> groups, held-out groups, best possible accuracy"""
    groups, _ = compare_samples(sft, tok, cfg.prompts, cfg.responses, cfg, held_out=False)
    return groups, *compare_samples(sft, tok, cfg.held_out_prompts, 2, cfg, held_out=True)


def compare_samples(sft: GPT, tok, n: int, k: int, cfg: ComparisonConfig, held_out: bool):
    """Annotators compare every two of k answers of the SFT model to each of n prompts.
    -> groups, and the accuracy that the annotators' own errors leave possible

    With near misses, two prompts that differ in one word share their answers: half are written for
    the one and half for the other. So half of the answers to a prompt miss what was asked in one
    point. Odd numbers n and k are then rounded up.
    """
    prompts, rng, share = environment.prompts(n, cfg.seed, held_out), random.Random(cfg.seed), 1
    if cfg.near_misses and not held_out:
        prompts = [p for one in prompts[::2] for p in (one, environment.near_miss(one, rng))]
        share = 2
    encoded, G = [tok.encode(p) for p in prompts], math.ceil(k / share)
    rows = generate_rows(sft, encoded, cfg.max_new_tokens, tok.eos, tok.pad, G=G,
                         batch_size=cfg.micro_batch_size * G, dtype=cfg.dtype)
    annotator = environment.Annotator(cfg.annotator_temperature, cfg.likes_length)
    groups, ceilings, shared = [], [], [*in_parts(rows, share * G)]
    for i, (prompt, start) in enumerate(zip(prompts, encoded)):
        answers = [tokens[prompt_len:] for tokens, prompt_len in shared[i // share]]
        choices = annotator.compare(prompt, [tok.decode(answer) for answer in answers], rng)
        groups.append(([(start + answer, len(start)) for answer in answers],
                       [(chosen, rejected) for chosen, rejected, _ in choices]))
        ceilings += [ceiling for *_, ceiling in choices]
    return groups, sum(ceilings) / len(ceilings)


def new_model(cfg: RMConfig, sft: GPT, tok) -> ScalarGPT:
    """What training starts from: the reward model that --init names, or the SFT model's trunk with
    a new head. Raises UserError where --head names another one than the folder has."""
    if not cfg.init:
        # Few comparisons leave the reading head near what the language model finds likely.
        auto = "scalar" if cfg.data else "reading"
        kind = HEADS[auto if cfg.head == "auto" else cfg.head]
        return kind.load(cfg.sft).resize_vocab(tok.vocab_size).to(sft.device)
    model = load_for(cfg.init, sft, tok)
    if cfg.head != "auto" and type(model) is not HEADS[cfg.head]:
        raise UserError(f"--head: expected that of {cfg.init}, or none, came {cfg.head}")
    return model


def train(model: ScalarGPT, groups: list, pad: int, cfg: RMConfig, log) -> dict:
    """One pass over the comparisons, and more where they are few; the model learns in place.
    -> summary"""
    steps = cfg.steps or max(FEWEST, math.ceil(len(groups) / cfg.batch_size))
    # The scalar head is new and has far to go: ten times the rate for it. With --init the whole
    # head learns at this rate and the trunk stays, which would learn few labels by heart.
    rest = dict(model.named_parameters())
    fast = [rest.pop(name) for name in [*rest]
            if name == "score.weight" or cfg.init and not name.startswith("transformer.")]
    model.transformer.requires_grad_(not cfg.init)
    weights = [dict(params=fast, lr=10 * cfg.learning_rate),
               dict(params=[] if cfg.init else [*rest.values()])]
    optimizer = loop.adamw(weights, cfg.learning_rate, cfg.weight_decay)
    parts, state = dict(model=model, optimizer=optimizer), dict(step=0, tokens=0)

    def loss_fn(groups):
        rows, chosen, rejected = flatten(groups)
        scores = score(model, *collate(rows, pad, model.device))
        loss = bradley_terry_loss(scores[chosen], scores[rejected])
        margin = scores[chosen] - scores[rejected]
        return loss, dict(loss=loss, accuracy=accuracy_of(margin), margin=margin.mean())

    for batch in loop.batches(groups, parts, loop.linear, replace(cfg, steps=steps), log, state,
                              rows_of):
        model.train()
        log.write(state["step"], **loop.step(loss_fn, batch, pairs_in, parts, cfg))
    model.eval()
    return dict(steps=state["step"], tokens=state["tokens"])


@torch.no_grad()
def normalise(model: ScalarGPT, rows: list, pad: int, dtype: str) -> tuple[float, float]:
    """Shift and scale the model so that rows, the SFT model's samples, score mean 0, deviation 1.
    -> mean and deviation before"""
    scores = score_rows(by_model(model), rows, pad, model.device, dtype)
    mean, std = scores.mean(), scores.std()
    if not std > 0:
        raise UserError(f"the reward model gives {mean.item():.3g} to every response: it has learnt"
                        " nothing to normalise; a lower --learning-rate is the usual remedy")
    model.rescale(mean, std, data.response_len(rows) / len(rows))
    return mean.item(), std.item()


def report(score, groups: list, pad: int, device, dtype: str, batch_size: int = 64):
    """What held-out comparisons say of a score function. -> metrics, the margin of each pair"""
    rows, chosen, rejected = flatten(groups)
    scores = score_rows(score, rows, pad, device, dtype, batch_size).cpu().double()
    lengths = torch.tensor([float(len(tokens)) for tokens, _ in rows])
    margin, n = scores[chosen] - scores[rejected], len(chosen)
    accuracy, longer = accuracy_of(margin).item(), accuracy_of(lengths[chosen] - lengths[rejected])
    low, high = interval(accuracy * n, n)
    return dict(accuracy=accuracy, accuracy_low=low, accuracy_high=high, pairs=n,
                held_out_loss=bradley_terry_loss(scores[chosen], scores[rejected]).item(),
                length_accuracy=max(longer, 1 - longer).item()), margin


def score_function(cfg, tok, policy: GPT):
    """The score function that --reward names: (tokens (B, T), prompt_len (B,), mask (B, R)) -> (B,)
    Raises UserError where it is not rm, env or FILE.py:FUNCTION."""
    if cfg.reward == "rm":
        return by_model(load_for(cfg.rm, policy, tok))
    if cfg.reward == "env":
        return true_reward(tok)
    return user_code.by_text(user_code.load(cfg.reward), tok)


def by_model(reward_model: ScalarGPT):
    return lambda tokens, prompt_len, mask: score(reward_model, tokens, prompt_len, mask)


def true_reward(tok):
    """The built-in world's own judgement, which training never sees unless it is asked to."""
    return user_code.by_text(lambda pairs: [environment.gold(*pair) for pair in pairs], tok)


def load(folder: str) -> ScalarGPT:
    """The reward model saved in a folder. -> a model, tokens (B, T) -> (B, T)"""
    return ScalarGPT.load(folder, fresh_head=False)


def load_for(folder: str, policy: GPT, tok) -> ScalarGPT:
    """The reward model in a folder, on the policy's device. Raises UserError where it cannot read
    all that the policy writes."""
    model = load(folder)
    model.check_reads(policy, tokenizer.load(folder).ranks == tok.ranks, folder)
    return model.to(policy.device)
