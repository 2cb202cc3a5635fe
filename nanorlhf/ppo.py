"""PPO for language models (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    maximise over the policy   E[ score(prompt, response) ] - kl_coef * KL(policy || reference)

    collect    the policy answers prompts; each token pays for its KL, the last one earns the score
    update     a few clipped gradient steps towards what went better than the critic expected
    train      both in turn

Left out on purpose: scaling rewards to variance 1, which did harm where it was measured (Huang et
al. 2024); an entropy bonus, as the KL penalty already keeps the choice of words wide; top-k and
top-p sampling, as then tokens come from a truncated distribution, and log-probs from the full one.
"""
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanorlhf.advantages import gae, of_responses
from nanorlhf.generate import generate_rows
from nanorlhf.logprobs import (
    kl_k1,
    kl_k3,
    masked,
    masked_mean,
    response_logprobs,
    response_logprobs_and_entropy,
    response_window,
    whiten,
)
from nanorlhf.support import UserError, loop, parallel
from nanorlhf.support.config import SampleConfig, autocast
from nanorlhf.support.data import collate, in_parts


@dataclass
class PPOConfig(SampleConfig):
    """Improve a model until a reward model, or any other score, prefers its responses."""
    out: str = "out/ppo"              # the run folder
    rm: str = "out/rm"                # the reward model; the critic starts from it
    reward: str = "rm"                # score: rm, env (the true reward), or FILE.py:FUNCTION
    eval_prompts: int = 500           # held-out prompts for the win rate
    advantage: Literal["gae", "reinforce", "rloo", "grpo"] = "gae"  # all but gae need no critic
    responses: int = 1                # to each prompt; rloo and grpo compare them with each other
    steps: int = 40                   # rounds of collect and update; 0: one pass over the prompts
    batch_size: int = 64              # responses per round
    epochs: int = 1                   # passes over them
    minibatches: int = 2              # gradient steps per pass
    learning_rate: float = 8e-4       # of the policy, after the warm-up; falls to zero
    critic_learning_rate: float = 1e-3  # of the critic, likewise
    kl_coef: float = 0.05             # weight of the KL penalty: score units per nat
    kl_target: float = 0.0            # KL per response that kl_coef is adjusted to; 0: fixed
    gamma: float = 1.0                # discount; a response is short, so none
    lam: float = 0.95                 # GAE: 0 trusts the critic, 1 trusts the rewards
    clip: float = 0.2                 # a ratio that improved past 1 +- this gets no gradient
    value_clip: float = 10.0          # the same for values; 10 is hardly a clip
    temperature: float = 1.0          # of sampling, and so of every log-prob
    no_end_penalty: float = 0.0       # subtracted from the score of a response that never ends
    warmup: int = 10                  # rounds over which the learning rates rise from zero
    save_every: int = 10              # rounds between saves that --resume continues from

    def __post_init__(self):
        B, least = self.batch_size, 2 if self.advantage in ("rloo", "grpo") else 1
        if self.responses < least or B % self.responses:
            raise UserError(f"--responses: expected {least} or more that divide the batch size of "
                            f"{B} for {self.advantage}, came {self.responses}")
        if self.minibatches > B:
            raise UserError(f"--minibatches: expected at most {B}, came {self.minibatches}")


@dataclass
class Rollout:
    """B responses of at most R tokens, and how good they are. T <= P + R."""
    tokens: Tensor          # (B, T)  prompt, response, padding
    prompt_len: Tensor      # (B,)
    mask: Tensor            # (B, R)  the tokens that the policy chose, end token included
    ended: Tensor           # (B,)    has the response an end token?
    old_logprobs: Tensor    # (B, R)  under the policy, before the update
    ref_logprobs: Tensor    # (B, R)  under the frozen reference
    entropy: Tensor         # (B, R)  of the choice each token was drawn from
    scores: Tensor          # (B,)    of the whole response
    rewards: Tensor         # (B, R)  the KL penalty of each token, and the score on the last
    advantages: Tensor      # (B, R)  how much better each token was than expected
    old_values: Tensor | None = None  # (B, R)  the critic's, before each token
    returns: Tensor | None = None     # (B, R)  what the critic should have said

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return Rollout(**{k: x if x is None else x[rows] for k, x in vars(self).items()})


# --- collect -------------------------------------------------------------------------------------
@torch.no_grad()
def collect(policy, reference, critic, score, prompts: list[list[int]], cfg: PPOConfig,
            kl_coef: float, eos: int, pad: int) -> Rollout:
    """Answer each prompt and work out how good every token was. critic: None where none is needed;
    score: a plain function, (tokens (B, T), prompt_len (B,), mask (B, R)) -> (B,)"""
    # 1. Respond. All models are in eval mode, as loaded: dropout would change the log-probs.
    rows = generate_rows(policy, prompts, cfg.max_new_tokens, eos, pad, cfg.temperature,
                         cfg.responses, cfg.micro_batch_size, cfg.dtype)
    tokens, prompt_len, mask = batch = collate(rows, pad, policy.device)
    ended = tokens.new_tensor([row[-1] == eos for row, _ in rows], dtype=torch.bool)         # (B,)

    # 2. Measure, as many rows at a time as an update sees. Old log-probs are computed as in the
    #    update, and not taken from the sampler, so that the ratio starts at 1.
    size = cfg.micro_batch_size or math.ceil(len(rows) / cfg.minibatches)
    parts = in_parts(parallel.local_rows(torch.arange(len(rows), device=mask.device)), size)
    measured = parallel.concatenate(
        [measure(policy, reference, critic, score, *(x[part] for x in batch), cfg)
         for part in parts], mask.device)

    # 3. Reward: the score on the last token, and on every token the penalty for its KL.
    kl = kl_k1(measured["old_logprobs"], measured["ref_logprobs"])                         # (B, R)
    scores = measured["scores"] - cfg.no_end_penalty * ~ended           # the log shows raw ones
    rewards = shape_rewards(scores, kl, mask, kl_coef)

    # 4. Compare with what was expected: of each token by the critic, or of the whole response by
    #    the other responses. Returns are taken before whitening, which would put the critic's
    #    targets on another scale than its values.
    if critic is None:
        penalty = kl_coef * masked(kl, mask).sum(1)                                          # (B,)
        raw = of_responses(cfg.advantage, scores, penalty, cfg.responses)                    # (B,)
        targets = dict(advantages=raw[:, None].expand_as(rewards))
    else:
        values = measured["old_values"]
        raw = gae(rewards, values, mask, cfg.gamma, cfg.lam)                               # (B, R)
        targets = dict(advantages=whiten(raw, mask), returns=raw + values)
    return Rollout(tokens, prompt_len, mask, ended, rewards=rewards, **targets, **measured)


def measure(policy, reference, critic, score, tokens, prompt_len, mask, cfg):
    """What each model says of responses. -> {field of Rollout: (B, R); "scores": (B,)}"""
    R, temperature = mask.shape[1], cfg.temperature
    with autocast(policy.device, cfg.dtype):
        old_logprobs, entropy = response_logprobs_and_entropy(policy, tokens, prompt_len, R,
                                                              temperature)
        ref_logprobs = response_logprobs(reference, tokens, prompt_len, R, temperature)
        measured = dict(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, entropy=entropy,
                        scores=score(tokens, prompt_len, mask))
        if critic is not None:
            measured["old_values"] = response_window(critic(tokens, prompt_len), prompt_len, R)
    return measured


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Every token pays for its KL; the last one also earns the score (Ziegler et al. 2019, eq. 2).
    scores (B,), kl (B, R), mask (B, R) -> rewards (B, R)"""
    rewards = -kl_coef * masked(kl, mask)
    last = mask.sum(1) - 1                             # (B,) the end token, if there is one
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


# --- update --------------------------------------------------------------------------------------
def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip: float = 0.2) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated so that we minimise it.

    The minimum takes the clipped term only where it is the worse one: a token whose probability has
    changed by the factor 1 +- clip in its good direction gets no more gradient. (B, R) -> scalar
    """
    ratio = masked(logprobs - old_logprobs, mask).exp()                    # 1 at the first step
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(surrogate, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip: float = 0.2) -> Tensor:
    """Half the squared error of values, or of values kept within old_values +- clip: the larger.
    All (B, R) -> scalar"""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def update(policy, critic, optimizers: dict, rollout: Rollout, cfg: PPOConfig) -> dict:
    """A few epochs of gradient steps over one rollout. -> metrics, means over the steps

    Raises RuntimeError if the ratio was not 1 before the first step, when nothing had changed: then
    collect and update compute log-probs differently, for example because dropout is on.
    """
    history = []
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(rollout)).to(rollout.tokens.device).chunk(cfg.minibatches):
            history.append(step(policy, critic, optimizers, rollout[rows], cfg))
    if not (gap := float(history[0]["ratio_gap"])) < 0.01:  # bfloat16 may round; NaN is caught too
        raise RuntimeError(f"expected a first ratio of 1, came one {gap:.3g} away from it")
    return {name: sum(float(m[name]) for m in history) / len(history) for name in history[0]}


def step(policy, critic, optimizers: dict, minibatch: Rollout, cfg: PPOConfig) -> dict:
    """One gradient step of the policy and of the critic. -> metrics"""
    def loss_fn(batch):
        R = batch.mask.shape[1]
        logprobs = response_logprobs(policy, batch.tokens, batch.prompt_len, R, cfg.temperature)
        losses = dict(policy_loss=policy_loss(logprobs, batch.old_logprobs, batch.advantages,
                                              batch.mask, cfg.clip))
        if critic is not None:
            values = response_window(critic(batch.tokens, batch.prompt_len), batch.prompt_len, R)
            losses["value_loss"] = value_loss(values, batch.old_values, batch.returns, batch.mask,
                                              cfg.value_clip)
        # Policy and critic are two networks: neither loss reaches the weights of the other.
        return sum(losses.values()), losses | diagnose(logprobs, batch, cfg.clip)

    return loop.step(loss_fn, minibatch, lambda batch: batch.mask.sum(), optimizers, cfg)


def diagnose(logprobs: Tensor, batch: Rollout, clip: float) -> dict:
    """How far the policy has moved since the rollout. -> {name: scalar tensor}"""
    ratio = masked(logprobs - batch.old_logprobs, batch.mask).exp()
    return dict(
        ratio_gap=masked_mean((ratio - 1).abs(), batch.mask),
        clip_frac=masked_mean(((ratio - 1).abs() > clip).float(), batch.mask),
        approx_kl=masked_mean(kl_k3(batch.old_logprobs, logprobs), batch.mask))  # KL(old || new)


# --- train ---------------------------------------------------------------------------------------
def train(policy, reference, critic, score, prompts: list[list[int]], eos: int, pad: int,
          cfg: PPOConfig, log) -> dict:
    """Improve the policy, and with it the critic, in place; arguments as for collect. -> summary"""
    optimizers = make_optimizers(policy, critic, cfg)
    parts = dict(policy=policy, **optimizers, **({} if critic is None else dict(critic=critic)))
    state = dict(step=0, tokens=0, sampled=0, kl_coef=cfg.kl_coef, score=0.0, kl=0.0)
    reference.requires_grad_(False)

    def rows_of(prompt):
        return [(prompt, len(prompt))]

    for batch in loop.batches(prompts, parts, loop.linear, cfg, log, state, rows_of,
                              cfg.batch_size // cfg.responses):
        began, kl_coef = time.perf_counter(), state["kl_coef"]
        rollout = collect(policy, reference, critic, score, batch, cfg, kl_coef, eos, pad)
        metrics = summarise(rollout) | update(policy, critic, optimizers, rollout, cfg)

        sampled = rollout.mask.sum().item()
        log.batch = zip(rollout.tokens, rollout.prompt_len)   # written out where a loss is NaN
        log.write(state["step"], **metrics, kl_coef=kl_coef,
                  tokens_per_s=sampled / (time.perf_counter() - began))
        state |= dict(sampled=state["sampled"] + sampled, score=metrics["score"], kl=metrics["kl"],
                      kl_coef=adapt(kl_coef, metrics["kl"], cfg))
    return dict(steps=state["step"], tokens=state["sampled"], score=state["score"], kl=state["kl"])


def make_optimizers(policy, critic, cfg: PPOConfig) -> dict:
    """One for each network there is. Adam's epsilon is 1e-5 (Huang et al. 2024)."""
    networks = dict(policy=(policy, cfg.learning_rate), critic=(critic, cfg.critic_learning_rate))
    return {f"{name}_optimizer": loop.adamw(network.parameters(), rate, eps=1e-5)
            for name, (network, rate) in networks.items() if network is not None}


def summarise(rollout: Rollout) -> dict:
    """One rollout in a few numbers. KL is summed over each response."""
    mask, logprobs = rollout.mask, (rollout.old_logprobs, rollout.ref_logprobs)
    metrics = dict(
        score=rollout.scores.mean(),
        kl=masked(kl_k1(*logprobs), mask).sum(1).mean(),                        # nats a response
        kl_k3=masked(kl_k3(*logprobs), mask).sum(1).mean(),
        entropy=masked_mean(rollout.entropy, mask),                             # nats a token
        response_len=mask.sum(1).float().mean(),
        ended=rollout.ended.float().mean())
    if rollout.returns is not None:
        error = (rollout.returns - rollout.old_values)[mask]
        variance = rollout.returns[mask].var(correction=0).clamp(min=1e-8)
        metrics["explained_variance"] = 1 - error.var(correction=0) / variance
    return {name: x.item() for name, x in metrics.items()}


def adapt(kl_coef: float, kl: float, cfg: PPOConfig) -> float:
    """The next round's kl_coef: higher where KL is above its target (Ziegler et al. 2019, 2.2)."""
    if not cfg.kl_target:
        return kl_coef
    error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
    return kl_coef * (1 + 0.1 * error * cfg.batch_size / 64)
