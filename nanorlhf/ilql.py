"""Implicit language Q-learning (Snell et al. 2022): learn from logged responses and their scores.

    python -m nanorlhf.ilql                                 the built-in world
    python -m nanorlhf.ilql --reward env                    scored by the truth instead
    python -m nanorlhf.ilql --data hh.jsonl.gz --sft out/hh-sft --rm out/hh-rm --out out/hh-ilql

Nothing is sampled while it learns. Q says what a token is worth after what stands before it, V what
that is worth by itself, and the policy that comes out is the language model's own, tilted by
beta (Q - V). The heads read the frozen SFT trunk, so the language model stays as it was.

Left out on purpose: the paper's one-step targets are `--lam 0`; rewards that come at the very end
then travel back one token a pass, and in the time given here hardly leave the last sentence.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch

from nanorlhf import environment, reward, tokenizer
from nanorlhf.advantages import gae
from nanorlhf.generate import answer, sample_rows
from nanorlhf.logprobs import masked_mean, response_tokens, response_window, token_logprobs
from nanorlhf.model import GPT, QGPT, wide
from nanorlhf.support import checkpoint, data, memory, parallel
from nanorlhf.support.config import autocast, run, setup
from nanorlhf.support.data import collate, endless, in_parts
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples

PANELS = [("Q loss", "score units, squared", ["q_loss"]),
          ("V loss", "score units, squared", ["v_loss"]),
          ("Conservative loss", "nats / token", ["cql_loss"]),
          ("Worth", "deviations of the score", ["q", "v"]), ("Gradient norm", "", ["grad_norm"])]


@dataclass
class ILQLConfig:
    """Learn from logged responses and their scores which tokens pay, and write more of them."""
    out: str = "out/ilql"             # the run folder
    sft: str = "out/sft"              # the language model; of the built-in world it writes the log
    rm: str = "out/rm"                # the reward model
    reward: str = "rm"                # score: rm, env (the built-in truth), or FILE.py:FUNCTION
    data: list[str] = field(default_factory=list)  # files of preferences; none: the built-in world
    prompts: int = 3000               # prompts to sample responses to (built-in world)
    responses: int = 4                # a prompt
    max_new_tokens: int = 80          # longest sampled response
    steps: int = 0                    # updates; 0: one pass over the log
    batch_size: int = 32              # responses an update
    micro_batch_size: int = 0         # responses in memory at once, same result; 0: no limit
    learning_rate: float = 3e-3       # after 20 steps of warm-up; falls in a straight line to zero
    tau: float = 0.7                  # V is this expectile of Q: 0.5 the mean, 1 the best
    lam: float = 0.95                 # Q's target: 0 the next V, 1 the score itself
    gamma: float = 1.0                # discount; a response is short, so none
    cql: float = 0.1                  # weight of the conservative term
    polyak: float = 0.05              # how far the target heads follow at each step
    beta: float = 8.0                 # tilt of the policy that comes out: nats a deviation of score
    grad_clip: float = 1.0            # longest gradient step
    seed: int = 1                     # of the data order and samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    save_every: int = 200             # steps between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings


# --- the losses ----------------------------------------------------------------------------------

def expectile_loss(q, v, mask, tau=0.7):
    """|tau - 1[q < v]| (q - v)^2: v is drawn to the tau-expectile of q, above its mean if tau > 1/2
    (Kostrikov et al. 2021, eq. 5). Where q exceeds v the square counts tau, elsewhere 1 - tau.

    All (B, R) -> scalar
    """
    gap = q - v
    return masked_mean((tau - (gap < 0).to(gap.dtype)).abs() * gap ** 2, mask)


def q_targets(scores, values, mask, gamma=1.0, lam=0.95):
    """What Q should have said of each token: with lam = 0 what follows, gamma V, and for the last
    token the score; with lam = 1 the score, discounted; in between a mixture, as in TD(lambda).

    scores (B,), values (B, R), mask (B, R) -> (B, R)
    """
    rewards = torch.zeros_like(values)
    rewards[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] = scores
    return gae(rewards, values, mask, gamma, lam) + values


def losses(model, tokens, prompt_len, mask, scores, cfg):
    """All of a batch of logged responses. -> loss, metrics"""
    R, chosen = mask.shape[1], response_tokens(tokens, prompt_len, mask.shape[1])
    with torch.no_grad():
        hidden = response_window(model.transformer(tokens), prompt_len, R)           # (B, R, C)
        target_q = torch.minimum(*(of_chosen(q(hidden), chosen) for q in model.target_q))
    values = wide(model.v(hidden).squeeze(-1))                                          # (B, R)
    targets = q_targets(scores, values.detach(), mask, cfg.gamma, cfg.lam)
    every_q = [q(hidden) for q in model.q]                                         # 2 x (B, R, V)
    q = [of_chosen(x, chosen) for x in every_q]
    q_loss = sum(masked_mean((x - targets) ** 2, mask) for x in q)
    v_loss = expectile_loss(target_q, values, mask, cfg.tau)
    # Of tokens that nobody wrote nothing is known: a cross-entropy holds them below the written one
    # (Snell et al. 2022, eq. 4), else the maximum over tokens finds the one most overestimated.
    cql_loss = sum(-masked_mean(token_logprobs(x, chosen), mask) for x in every_q)
    metrics = dict(q_loss=q_loss, v_loss=v_loss, cql_loss=cql_loss, q=masked_mean(q[0], mask),
                   v=masked_mean(values, mask))
    return q_loss + v_loss + cfg.cql * cql_loss, {k: x.detach() for k, x in metrics.items()}


def of_chosen(q, chosen):
    """q (B, R, V), chosen (B, R) -> (B, R)"""
    return wide(q.gather(-1, chosen[..., None]).squeeze(-1))


# --- training ------------------------------------------------------------------------------------

def train(model, rows, scores, pad, cfg, log):
    """rows: logged (tokens, prompt_len); scores: a float each. The heads learn. -> summary"""
    model.transformer.requires_grad_(False)
    model.eval()
    heads = [*model.q.parameters(), *model.v.parameters()]
    optimizer = torch.optim.AdamW(heads, lr=cfg.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    parts, seen = dict(model=model, optimizer=optimizer), dict(step=0, tokens=0)
    if cfg.resume:
        seen = checkpoint.load_state(cfg.out, parts)
    steps = cfg.steps or math.ceil(len(rows) / cfg.batch_size)
    batches = endless(list(zip(rows, scores, strict=True)), cfg.batch_size, cfg.seed, seen["step"],
                      length=lambda pair: len(pair[0][0]))

    for step in log.steps(seen["step"], steps):
        lr = cfg.learning_rate * min((step + 1) / 20, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        batch, metrics = next(batches), Counter()
        written = sum(len(tokens) - prompt_len for (tokens, prompt_len), _ in batch)
        for part in in_parts(parallel.mine(batch), cfg.micro_batch_size):
            tokens, prompt_len, mask = collate([row for row, _ in part], pad, model.device)
            with autocast(model.device, cfg.dtype):
                loss, found = losses(model, tokens, prompt_len, mask,
                                     torch.tensor([x for _, x in part], device=model.device), cfg)
            share = mask.sum() / written            # each token weighs the same, however we split
            (share * loss).backward()
            for name, x in found.items():
                metrics[name] += share * x
        metrics = parallel.total(metrics)
        grad_norm = parallel.clip_gradients(model, cfg.grad_clip)
        optimizer.step()
        follow(model, cfg.polyak)

        seen["step"] = step + 1
        seen["tokens"] += written
        log.batch = [row for row, _ in batch]
        log.write(step, **metrics, lr=lr, grad_norm=grad_norm)
        if log.due(seen["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **seen)
    model.beta.fill_(cfg.beta)
    return dict(steps=steps, tokens=seen["tokens"])


@torch.no_grad()
def follow(model, polyak):
    """The target heads go a little of the way to the learning ones (Lillicrap et al. 2015)."""
    for target, q in zip(model.target_q.parameters(), model.q.parameters()):
        target.lerp_(q, polyak)


# --- the log of the past -------------------------------------------------------------------------

def score_log(score, rows, pad, device, dtype, batch_size=64):
    """Scores of logged rows, shifted and scaled to mean 0 and deviation 1. -> list of floats"""
    scores = []
    for part in in_parts(rows, batch_size):
        with torch.no_grad(), autocast(device, dtype):
            scores += score(*collate(part, pad, device)).tolist()
    # In float64 the mean of equal scores is that score; in float32 it misses it by a last digit,
    # the deviation is as small, and the noise over the noise would be scores of about one.
    scores = torch.tensor(scores, dtype=torch.float64)
    return ((scores - scores.mean()) / (scores.std(correction=0) + 1e-8)).tolist()


def logged(sft, tok, cfg):
    """Responses that somebody wrote: both sides of the files' pairs, or the SFT model's own samples

    -> rows (tokens, prompt_len) to learn from, held-out prompts as token lists
    """
    if cfg.data:
        records, counts = data.preferences(cfg.data)
        train, held_out = (data.encode_pairs(side, tok, sft.config.n_positions, counts)
                           for side in data.split(records))
        print(f"data      {data.describe(counts)}")
        room = sft.config.n_positions - cfg.max_new_tokens
        return ([row for pair in train for row in pair],
                [tokens[:n][-room:] for (tokens, n), _ in held_out])
    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, cfg.seed)]
    rows = sample_rows(sft, tok, [p for p in prompts for _ in range(cfg.responses)], cfg)
    return rows, [tok.encode(p) for p in environment.prompts(3, cfg.seed, held_out=True)]


def main(cfg):
    device = setup(cfg)
    sft, tok = GPT.load(cfg.sft), tokenizer.load(cfg.sft)
    sft.resize_vocab(tok.vocab_size).to(device)
    score = reward.score_function(cfg, tok, sft)
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("q_loss", "v_loss", "cql_loss", "lr"), decode=tok.decode)
    rows, held_out = logged(sft, tok, cfg)
    scores = score_log(score, rows, tok.pad, device, cfg.dtype)
    print(f"log       {len(rows):,} responses, scored by {cfg.reward}")

    model = QGPT(sft.config).to(device)
    model.transformer.load_state_dict(sft.transformer.state_dict())
    print(f"policy    {model}, on {device}")
    memory.tell(memory.ilql(model, rows, cfg), device, cfg.micro_batch_size)
    log.every = max(1, len(rows) // cfg.batch_size // 20)
    summary = train(model, rows, scores, tok.pad, cfg, log)
    parallel.finish()
    model.save(cfg.out, **tok.special)
    tok.save(cfg.out)

    s = log.finish(**summary)
    samples(cfg.out, *(answer(policy, tok, held_out[:3], cfg.max_new_tokens, seed=cfg.seed)
                       for policy in (sft, model)))
    curves(cfg.out, PANELS)
    print(f"{s['seconds']:.0f} s; see {cfg.out}/curves.png and samples.md")
    print(f"next: python -m nanorlhf.evaluate --policy {cfg.out} --against {cfg.sft}")


if __name__ == "__main__":
    run(main, ILQLConfig)
