"""How fast is it, and how fast could it be? One PPO iteration, timed in its parts.

    python -m nanorlhf.experiments.bench --n-embd 256 --batch 64
    python -m nanorlhf.experiments.bench --scale   how the cost grows with each size

In: sizes. Out: one line of JSON. It times the functions that training calls, `ppo.collect` with
`generate` in it and `ppo.update`, on models of random weights: policy, reference, reward model and
critic, all of one shape; every response is exactly --response tokens long.

    mfu   what the update computes, as a share of what a large matrix product reaches here
    mbu   what decoding must read, as a share of what copying memory reaches here
"""
import copy
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nanorlhf import generate, ppo, reward
from nanorlhf.logprobs import response_logprobs, token_logprobs
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support import plotting
from nanorlhf.support.config import autocast, fuse, precision, run, setup


@dataclass
class BenchConfig:
    """Time one PPO iteration, and the machine's own limits beside it."""
    n_layer: int = 4                  # of all four models
    n_head: int = 4                   # attention heads
    n_embd: int = 256                 # channels
    vocab: int = 4096                 # tokens
    batch: int = 64                   # responses an iteration
    prompt: int = 32                  # tokens of each prompt
    response: int = 64                # tokens of each response
    minibatches: int = 4              # gradient steps an epoch
    micro_batch_size: int = 0         # responses in memory at once; 0: no limit
    epochs: int = 4                   # passes over a rollout
    iters: int = 5                    # timed iterations, after one to warm up
    scale: bool = False               # sweep batch, response and width instead, and draw it
    out: str = "out/bench"            # where --scale draws
    seed: int = 1                     # of weights and prompts
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False             # fuse the models with torch.compile


class Clock:
    """A function that remembers how long each call took, the device's unfinished work included."""

    def __init__(self, function, device):
        self.function, self.device, self.seconds = function, device, []

    def __call__(self, *args, **kwargs):
        began = self.now()
        result = self.function(*args, **kwargs)
        self.seconds.append(self.now() - began)
        return result

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(cfg):
    """-> {name: number}"""
    device = setup(cfg)
    shape = GPTConfig(cfg.vocab, cfg.prompt + cfg.response, cfg.n_layer, cfg.n_head, cfg.n_embd)
    policy, critic, reward_model = (kind(shape).to(device).eval()
                                    for kind in (GPT, ScalarGPT, ScalarGPT))
    reference = copy.deepcopy(policy).requires_grad_(False)
    prompts = torch.randint(cfg.vocab, (cfg.batch, cfg.prompt)).tolist()
    fuse(cfg.compile, policy, critic, reference, reward_model)
    optimizers = ppo.make_optimizers(policy, critic)
    ppo_cfg = ppo.PPOConfig(epochs=cfg.epochs, minibatches=cfg.minibatches, dtype=cfg.dtype,
                            micro_batch_size=cfg.micro_batch_size, max_new_tokens=cfg.response)

    clocks = sample, collect, update, iterate = [
        Clock(f, device) for f in (generate.generate, ppo.collect, ppo.update, iteration)]
    ppo.generate = sample             # the one that collect calls
    for _ in range(cfg.iters + 1):
        iterate(collect, update, policy, reference, critic, reward.by_model(reward_model),
                optimizers, prompts, ppo_cfg)
    ppo.generate = generate.generate
    gen_sec, collect_sec, update_sec, sec = (statistics.median(c.seconds[1:]) for c in clocks)
    peak = peak_memory(device)                    # before the rest, which wants memory of its own

    dtype = precision(device, cfg.dtype)
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    fresh = GPT(shape).to(device).eval()
    gaps = {f"{name}_{kind}": x for kind, dtypes in PRECISIONS.items()
            for name, x in precision_gap(fresh, prompts, cfg.response, *dtypes).items()}
    return dict(
        sec_per_iter=sec, gen_sec=gen_sec, score_sec=collect_sec - gen_sec, update_sec=update_sec,
        first_iter_sec=iterate.seconds[0],
        gen_tokens_per_s=cfg.batch * cfg.response / gen_sec,
        episodes_per_s=cfg.batch / sec,
        update_tokens_per_s=cfg.batch * cfg.response * cfg.epochs / update_sec,
        peak_memory_mb=peak / 2 ** 20,
        matmul_tflops=rate / 1e12, copy_gb_per_s=bandwidth / 1e9,
        mfu=update_flops(cfg) / update_sec / rate,
        mbu=decode_bytes(cfg, policy, dtype) / (gen_sec / cfg.response) / bandwidth,
        **gaps, dtype=str(dtype).removeprefix("torch."), device=str(device), compile=cfg.compile,
        threads=torch.get_num_threads())


def iteration(collect, update, policy, reference, critic, score, optimizers, prompts, cfg):
    """What ppo.train does in a round, but for the log. No token is the end: no response stops."""
    rollout = collect(policy, reference, critic, score, prompts, cfg, cfg.kl_coef, eos=-1, pad=0)
    update(policy, critic, optimizers, rollout, cfg)


# --- the work, and the limits --------------------------------------------------------------------

def update_flops(cfg):
    """Of the matrix products of one update: 2 for each weight and token, and twice as many again on
    the way back (Kaplan et al. 2020, 2.1); attention's own, causal or not, count in full."""
    T, C = cfg.prompt + cfg.response, cfg.n_embd
    trunk = cfg.n_layer * (2 * 12 * C * C + 4 * T * C) * T
    policy, critic = trunk + 2 * cfg.vocab * C * cfg.response, trunk + 2 * C * T
    return 3 * (policy + critic) * cfg.batch * cfg.epochs


def decode_bytes(cfg, policy, dtype):
    """What one decode step has to read: every weight once, and the keys and values so far."""
    weights = sum(p.numel() for p in policy.parameters())
    cached = 2 * cfg.n_layer * cfg.n_embd * cfg.batch * (cfg.prompt + cfg.response / 2)
    return (weights + cached) * dtype.itemsize


def matmul_rate(device, dtype, n=2048):
    """Floating-point operations a second, in the best of ten square products."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = Clock(torch.mm, device)
    for _ in range(10):
        clock(a, b)
    return 2 * n ** 3 / min(clock.seconds)


def copy_rate(device, megabytes=256):
    """Bytes a second, read and written, in the best of ten copies."""
    a = torch.ones(megabytes * 2 ** 18, device=device)
    clock = Clock(torch.empty_like(a).copy_, device)
    for _ in range(10):
        clock(a)
    return 2 * a.nbytes / min(clock.seconds)


def peak_memory(device):
    """Bytes: of the device's tensors on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


PRECISIONS = dict(float32=("float32", "float32"), bfloat16=("bfloat16", "bfloat16"),
                  mixed=("float32", "bfloat16"))


@torch.no_grad()
def precision_gap(policy, prompts, R, sampled_in, scored_in, clip=0.2):
    """How far sampler and scorer disagree on the tokens just sampled, when nothing has moved: the
    ratio's deviation, and the share of tokens that would be clipped if the sampler's own log-probs
    served as the old ones. -> {name: number}"""
    said, draw = [], generate.sample

    def spy(logits, temperature):
        token = draw(logits, temperature)
        said.append(token_logprobs(logits, token, temperature))
        return token

    generate.sample = spy
    try:
        with autocast(policy.device, sampled_in):
            tokens, prompt_len, _ = generate.generate(policy, prompts, R)
        with autocast(policy.device, scored_in):
            logprobs = response_logprobs(policy, tokens, prompt_len, R)
    finally:
        generate.sample = draw
    ratio = (logprobs - torch.stack(said, 1)).exp()
    return dict(ratio_std=ratio.std().item(),
                ratio_clipped=((ratio - 1).abs() > clip).float().mean().item())


# --- how the cost grows --------------------------------------------------------------------------

SWEEPS = dict(batch=(8, 16, 32, 64, 128), response=(16, 32, 64, 128), n_embd=(64, 128, 256, 512))


def scale(cfg):
    """One iteration at several sizes, the rest as given. Draws scale.png"""
    panels = []
    for name, sizes in SWEEPS.items():
        rows = []
        for size in sizes:
            rows.append(measure(replace(cfg, **{name: size})))
            print(json.dumps({name: size, **rows[-1]}), flush=True)
        panels.append((name, sizes, {part: [row[part] for row in rows]
                                     for part in ("gen_sec", "score_sec", "update_sec")}))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    plotting.growth(panels, "seconds an iteration").savefig(Path(cfg.out) / "scale.png")
    print(f"see {cfg.out}/scale.png")


def main(cfg):
    if cfg.scale:
        scale(cfg)
    else:
        print(json.dumps({name: float(f"{x:.5g}") if isinstance(x, float) else x
                          for name, x in measure(cfg).items()}))


if __name__ == "__main__":
    run(main, BenchConfig)
