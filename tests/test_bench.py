"""The bench counts what the models really do, and says it in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import ppo
from nanorlhf.experiments.bench import BenchConfig, decode_bytes, measure, update_flops
from nanorlhf.model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, vocab=50, batch=4, prompt=5, response=6, minibatches=2,
    epochs=3, iters=1, device="cpu", dtype="float32",
)  # fmt: skip


def test_the_update_costs_the_flops_that_are_claimed(monkeypatch):
    """PyTorch counts them as they happen; the bench has a formula."""
    counted, real = [], ppo.update

    def counting(*arguments):
        with FlopCounterMode(display=False) as counter:
            metrics = real(*arguments)
        counted.append(counter.get_total_flops())
        return metrics

    monkeypatch.setattr(ppo, "update", counting)
    measure(BenchConfig(**TINY))
    assert counted == [update_flops(BenchConfig(**TINY))] * 2


def test_a_decode_step_reads_the_weights_and_half_the_responses():
    cfg = BenchConfig(**TINY)
    policy = GPT(GPTConfig(50, 11, 2, 2, 16))
    weights = sum(p.numel() for p in policy.parameters())
    caches = [2 * 2 * 16 * 4 * seen for seen in range(5, 5 + 6)]  # what each step finds there
    mean = sum(caches) / len(caches)
    found = decode_bytes(cfg, policy, torch.bfloat16) / 2 - weights
    assert found == pytest.approx(mean, rel=0.1)


def test_one_line_of_json():
    flags = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run(
        [sys.executable, "-m", "nanorlhf.experiments.bench", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    keys = "sec_per_iter gen_sec gen_tokens_per_s episodes_per_s update_tokens_per_s peak_memory_mb"
    for key in [*keys.split(), "mfu", "mbu", "matmul_tflops", "copy_gb_per_s"]:
        assert found[key] > 0, key
    parts = found["gen_sec"] + found["score_sec"] + found["update_sec"]
    assert parts == pytest.approx(found["sec_per_iter"], rel=0.05)
    assert found["episodes_per_s"] == pytest.approx(4 / found["sec_per_iter"], rel=1e-3)
