"""A Bradley-Terry reward model: from choices between two responses to one number a response.

The SFT model's trunk with a scalar head, read at the last token of the response, one pass over the
comparisons with a learning rate annealed to zero (Ouyang et al. 2022, section 3.5). Afterwards
shifted and scaled so that the SFT model's own samples score mean 0 and standard deviation 1.
"""
import importlib.util
import math
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from nanorlhf import UserError, environment, tokenizer
from nanorlhf.logprobs import response_tokens
from nanorlhf.model import ScalarGPT
from nanorlhf.support import checkpoint, parallel
from nanorlhf.support.config import autocast
from nanorlhf.support.data import collate, endless, in_parts


@dataclass
class RMConfig:
    """Learn from comparisons how good a response is."""
    out: str = "out/rm"               # the run folder
    sft: str = "out/sft"              # whose trunk it starts from, and whose samples are compared
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
    learning_rate: float = 1e-3       # after 20 steps of warm-up; falls in a straight line to zero
    weight_decay: float = 0.01        # on every weight
    grad_clip: float = 1.0            # longest gradient step
    seed: int = 1                     # of the head, data order, samples and annotators
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False             # fuse with torch.compile: a long start, faster steps
    save_every: int = 200             # steps between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings
    RANGES = dict(responses=(2, math.inf))


# --- the loss ------------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected):
    """-log P(chosen beats rejected), P = sigmoid(chosen - rejected)   (Bradley & Terry 1952)

    Only differences count, so scores of two reward models cannot be compared. (B,), (B,) -> scalar
    """
    return -F.logsigmoid(chosen - rejected).mean()


def score(model, tokens, prompt_len, mask):
    """The reward at the last token of each response. tokens (B, T), mask (B, R) -> (B,)"""
    last = prompt_len + mask.sum(1) - 1
    return model(tokens)[torch.arange(len(tokens), device=tokens.device), last]


# --- comparisons ---------------------------------------------------------------------------------

def annotate(prompts, rows, tok, cfg):
    """The built-in annotators compare every two answers to each prompt. prompts: texts; rows: as
    many answers to each, side by side

    -> groups (rows, comparisons) as `train` takes them, and the accuracy that the annotators' own
    errors leave possible
    """
    annotator = environment.Annotator(cfg.annotator_temperature, cfg.likes_length)
    rng = random.Random(cfg.seed)
    groups, ceilings, k = [], [], len(rows) // len(prompts)
    for prompt, group in zip(prompts, in_parts(rows, k), strict=True):
        choices = annotator.compare(prompt, [tok.decode(t[n:]) for t, n in group], rng)
        groups.append((group, [(chosen, rejected) for chosen, rejected, _ in choices]))
        ceilings += [ceiling for *_, ceiling in choices]
    return groups, sum(ceilings) / len(ceilings)


def by_prompt(pairs):
    """Pairs of rows -> one group a prompt: (rows, comparisons), each response once.

    All comparisons of a prompt go into one batch, so that each response is read once however often
    it was compared (Ouyang et al. 2022, section 3.5). comparisons: (chosen, rejected) indices
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
    # The head is new and must travel far, the trunk is trained and need not: ten to one.
    rates = {10: model.score.parameters(), 1: model.transformer.parameters()}
    optimizer = torch.optim.AdamW([dict(params=list(params), times=times)
                                   for times, params in rates.items()],
                                  lr=cfg.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay, fused=True)
    parts, seen = dict(model=model, optimizer=optimizer), dict(step=0, tokens=0)
    if cfg.resume:
        seen = checkpoint.load_state(cfg.out, parts)
    steps = cfg.steps or math.ceil(len(groups) / cfg.batch_size)
    batches = endless(groups, cfg.batch_size, cfg.seed, seen["step"],
                      length=lambda group: max(len(tokens) for tokens, _ in group[0]))

    for step in log.steps(seen["step"], steps):
        model.train()
        anneal = min((step + 1) / 20, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * cfg.learning_rate * anneal
        optimizer.zero_grad()
        batch, metrics = next(batches), Counter()
        pairs = sum(len(comparisons) for _, comparisons in batch)
        for part in parallel.parts(batch, cfg.micro_batch_size):
            (tokens, prompt_len, mask), chosen, rejected = gather(part, pad, model.device)
            with autocast(model.device, cfg.dtype):
                scores = score(model, tokens, prompt_len, mask)
            loss = bradley_terry_loss(scores[chosen], scores[rejected])
            share = len(chosen) / pairs          # each comparison weighs the same, however we split
            (share * loss).backward()
            margin = (scores[chosen] - scores[rejected]).detach()
            for name, x in dict(loss=loss.detach(), margin=margin.mean(),
                                accuracy=(margin > 0).float().mean()).items():
                metrics[name] += share * x
        metrics = parallel.total(metrics)
        grad_norm = parallel.clip_gradients(model, cfg.grad_clip)
        optimizer.step()

        seen["step"] = step + 1
        seen["tokens"] += sum(len(tokens) for rows, _ in batch for tokens, _ in rows)
        log.batch = [row for rows, _ in batch for row in rows]
        log.write(step, **metrics, lr=optimizer.param_groups[1]["lr"], grad_norm=grad_norm)
        if log.due(seen["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **seen)
    model.eval()
    return dict(steps=steps, tokens=seen["tokens"])


@torch.no_grad()
def normalise(model, rows, pad, dtype):
    """Shift and scale the model so that rows, the SFT model's samples, score mean 0, deviation 1.

    The shift goes into the last LayerNorm's bias and the scale into the head, so the network needs
    no part that another library would not know. -> the mean and deviation that were taken out
    """
    scores = score_rows(model, rows, pad, dtype)
    mean, std = scores.mean(), scores.std()
    if not std > 0:
        raise UserError(f"the reward model says {mean.item():.3g} of every response: it has learnt "
                        "nothing to normalise; a lower --learning-rate is the usual cure")
    head = model.score.weight[0]
    model.transformer.ln_f.bias -= mean * head / (head @ head)
    head /= std
    return mean.item(), std.item()


@torch.no_grad()
def score_rows(model, rows, pad, dtype, batch_size=64):
    """rows: list of (tokens, prompt_len) -> scores, one a row"""
    scores = []
    for part in in_parts(rows, batch_size):
        with autocast(model.device, dtype):
            scores.append(score(model, *collate(part, pad, model.device)))
    return torch.cat(scores)


# --- how good is it? -----------------------------------------------------------------------------

def report(model, pairs, pad, dtype):
    """What held-out pairs of rows (chosen, rejected) say of a reward model. -> metrics, calibration

    Call it before `normalise`: the loss fixes the scale on which sigmoid(margin) is a probability.
    """
    chosen, rejected = (score_rows(model, rows, pad, dtype) for rows in zip(*pairs))
    margin = (chosen - rejected).cpu()
    low, high = interval((margin > 0).sum().item(), len(margin))
    longer = sum((len(c) > len(r)) + 0.5 * (len(c) == len(r)) for (c, _), (r, _) in pairs)
    longer /= len(pairs)
    table = calibration(margin)
    return dict(
        accuracy=(margin > 0).float().mean().item(), accuracy_low=low, accuracy_high=high,
        held_out_loss=bradley_terry_loss(chosen, rejected).item(),
        calibration_error=sum(n * abs(said - was) for said, was, n in table) / len(margin),
        length_accuracy=max(longer, 1 - longer), pairs=len(pairs)), table


def calibration(margin, bins=5):
    """Does "80 % sure" come true 80 % of the time? -> list of (said, came true, pairs), one a bin

    A pair is read from the side that the model favours, so that what is said is at least a half.
    """
    said, true = margin.abs().sigmoid(), (margin > 0).float()
    at = ((said - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [(said[at == b].mean().item(), true[at == b].mean().item(), int((at == b).sum()))
            for b in range(bins) if (at == b).any()]


def interval(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): never leaves [0, 1], good for small n."""
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


# --- scores for PPO: plain functions (tokens, prompt_len, mask) -> (B,) --------------------------

def load(folder):
    """The reward model saved in a folder. -> ScalarGPT: tokens (B, T) -> (B, T)"""
    return ScalarGPT.load(folder, fresh_head=False)


def load_beside(folder, policy, tok):
    """The reward model in a folder, if it can read whatever the policy writes. -> ScalarGPT"""
    model, positions = load(folder), policy.config.n_positions
    if tokenizer.load(folder).ranks != tok.ranks:
        raise UserError(f"{folder}: expected a reward model with the policy's vocabulary, came one "
                        "with another: they would read each other's tokens as other words")
    if model.config.n_positions < positions:
        raise UserError(f"{folder}: expected a reward model that reads {positions} tokens as the "
                        f"policy does, came one of {model.config.n_positions}")
    return model.to(policy.device)


def by_model(reward_model):
    return lambda tokens, prompt_len, mask: score(reward_model, tokens, prompt_len, mask)


def by_text(function, tokenizer):
    """A function (list of (prompt, response) texts -> list of floats) as a score function."""
    def scores(tokens, prompt_len, mask):
        responses = response_tokens(tokens, prompt_len, mask.shape[1])
        pairs = [(tokenizer.decode(row[:n].tolist()), tokenizer.decode(response[kept].tolist()))
                 for row, n, response, kept in zip(tokens, prompt_len, responses, mask)]
        found = theirs("the reward function", function, pairs)
        return torch.tensor(checked(found, pairs), device=tokens.device)
    return scores


def true_reward(tokenizer):
    """The built-in world's own judgement, which training never sees unless it is asked to."""
    return by_text(lambda pairs: [environment.gold(*pair) for pair in pairs], tokenizer)


def score_function(cfg, tokenizer, policy):
    """What --reward names."""
    if cfg.reward == "rm":
        return by_model(load_beside(cfg.rm, policy, tokenizer))
    if cfg.reward == "env":
        return true_reward(tokenizer)
    return by_text(load_function(cfg.reward), tokenizer)


def checked(found, pairs):
    """What a reward function returned, if it is a finite number for each pair. -> list of floats"""
    try:
        scores = [float(x) for x in found]
    except (TypeError, ValueError, RuntimeError):
        scores = []
    expected = f"the reward function must return {len(pairs)} finite numbers, one a response; it "
    if len(scores) != len(pairs):
        raise UserError(f"{expected}returned {found!r:.60}")
    for x, (prompt, response) in zip(scores, pairs):
        if not math.isfinite(x):
            raise UserError(f"{expected}returned {x} for {response!r:.200}, "
                            f"said to {prompt!r:.200}")
    return scores


def theirs(what, function, *args):
    """Call code that is not ours. If it fails, its traceback is of use, and ours is not."""
    try:
        return function(*args)
    except Exception as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        raise UserError(f"{what} raised {type(error).__name__}, see above: {error}") from None


def load_function(name):
    """FILE.py:FUNCTION -> the function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--reward: expected rm, env or FILE.py:FUNCTION, got {name}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    theirs(path, spec.loader.exec_module, module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward: {path} has no function {function!r}")
    return getattr(module, function)
