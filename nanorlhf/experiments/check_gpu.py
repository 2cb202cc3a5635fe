"""What a GPU has to show, in nine minutes: python -m nanorlhf.experiments.bench --check-gpu

A part yields rows (what, figure, goal) one by one, in a process of its own: neither an error nor a
part that takes too long loses what was measured. After each part all is in results.json, table.md.
Without CUDA the sizes are those of a toy, and nothing is compiled or captured.
"""
import gc
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import profile

from nanorlhf import generate
from nanorlhf.model import GPT, GPTConfig, KVCache
from nanorlhf.support import UserError, fast
from nanorlhf.support.checkpoint import write_whole
from nanorlhf.support.config import autocast, find_device, named, precision, setup

ROOT = Path(__file__).parents[2]
SMALL = dict(n_layer=4, n_head=4, n_embd=256, vocab=4096)
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, vocab=50257)
TOY = dict(n_layer=1, n_head=2, n_embd=16, vocab=50, batch=4, minibatches=2)
COMMANDS = dict(sft="--out {0}/sft", rm="--sft {0}/sft --out {0}/rm",
                ppo="--sft {0}/sft --rm {0}/rm --out {0}/ppo")
TOY_COMMANDS = dict(
    sft=" --steps 2 --demos 150 --vocab-size 300 --n-layer 1 --n-embd 16 --batch-size 4",
    rm=" --steps 2 --prompts 6 --held-out-prompts 8 --max-new-tokens 9",
    ppo=" --steps 2 --prompts 16 --eval-prompts 8 --batch-size 4 --max-new-tokens 9")
ATTENTION = "flash|fmha|sdpa|attention|attn"
WAITS = "StreamSynchronize|_local_scalar_dense|aten::item|aten::nonzero|Memcpy DtoH"


def call(cfg, *words):
    """Run Python with these words, until the time is over at most."""
    left = max(1, cfg.time_limit - time.perf_counter())
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, timeout=left,
                          encoding="utf-8", errors="replace")


def tests(cfg, toy, measure):
    words = "-m pytest -q -rf --tb=line -m device tests/test_device.py".split()
    said = call(cfg, *words, *["-k", "one_sentence"] * toy).stdout.strip().splitlines()
    yield from ((line, "", "none") for line in said if line.startswith(("FAILED", "ERROR")))
    yield "tests on this device", said[-1], "none fails"


def commands(cfg, toy, measure):
    began = time.perf_counter()
    for name, flags in COMMANDS.items():
        words = (flags + TOY_COMMANDS[name] * toy).format(Path(cfg.out).resolve()).split()
        done = call(cfg, f"train_{name}.py", "--overwrite", "--device", cfg.device, *words)
        if done.returncode:
            raise RuntimeError(f"train_{name}.py: {done.stderr[-500:]}")
        yield f"until train_{name}.py has ended, s", time.perf_counter() - began, "under 60"
    summary = json.loads(Path(cfg.out, "ppo", "summary.json").read_text())
    yield "win rate over the SFT model", summary["win_rate"], "0.96, as on a CPU"


def speed(shape, compile, cfg, toy, measure):
    """A round of PPO, its decoding steps launched one by one, and as CUDA graphs."""
    goals = dict(mbu="0.6", mfu="0.45") if shape == GPT2 else {}
    for response in (8,) if toy else (64, 256):
        case = replace(cfg, **TOY if toy else shape, response=response, compile=compile, iters=3)
        for graphs in (False,) if toy else (False, True):
            gc.collect()                                  # the models before would count as memory
            kind = ("compiled" if compile else "eager") + ", captured" * graphs
            try:
                with patch.object(fast, "captures", lambda model: graphs):  # noqa: B023
                    found = measure(case)
            except Exception as error:                    # out of memory, perhaps: the others go on
                found = dict(error=f"{type(error).__name__}: {error}"[:300])
            memory = expected_memory(case, precision(find_device(cfg.device), cfg.dtype), graphs)
            hopes = goals | dict(peak_memory_mb=f"about {memory / 2 ** 20:,.0f}")
            for key, figure in found.items():
                yield f"32 + {response} tokens, {kind}: {key}", figure, hopes.get(key, "")


def expected_memory(case, dtype, graphs):
    """Bytes of a round of PPO: of the models, and of an update or of sampling."""
    n, L, C, V, B = dtype.itemsize, case.n_layer, case.n_embd, case.vocab, case.batch
    T, rows = case.prompt + case.response, case.micro_batch_size or B // case.minibatches
    # Two networks with gradients and Adam's moments, two without; and copies of the weights in n
    # bytes, two for autocast's products and one, with graphs, for sampling.
    models = (12 * L * C * C + (V + T) * C) * (2 * 16 + 2 * 4 + (n < 4) * 2 * n + graphs * n)
    update = rows * (2 * T * L * C * (16 + 15 * n) + 2 * case.response * V * n)
    return models + max(update, B * (2 * L * C * T * n * (1 + graphs) + 5 * 4 * V))


def kernels(cfg, toy, measure):
    """Which kernels attention takes, which ones take long, and whether a step waits for the GPU."""
    device, case = setup(cfg), replace(cfg, **TOY if toy else GPT2)
    P, S, B = case.prompt, case.prompt + case.response, case.batch
    shape = GPTConfig(case.vocab, S, case.n_layer, case.n_head, case.n_embd)
    policy, tokens = GPT(shape).to(device).eval(), torch.ones(B, S, dtype=torch.long, device=device)
    cache = KVCache(shape, B, S, device, precision(device, cfg.dtype))
    settings = tokens[:, :P].sum(1), torch.rand(B, 9, device=device).double(), 1.0, None, 0
    sampler = fast.cast(policy, cache.k[0].dtype)
    decoder = fast.Decoder(generate.sample, sampler, cache, tokens, *settings)

    def learn():
        policy(tokens[:16]).float().logsumexp(-1).mean().backward()

    for what, step, goal in ("training", learn, "flash"), ("a decoding step", decoder.step, ""):
        with autocast(device, cfg.dtype), torch.set_grad_enabled(step is learn):
            step()                                        # makes what is made only once
            with profile() as found:
                step()
        events = found.key_averages()
        on_gpu = [e for e in events if str(e.device_type).endswith("CUDA")]
        on_gpu.sort(key=lambda e: -e.self_device_time_total)
        yield f"attention in {what}", "; ".join(
            e.key[:90] for e in on_gpu or events if re.search(ATTENTION, e.key, re.I)), goal
        yield f"microseconds in {what}", sum(e.self_device_time_total for e in on_gpu), "; ".join(
            f"{e.self_device_time_total:.0f}: {e.key[:60]}" for e in on_gpu[:8])
    waits = {e.key: e.count for e in events if re.search(WAITS, e.key)}
    yield "waits for the device in a decoding step", json.dumps(waits), "none: {}"


PARTS = {"tests": tests, "commands": commands, "kernels": kernels,
         "GPT-2": partial(speed, GPT2, False), "4 x 256": partial(speed, SMALL, False),
         "GPT-2, compiled": partial(speed, GPT2, True),
         "4 x 256, compiled": partial(speed, SMALL, True)}


def check(cfg, measure):
    """Every part, as far as the time goes; with --part that one, in this process."""
    device, out = find_device(cfg.device), Path(cfg.out)
    toy, results = device.type != "cuda", {}
    cfg.time_limit += time.perf_counter()                 # from here on: when it ends
    out.mkdir(parents=True, exist_ok=True)
    if cfg.part:
        if cfg.part not in PARTS:
            raise UserError(f"--part: expected one of {', '.join(PARTS)}, came {cfg.part}")
        for row in PARTS[cfg.part](cfg, toy, measure):
            print(json.dumps(row), flush=True)
        return
    for part in [*PARTS][:4] if toy else PARTS:
        begin, error = time.perf_counter(), ""
        words = ["--check-gpu", "--part", part, "--out", cfg.out, "--device", device.type,
                 "--dtype", cfg.dtype, "--time-limit", str(max(1, int(cfg.time_limit - begin)))]
        try:
            done = call(cfg, "-m", "nanorlhf.experiments.bench", *words)
            said, error = done.stdout, done.stderr.strip()[-500:] if done.returncode else ""
        except subprocess.TimeoutExpired as stopped:
            said, error = stopped.stdout or "", "out of time"
            said = said if isinstance(said, str) else said.decode()     # it depends on the system
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
        rows.append(["seconds, of the whole part", time.perf_counter() - begin, ""])
        results[part] = rows + [["error", error, "none"]] * bool(error)
        machine = f"{named(device, cfg.dtype)}, PyTorch {torch.__version__}" + ", a toy" * toy
        write_whole(out / "results.json", dict(machine=machine, parts=results))
        write_whole(out / "table.md", table(machine, results))
    print((out / "table.md").read_text())


def table(machine, results):
    lines = [f"On {machine}.\n", "| part | what | figure | goal |", "|---|---|---|---|"]
    for part, rows in results.items():
        for what, figure, goal in rows:
            figure = f"{figure:,.4g}" if isinstance(figure, float) else figure
            lines.append(" ".join(f"| {part} | {what} | {figure} | {goal} |".split()))
    return "\n".join(lines) + "\n"
