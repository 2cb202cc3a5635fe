"""How long does a round of PPO take, and how close is that to what this machine can do?

    python -m nanorlhf.experiments.bench --n-embd 256 --batch 64
    python -m nanorlhf.experiments.bench --check-gpu               all of check_gpu.py

All models have one shape and random weights, and every response --response tokens. mfu and mbu: the
share of an update and of decoding in what a large matrix product and a large copy reach here.
"""
import copy
import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch

from nanorlhf import ppo, reward
from nanorlhf.experiments import check_gpu
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support.config import ComputeConfig, compile_trunks, precision, run, setup


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
    check_gpu: bool = False           # instead: tests, commands, timings and kernels on a GPU
    out: str = "out/check-gpu"        # the folder for what --check-gpu finds
    time_limit: int = 500             # seconds that --check-gpu may take
    part: str = ""                    # of --check-gpu: this part alone, in this process


def measure(cfg):
    """Time some rounds, then the limits of the machine. -> {name: number}"""
    device = setup(cfg)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype, tokens = precision(device, cfg.dtype), cfg.batch * cfg.response
    shape = GPTConfig(cfg.vocab, cfg.prompt + cfg.response, cfg.n_layer, cfg.n_head, cfg.n_embd)
    policy = GPT(shape).to(device).eval()
    seconds = time_rounds(cfg, policy)
    generate, collect, update = (median(times[1:]) for times in seconds)
    peak = peak_memory(device)        # before the limits are measured, with large tensors
    flops, bandwidth = limits(device, dtype)
    return dict(
        sec_per_iter=collect + update, gen_sec=generate, score_sec=collect - generate,
        update_sec=update, first_iter_sec=seconds[1][0] + seconds[2][0],
        gen_tokens_per_s=tokens / generate, episodes_per_s=cfg.batch / (collect + update),
        update_tokens_per_s=tokens * cfg.epochs / update, peak_memory_mb=peak / 2 ** 20,
        matmul_tflops=flops / 1e12, copy_gb_per_s=bandwidth / 1e9,
        mfu=update_flops(cfg) / update / flops,
        mbu=decode_bytes(cfg, policy, dtype) * cfg.response / generate / bandwidth,
        dtype=str(dtype).removeprefix("torch."), device=str(device), compile=cfg.compile,
        threads=torch.get_num_threads())


def time_rounds(cfg, policy):
    """Rounds as in ppo.train. -> lists of the seconds of generation, collect and update"""
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic, reward_model = (ScalarGPT(policy.config).to(policy.device).eval() for _ in range(2))
    compile_trunks(cfg.compile, policy, critic, reference, reward_model)
    stage = ppo.PPOConfig(
        batch_size=cfg.batch, epochs=cfg.epochs, minibatches=cfg.minibatches, dtype=cfg.dtype,
        micro_batch_size=cfg.micro_batch_size, max_new_tokens=cfg.response)
    optimizers, score = ppo.make_optimizers(policy, critic, stage), reward.by_model(reward_model)
    prompts = torch.randint(cfg.vocab, (cfg.batch, cfg.prompt)).tolist()
    seconds = [], [], []
    generate, collect, update = map(timed, (ppo.generate_rows, ppo.collect, ppo.update), seconds)
    with patch.object(ppo, "generate_rows", generate):         # the one that ppo.collect calls
        for _ in range(cfg.iters + 1):
            # No token is the end token -1, so every response has the full length.
            rollout = collect(policy, reference, critic, score, prompts, stage, 0.1, eos=-1, pad=0)
            update(policy, critic, optimizers, rollout, stage)
    return seconds


def timed(function, seconds):
    """The function, which notes in the list how long each call took, until the GPU was done."""
    def call(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result
    return call


def peak_memory(device):
    """Bytes: of tensors on a GPU, else of the whole process; 0 on Windows, which does not say."""
    if device.type == "cuda" or sys.platform == "win32":
        return torch.cuda.max_memory_allocated()
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def limits(device, dtype):
    """Operations a second of a large matrix product, bytes a second of a copy: the best of ten."""
    gpu = device.type == "cuda"       # which has done a CPU's share before it is asked for more
    a = torch.randn([8192 if gpu else 2048] * 2, device=device, dtype=dtype)
    b, c = torch.ones(2, 2 ** (28 if gpu else 26), device=device)
    products, copies = [], []
    for _ in range(10):
        timed(torch.mm, products)(a, a)
        timed(c.copy_, copies)(b)
    return 2 * len(a) ** 3 / min(products), 2 * b.nbytes / min(copies)


def update_flops(cfg):
    """Of an update's matrix products: 2 a weight and token, and twice that on the way back."""
    T, C = cfg.prompt + cfg.response, cfg.n_embd
    trunk = cfg.n_layer * (2 * 12 * C * C + 4 * T * C) * T     # attention as if it were not causal
    policy, critic = trunk + 2 * cfg.vocab * C * cfg.response, trunk + 2 * C * T
    return 3 * (policy + critic) * cfg.batch * cfg.epochs


def decode_bytes(cfg, policy, dtype):
    """What one decoding step has to read: every weight once, and the keys and values so far."""
    weights = sum(p.numel() for p in policy.parameters())
    cached = 2 * cfg.n_layer * cfg.n_embd * cfg.batch * (cfg.prompt + cfg.response / 2)
    return (weights + cached) * dtype.itemsize


if __name__ == "__main__":
    run(lambda cfg: check_gpu.check(cfg, measure) if cfg.check_gpu else
        print(json.dumps(measure(cfg))), BenchConfig)
