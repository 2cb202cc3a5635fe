"""Implicit language Q-learning (Snell et al. 2022): learn from logged responses and their scores.

    python -m nanorlhf.ilql                                 the built-in world
    python -m nanorlhf.ilql --data hh.jsonl.gz --sft out/hh-sft --rm out/hh-rm --out out/hh-ilql

Nothing is sampled while it learns. V(s) is the expected score after the text s, Q(s, a) the same if
token a follows. The policy that comes out is the language model, with beta (Q - V) added to its
logits. The heads read the frozen trunk of the SFT model, so the language model stays as it was.

The paper's targets look one step ahead (`--lam 0` here): a score at the very end then travels back
one token a pass, and in one pass hardly leaves the last sentence.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from nanorlhf import environment, reward
from nanorlhf.advantages import gae
from nanorlhf.generate import generate_rows, generate_texts
from nanorlhf.logprobs import masked_mean, response_tokens, response_window, token_logprobs
from nanorlhf.model import QGPT, load_policy, wide
from nanorlhf.support import fast, loop, parallel
from nanorlhf.support.config import SampleConfig, compile_trunks, named, run, setup
from nanorlhf.support.data import collate, flatten, from_files, prompts_of, response_len, score_rows
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples
from nanorlhf.support.stats import standardise


@dataclass
class ILQLConfig(SampleConfig):
    """Learn from logged responses and their scores which tokens are worth writing."""
    out: str = "out/ilql"             # the run folder
    rm: str = "out/rm"                # the reward model
    reward: str = "rm"                # score: rm, env (the true reward), or FILE.py:FUNCTION
    batch_size: int = 32              # responses an update
    learning_rate: float = 3e-3       # peak, after the warm-up; falls in a straight line to zero
    tau: float = 0.7                  # V is this expectile of Q: 0.5 the mean, 1 the best
    lam: float = 0.95                 # Q's target: 0 the next V, 1 the score itself
    gamma: float = 1.0                # discount; a response is short, so none
    cql: float = 0.1                  # weight of the conservative term
    polyak: float = 0.05              # share by which the target heads follow at each step
    beta: float = 8.0                 # weight of Q - V in the policy's logits


def expectile_loss(q: Tensor, v: Tensor, mask: Tensor, tau: float = 0.7) -> Tensor:
    """|tau - 1[q < v]| (q - v)^2   (Kostrikov et al. 2021, eq. 5)

    Where q exceeds v the square counts tau, elsewhere 1 - tau. So v moves to the tau-expectile of
    q, which for tau > 1/2 is above its mean. All (B, R) -> scalar
    """
    gap = q - v
    return masked_mean((tau - (gap < 0).to(gap.dtype)).abs() * gap ** 2, mask)


def q_targets(scores: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
              lam: float = 0.95) -> Tensor:
    """What Q should say of each token: with lam = 0 the next V times gamma, and for the last token
    the score; with lam = 1 the discounted score; in between a mixture, as in TD(lambda).
    scores (B,), values (B, R), mask (B, R) -> (B, R)"""
    rewards = torch.zeros_like(values)
    rewards[torch.arange(len(scores), device=scores.device), mask.sum(1) - 1] = scores
    return gae(rewards, values, mask, gamma, lam) + values


def losses(model: QGPT, tokens: Tensor, prompt_len: Tensor, mask: Tensor, scores: Tensor,
           cfg: ILQLConfig):
    """All losses of a batch of logged responses; scores (B,). -> loss, metrics"""
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
    # Of tokens that the log never shows nothing is known. A cross-entropy holds their Q below that
    # of the logged one (Snell et al. 2022, eq. 4), else those overestimated most would be written.
    cql_loss = sum(-masked_mean(fast.rows_at_a_time(token_logprobs, x, chosen), mask)
                   for x in every_q)
    return q_loss + v_loss + cfg.cql * cql_loss, dict(
        q_loss=q_loss, v_loss=v_loss, cql_loss=cql_loss, q=masked_mean(q[0], mask),
        v=masked_mean(values, mask))


def of_chosen(q: Tensor, chosen: Tensor) -> Tensor:
    """q (B, R, V), chosen (B, R) -> (B, R)"""
    return wide(q.gather(-1, chosen[..., None]).squeeze(-1))


def train(model: QGPT, rows: list, scores: list, pad: int, cfg: ILQLConfig, log) -> dict:
    """rows: logged (tokens, prompt_len); scores: a float each. The heads learn. -> summary"""
    model.transformer.requires_grad_(False)
    optimizer = loop.adamw([*model.eval().q.parameters(), *model.v.parameters()], cfg.learning_rate)
    parts, state = dict(model=model, optimizer=optimizer), dict(step=0, tokens=0)

    def loss_fn(batch):
        rows, scores = zip(*batch)
        return losses(model, *collate(rows, pad, model.device),
                      torch.tensor(scores, device=model.device), cfg)

    def weight(batch):
        return response_len(row for row, _ in batch)

    pairs = [*zip(rows, scores, strict=True)]
    for batch in loop.batches(pairs, parts, loop.linear, cfg, log, state, lambda pair: [pair[0]]):
        metrics = loop.step(loss_fn, batch, weight, parts, cfg)
        follow(model, cfg.polyak)
        log.write(state["step"], **metrics)
    model.beta.fill_(cfg.beta)
    return dict(steps=state["step"], tokens=state["tokens"])


@torch.no_grad()
def follow(model: QGPT, polyak: float):
    """The target heads move a little towards the learning ones (Lillicrap et al. 2015)."""
    for target, q in zip(model.target_q.parameters(), model.q.parameters()):
        target.lerp_(q, polyak)


def main(cfg: ILQLConfig):
    device = setup(cfg)
    sft, tok = load_policy(cfg.sft, device)
    score, room = reward.score_function(cfg, tok, sft), sft.config.n_positions - cfg.max_new_tokens
    if cfg.data:                     # the log: both sides of the pairs
        groups, held_out = from_files(cfg.data, tok, sft.config.n_positions)
        rows, shown = flatten(groups)[0], prompts_of(held_out[:3], room)
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("q_loss", "v_loss", "cql_loss", "lr"), decode=tok.decode)
    if not cfg.data:                 # the log: the SFT model's own samples
        prompts, shown = ([tok.encode(p) for p in environment.prompts(n, cfg.seed, held_out)]
                          for n, held_out in ((cfg.prompts, False), (3, True)))
        rows = generate_rows(sft, prompts, cfg.max_new_tokens, tok.eos, tok.pad, G=cfg.responses,
                             batch_size=cfg.micro_batch_size, dtype=cfg.dtype)
    scores = score_rows(score, rows, tok.pad, device, cfg.dtype)
    print(f"log       {len(rows):,} responses, scored by {cfg.reward}")

    model = QGPT(sft.config).to(device)
    model.transformer.load_state_dict(sft.transformer.state_dict())
    print(f"policy    {model}, on {named(device, cfg.dtype)}")
    compile_trunks(cfg.compile, model)
    summary = train(model, rows, standardise(scores), tok.pad, cfg, log)
    parallel.finish()
    model.save(cfg.out, tok)

    seconds = log.finish(**summary)["seconds"]
    samples(cfg.out, *(generate_texts(policy, tok, shown, cfg.max_new_tokens, seed=cfg.seed)
                       for policy in (sft, model)))
    curves(cfg.out)
    print(f"{seconds:.0f} s; see {cfg.out}/curves.png and samples.md")
    print(f"next: python -m nanorlhf.evaluate --policy {cfg.out} --against {cfg.sft}")


if __name__ == "__main__":
    run(main, ILQLConfig)
