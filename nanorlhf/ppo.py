"""PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    collect    the policy answers prompts; every token pays for its KL, the last one earns the score
    update     a few clipped steps towards what went better than the critic expected
    train      the two in turns

In: a policy, the reference it started from, a critic, a score and prompts. Out: a better policy.

Left out on purpose: reward whitening, which made things worse for those who measured it (Huang et
al. 2024); an entropy bonus, as the KL price already keeps the policy from collapsing; top-k and
top-p sampling, since the tokens would come from another distribution than the one that is scored.
"""
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from nanorlhf import UserError
from nanorlhf.advantages import gae, grpo, reinforce, rloo
from nanorlhf.generate import generate
from nanorlhf.logprobs import (
    entropy,
    kl_k1,
    kl_k3,
    masked,
    masked_mean,
    response_logits,
    response_logprobs,
    response_tokens,
    response_window,
    token_logprobs,
    whiten,
)
from nanorlhf.support import checkpoint, parallel
from nanorlhf.support.config import autocast
from nanorlhf.support.data import endless, in_parts


@dataclass
class PPOConfig:
    """Improve a model until a reward model, or any other score, likes it better."""
    out: str = "out/ppo"              # the run folder
    sft: str = "out/sft"              # where the policy starts, and the reference stays
    rm: str = "out/rm"                # the reward model; the critic starts from it
    reward: str = "rm"                # score: rm, env (the built-in truth), or FILE.py:FUNCTION
    data: list[str] = field(default_factory=list)  # files of prompts; none: the built-in world
    prompts: int = 4000               # distinct prompts to train on (built-in world)
    eval_prompts: int = 500           # held-out prompts for the win rate
    advantage: Literal["gae", "reinforce", "rloo", "grpo"] = "gae"  # all but gae need no critic
    responses: int = 1                # to each prompt; rloo and grpo compare them with each other
    steps: int = 40                   # rounds of collect and update
    batch_size: int = 64              # responses a round
    epochs: int = 2                   # passes over them
    minibatches: int = 2              # gradient steps a pass
    micro_batch_size: int = 0         # responses in memory at once, same result; 0: no limit
    learning_rate: float = 6e-4       # of the policy, at the first step; falls to zero
    critic_learning_rate: float = 1e-3  # of the critic, likewise
    kl_coef: float = 0.1              # price of one nat away from the reference
    kl_target: float = 0.0      # nats a response for the price to aim at; 0: fixed price
    gamma: float = 1.0                # discount; a response is short, so none
    lam: float = 0.95                 # GAE: 0 trusts the critic, 1 trusts the rewards
    clip: float = 0.2                 # how far the ratio may move a token's probability
    value_clip: float = 0.2           # how far a value may move from the old one, in score units
    grad_clip: float = 1.0            # longest gradient step, policy and critic each
    temperature: float = 1.0          # of sampling, and so of every log-prob
    max_new_tokens: int = 80          # longest response
    no_end_penalty: float = 0.0       # taken off the score of a response that never ends
    seed: int = 1                     # of sampling and data order
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False             # fuse with torch.compile: a long start, faster steps
    save_every: int = 10              # rounds between saves that --resume continues from
    resume: bool = False              # go on from the last save
    overwrite: bool = False           # replace a run of other settings

    def __post_init__(self):
        fewest = 2 if self.advantage in ("rloo", "grpo") else 1
        if self.responses < fewest or self.batch_size % self.responses:
            raise UserError(f"--responses: expected {fewest} or more that divide the batch size of "
                            f"{self.batch_size} for {self.advantage}, came {self.responses}")
        if self.minibatches > (most := self.batch_size):
            raise UserError(f"--minibatches: expected at most {most}, came {self.minibatches}")


@dataclass
class Rollout:
    """What happened, and how good it was. B responses of at most R tokens; T = P + R."""
    tokens: torch.Tensor          # (B, T)  prompt, response, padding
    prompt_len: torch.Tensor      # (B,)
    mask: torch.Tensor            # (B, R)  the tokens that the policy chose, end token included
    ended: torch.Tensor           # (B,)    did it stop by itself?
    old_logprobs: torch.Tensor    # (B, R)  when sampled
    ref_logprobs: torch.Tensor    # (B, R)  under the frozen reference
    entropy: torch.Tensor         # (B, R)  of the choice each token was drawn from
    scores: torch.Tensor          # (B,)    of the whole response
    rewards: torch.Tensor         # (B, R)  after the KL price
    advantages: torch.Tensor      # (B, R)  what the policy is pushed by
    old_values: torch.Tensor | None = None  # (B, R)  the critic's, before each token
    returns: torch.Tensor | None = None     # (B, R)  what the critic should have said

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        """The same for some of the responses."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rollout(**{name: x if x is None else x[rows] for name, x in mine.items()})


# --- collect -------------------------------------------------------------------------------------

@torch.no_grad()
def collect(policy, reference, critic, score, prompts, cfg, kl_coef, eos, pad):
    """Answer each prompt (a list of token lists) and work out what every token was worth.

    score: a plain function, (tokens (B, T), prompt_len (B,), mask (B, R)) -> (B,) -> Rollout
    """
    # 1. Respond. The models are in eval mode throughout: dropout would change the log-probs.
    mine = parallel.mine(prompts)
    with autocast(policy.device, cfg.dtype), parallel.own_dice():
        tokens, prompt_len, mask = generate(policy, mine or prompts[:1], cfg.max_new_tokens,
                                            cfg.temperature, eos, pad, cfg.responses)

    # 2. Measure. Old log-probs come from the same forward pass as the update's, not from the
    #    sampler's step by step one, so that the ratio starts at exactly 1.
    rows = cfg.micro_batch_size or -(-len(tokens) // cfg.minibatches)    # as many as an update sees
    parts = zip(*(x.split(rows) for x in (tokens, prompt_len, mask)))
    measured = [measure(policy, reference, critic, score, *part, cfg) for part in parts]
    said = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
    said |= dict(tokens=tokens, prompt_len=prompt_len, mask=mask)
    said = parallel.gather(said, len(mine) * cfg.responses, tokens=pad)  # what all processes did
    tokens, prompt_len, mask = said["tokens"], said["prompt_len"], said["mask"]
    ended = ((response_tokens(tokens, prompt_len, mask.shape[1]) == eos) & mask).any(1)      # (B,)

    # 3. Reward: the score on the last token, and on every token the price of its KL.
    kl = kl_k1(said["old_logprobs"], said["ref_logprobs"])
    rewards = shape_rewards(said["scores"] - cfg.no_end_penalty * ~ended, kl, mask, kl_coef)

    # 4. Compare with what was to be expected: by the critic of each token, or by other responses of
    #    the whole. Returns are taken before whitening, which would put the critic's targets on
    #    another scale than its values.
    if critic is None:
        advantages = by_response(rewards.sum(1), cfg)[:, None].expand_as(rewards)
        returns = None
    else:
        raw = gae(rewards, said["old_values"], mask, cfg.gamma, cfg.lam)
        advantages, returns = whiten(raw, mask), raw + said["old_values"]
    return Rollout(ended=ended, rewards=rewards, advantages=advantages, returns=returns, **said)


def measure(policy, reference, critic, score, tokens, prompt_len, mask, cfg):
    """What each model says of responses. -> {field of Rollout: (B, R); scores: (B,)}"""
    R = mask.shape[1]
    with autocast(policy.device, cfg.dtype):
        logits = response_logits(policy, tokens, prompt_len, R)
        chosen = response_tokens(tokens, prompt_len, R)
        said = dict(
            old_logprobs=token_logprobs(logits, chosen, cfg.temperature),
            ref_logprobs=response_logprobs(reference, tokens, prompt_len, R, cfg.temperature),
            entropy=entropy(logits, cfg.temperature),
            scores=score(tokens, prompt_len, mask))
        if critic is not None:
            said["old_values"] = response_window(critic(tokens), prompt_len, R)
    return said


def by_response(scores, cfg):
    """One advantage a response, from what it and others earned after the KL price. (B,) -> (B,)"""
    if cfg.advantage == "reinforce":
        return reinforce(scores)
    return dict(rloo=rloo, grpo=grpo)[cfg.advantage](scores, cfg.responses)


def shape_rewards(scores, kl, mask, kl_coef):
    """Every token pays for its KL; the last one also earns the score (Ziegler et al. 2019, eq. 2).

    scores (B,), kl (B, R), mask (B, R) -> rewards (B, R)
    """
    rewards = -kl_coef * masked(kl, mask)
    last = mask.sum(1) - 1                             # (B,) the end token, if it has one
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


# --- update --------------------------------------------------------------------------------------

def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated so that we minimise it.

    The minimum takes the clipped term only where it is the worse one: a token that has already
    moved far enough in its good direction gets no further push. All (B, R) -> scalar
    """
    ratio = masked(logprobs - old_logprobs, mask).exp()                        # 1 on the first pass
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(surrogate, mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, the larger of it with and without the value held near the old one.

    All (B, R) -> scalar
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def update(policy, critic, optimizers, rollout, cfg):
    """A few epochs of gradient steps over one rollout. -> metrics, averaged over the steps"""
    history = []
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(rollout)).chunk(cfg.minibatches):
            history.append(step(policy, critic, optimizers, rollout[rows], cfg, not history))
    return {name: torch.stack([metrics[name] for metrics in history]).mean().item()
            for name in history[0]}


def step(policy, critic, optimizers, minibatch, cfg, first):
    """One gradient step, on as many rows at a time as there is memory for. -> metrics"""
    for optimizer in optimizers:
        optimizer.zero_grad()
    metrics = Counter()
    for batch in in_parts(parallel.mine(minibatch), cfg.micro_batch_size):
        R, mask = batch.mask.shape[1], batch.mask
        with autocast(policy.device, cfg.dtype):
            logprobs = response_logprobs(policy, batch.tokens, batch.prompt_len, R, cfg.temperature)
        if first:
            check_ratio(logprobs.detach(), batch)
        losses = dict(policy_loss=policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask,
                                              cfg.clip))
        if critic is not None:
            with autocast(policy.device, cfg.dtype):
                values = response_window(critic(batch.tokens), batch.prompt_len, R)
            losses["value_loss"] = value_loss(values, batch.old_values, batch.returns, mask,
                                              cfg.value_clip)
        share = mask.sum() / minibatch.mask.sum()   # each token weighs the same, however we split
        (share * sum(losses.values())).backward()   # two networks: neither loss reaches the other's
        for name, x in (losses | diagnose(logprobs, batch, cfg.clip)).items():
            metrics[name] += share * x.detach()
    metrics = parallel.total(metrics)

    for name, model, optimizer in zip(("policy", "critic"), (policy, critic), optimizers):
        metrics[f"{name}_grad_norm"] = parallel.clip_gradients(model, cfg.grad_clip)
        optimizer.step()
    return metrics


def check_ratio(logprobs, batch):
    """Before the first step nothing has moved, so the ratio is 1. Where it is not, sampler and
    scorer differ (temperature, dropout, a shift by one), and what follows would mean nothing."""
    ratio = (logprobs - batch.old_logprobs)[batch.mask].exp()
    gap = (ratio - 1).abs().mean().item()     # 0 as a rule; bfloat16 may round by the batch's size
    assert gap < 0.01, f"the first minibatch's ratio is off by {gap:.3g} on average: expected 1"


def diagnose(logprobs, batch, clip):
    """How far the policy has moved since the rollout. -> {name: scalar tensor}"""
    log_ratio = logprobs - batch.old_logprobs
    return dict(
        clip_frac=masked_mean(((log_ratio.exp() - 1).abs() > clip).float(), batch.mask),
        approx_kl=masked_mean(kl_k3(batch.old_logprobs, logprobs), batch.mask))   # old from new


# --- train ---------------------------------------------------------------------------------------

def summarise(rollout):
    """One rollout in a few numbers. Sums over a response for KL, which is priced per response."""
    mask = rollout.mask
    numbers = dict(
        score=rollout.scores.mean(),
        kl=masked(kl_k1(rollout.old_logprobs, rollout.ref_logprobs), mask).sum(1).mean(),
        kl_k3=masked(kl_k3(rollout.old_logprobs, rollout.ref_logprobs), mask).sum(1).mean(),
        entropy=masked_mean(rollout.entropy, mask),                                   # nats a token
        response_len=mask.sum(1).float().mean(),
        ended=rollout.ended.float().mean())
    if rollout.returns is not None:
        error = (rollout.returns - rollout.old_values)[mask]
        variance = rollout.returns[mask].var(correction=0).clamp(min=1e-8)
        numbers["explained_variance"] = 1 - error.var(correction=0) / variance
    return numbers


def adapt(kl_coef, kl, cfg):
    """The next round's KL price: dearer above the target, cheaper below (Ziegler et al. 2019)."""
    if not cfg.kl_target:
        return kl_coef
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return kl_coef * (1 + 0.1 * error * cfg.batch_size / 64)


def make_optimizers(policy, critic):
    """One for each network there is; `train` sets the learning rates before every update."""
    return [torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-5,
                              weight_decay=0.0, fused=True)
            for model in (policy, critic) if model is not None]


def train(policy, reference, critic, score, prompts, eos, pad, cfg, log):
    """prompts: list of token lists; critic: None where the advantage needs none. -> summary

    The policy and the critic learn in place.
    """
    optimizers = make_optimizers(policy, critic)
    parts = dict(policy=policy, policy_optimizer=optimizers[0])
    if critic is not None:
        parts |= dict(critic=critic, critic_optimizer=optimizers[1])
    seen = dict(step=0, tokens=0, kl_coef=cfg.kl_coef, score=0.0, kl=0.0)
    if cfg.resume:
        seen = checkpoint.load_state(cfg.out, parts)
    reference.requires_grad_(False)
    batches = endless(prompts, cfg.batch_size // cfg.responses, cfg.seed, seen["step"], length=len)

    for number in log.steps(seen["step"], cfg.steps):
        began = time.perf_counter()
        for optimizer, rate in zip(optimizers, (cfg.learning_rate, cfg.critic_learning_rate)):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / cfg.steps)
        rollout = collect(policy, reference, critic, score, next(batches), cfg, seen["kl_coef"],
                          eos, pad)
        losses = update(policy, critic, optimizers, rollout, cfg)

        metrics = {name: x.item() for name, x in summarise(rollout).items()} | losses
        tokens = rollout.mask.sum().item()
        log.batch = zip(rollout.tokens, rollout.prompt_len)
        log.write(number, **metrics, kl_coef=seen["kl_coef"],
                  tokens_per_s=tokens / (time.perf_counter() - began))
        seen = dict(step=number + 1, tokens=seen["tokens"] + tokens, score=metrics["score"],
                    kl=metrics["kl"], kl_coef=adapt(seen["kl_coef"], metrics["kl"], cfg))
        if log.due(seen["step"], cfg.save_every):
            checkpoint.save_state(cfg.out, parts, **seen)
    return dict(steps=cfg.steps, tokens=seen["tokens"], score=seen["score"], kl=seen["kl"])
