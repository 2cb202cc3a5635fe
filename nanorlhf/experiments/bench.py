"""How long does one round of PPO take, in its parts, and how close is that to the machine's limits?

    python -m nanorlhf.experiments.bench --n-embd 256 --batch 64
    python -m nanorlhf.experiments.bench --scale        how the time grows with each size

In: sizes. Out: one line of JSON. It times the functions that training calls, on models with random
weights: policy, reference, reward model and critic, all of one shape. Every response is exactly
--response tokens long. Two of the numbers are shares of what this machine reaches here:

    mfu   the operations of an update, of those that a large matrix product does in that time
    mbu   the bytes that decoding must read, of those that copying memory moves in that time
"""
import copy
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch

from nanorlhf import generate, ppo, reward
from nanorlhf.logprobs import response_logprobs, token_logprobs
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support import plotting
from nanorlhf.support.config import ComputeConfig, autocast, compile_trunks, precision, run, setup
from nanorlhf.support.runlog import open_run


@dataclass
class BenchConfig(ComputeConfig):
    """Time one round of PPO, and beside it the limits of the machine."""
    n_layer: int = 4                  # of all four models
    n_head: int = 4                   # attention heads
    n_embd: int = 256                 # channels
    vocab: int = 4096                 # tokens
    batch: int = 64                   # responses a round
    prompt: int = 32                  # tokens of each prompt
    response: int = 64                # tokens of each response
    minibatches: int = 4              # gradient steps an epoch
    micro_batch_size: int = 0         # responses in memory at once; 0: no limit
    epochs: int = 4                   # passes over a rollout
    iters: int = 5                    # timed rounds, after one to warm up
    compile: bool = False             # compile the models with torch.compile
    scale: bool = False               # time several batches, lengths and widths, and draw them
    out: str = "out/bench"            # the folder of the drawing


class Timed:
    """A function that keeps the seconds that each call took, until the device had finished."""

    def __init__(self, function):
        self.function, self.seconds = function, []

    def __call__(self, *args, **kwargs):
        began = time.perf_counter()
        result = self.function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        return result


def measure(cfg):
    """Time some rounds, then the limits of the machine. -> {name: number}"""
    device = setup(cfg)
    shape = GPTConfig(cfg.vocab, cfg.prompt + cfg.response, cfg.n_layer, cfg.n_head, cfg.n_embd)
    prompts = torch.randint(cfg.vocab, (cfg.batch, cfg.prompt)).tolist()
    times, peak = time_rounds(cfg, shape, prompts, device)
    sec, gen_sec, collect_sec, update_sec = (statistics.median(s[1:]) for s in times)

    dtype = precision(device, cfg.dtype)
    flops, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    policy = GPT(shape).to(device).eval()
    gaps = {f"{name}_{kind}": x for kind, dtypes in PRECISIONS.items()
            for name, x in precision_gap(policy, prompts, cfg.response, *dtypes).items()}
    return dict(
        sec_per_iter=sec, gen_sec=gen_sec, score_sec=collect_sec - gen_sec, update_sec=update_sec,
        first_iter_sec=times[0][0], episodes_per_s=cfg.batch / sec,
        gen_tokens_per_s=cfg.batch * cfg.response / gen_sec,
        update_tokens_per_s=cfg.batch * cfg.response * cfg.epochs / update_sec,
        peak_memory_mb=peak / 2 ** 20,
        matmul_tflops=flops / 1e12, copy_gb_per_s=bandwidth / 1e9,
        mfu=update_flops(cfg) / update_sec / flops,
        mbu=decode_bytes(cfg, policy, dtype) / (gen_sec / cfg.response) / bandwidth,
        **gaps, dtype=str(dtype).removeprefix("torch."), device=str(device), compile=cfg.compile,
        threads=torch.get_num_threads())


def time_rounds(cfg, shape, prompts, device):
    """Rounds as in ppo.train. -> seconds of rounds, generation, collect and update; peak memory"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    policy, critic, reward_model = (kind(shape).to(device).eval()
                                    for kind in (GPT, ScalarGPT, ScalarGPT))
    reference = copy.deepcopy(policy).requires_grad_(False)
    compile_trunks(cfg.compile, policy, critic, reference, reward_model)
    stage = ppo.PPOConfig(batch_size=cfg.batch, epochs=cfg.epochs, minibatches=cfg.minibatches,
                          dtype=cfg.dtype, micro_batch_size=cfg.micro_batch_size,
                          max_new_tokens=cfg.response)
    optimizers, score = ppo.make_optimizers(policy, critic, stage), reward.by_model(reward_model)
    generation, collect, update = map(Timed, (ppo.generate_rows, ppo.collect, ppo.update))

    @Timed
    def one_round():       # no token is the end token -1, so every response has the full length
        rollout = collect(policy, reference, critic, score, prompts, stage, 0.1, eos=-1, pad=0)
        update(policy, critic, optimizers, rollout, stage)

    with patch.object(ppo, "generate_rows", generation):       # the one that ppo.collect calls
        for _ in range(cfg.iters + 1):
            one_round()
    return [f.seconds for f in (one_round, generation, collect, update)], peak_memory(device)


def peak_memory(device):
    """Bytes: of tensors on a GPU, or on a CPU the most that this process has ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the work, and the limits --------------------------------------------------------------------

def update_flops(cfg):
    """Of the matrix products of one update: 2 for each weight and token, and twice as many in the
    backward pass (Kaplan et al. 2020, 2.1). Attention counts in full, although it is causal."""
    T, C = cfg.prompt + cfg.response, cfg.n_embd
    trunk = cfg.n_layer * (2 * 12 * C * C + 4 * T * C) * T
    policy, critic = trunk + 2 * cfg.vocab * C * cfg.response, trunk + 2 * C * T
    return 3 * (policy + critic) * cfg.batch * cfg.epochs


def decode_bytes(cfg, policy, dtype):
    """What one decoding step has to read: every weight once, and the keys and values so far."""
    weights = sum(p.numel() for p in policy.parameters())
    cached = 2 * cfg.n_layer * cfg.n_embd * cfg.batch * (cfg.prompt + cfg.response / 2)
    return (weights + cached) * dtype.itemsize


def matmul_rate(device, dtype, n=2048):
    """Floating-point operations a second of a square matrix product, in the best of ten."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / min(seconds_of_ten(torch.mm, a, b))


def copy_rate(device, megabytes=256):
    """Bytes a second, read and written, in the best of ten copies."""
    a = torch.ones(megabytes * 2 ** 18, device=device)
    return 2 * a.nbytes / min(seconds_of_ten(torch.empty_like(a).copy_, a))


def seconds_of_ten(function, *args):
    timed = Timed(function)
    for _ in range(10):
        timed(*args)
    return timed.seconds


PRECISIONS = dict(float32=("float32", "float32"), bfloat16=("bfloat16", "bfloat16"),
                  mixed=("float32", "bfloat16"))


@torch.no_grad()
def precision_gap(policy, prompts, R, sampled_in, scored_in, clip=0.2):
    """How far the sampler's log-probs and those of the same tokens in one forward pass differ, in
    number formats of their own: the deviation of the ratio, and the share of tokens that PPO would
    clip at once if it used the sampler's as old log-probs. -> {name: number}"""
    old_logprobs, sample = [], generate.sample

    def sample_and_note(logits, temperature, u):
        token = sample(logits, temperature, u)
        old_logprobs.append(token_logprobs(logits, token, temperature))
        return token

    with patch.object(generate, "sample", sample_and_note), autocast(policy.device, sampled_in):
        tokens, prompt_len, _ = generate.generate(policy, prompts, R)
    with autocast(policy.device, scored_in):
        logprobs = response_logprobs(policy, tokens, prompt_len, R)
    ratio = (logprobs - torch.stack(old_logprobs, 1)).exp()
    return dict(ratio_std=ratio.std().item(),
                ratio_clipped=((ratio - 1).abs() > clip).float().mean().item())


# --- how the time grows --------------------------------------------------------------------------

SWEEPS = dict(batch=(8, 16, 32, 64, 128), response=(16, 32, 64, 128), n_embd=(64, 128, 256, 512))


def scale(cfg):
    """One round at several values of each size, the others as given. Draws scale.png"""
    open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    panels = []
    for name, sizes in SWEEPS.items():
        rows = []
        for size in sizes:
            rows.append(measure(replace(cfg, **{name: size})))
            print(json.dumps({name: size, **rows[-1]}), flush=True)
        panels.append((name, sizes, {part: [row[part] for row in rows]
                                     for part in ("gen_sec", "score_sec", "update_sec")}))
    plotting.growth(panels, "seconds a round").savefig(Path(cfg.out) / "scale.png")
    print(f"see {cfg.out}/scale.png")


def main(cfg):
    if cfg.scale:
        scale(cfg)
    else:
        print(json.dumps({name: float(f"{x:.5g}") if isinstance(x, float) else x
                          for name, x in measure(cfg).items()}))


if __name__ == "__main__":
    run(main, BenchConfig)
