"""The bench counts what the models really do, and says it in one line."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import ppo
from nanorlhf.experiments import check_gpu
from nanorlhf.experiments.bench import BenchConfig, decode_bytes, measure, update_flops
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.support import fast

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


# --- what a GPU has to show, at toy sizes ---


@pytest.fixture
def toy(tmp_path):
    return BenchConfig(check_gpu=True, out=str(tmp_path), device="cpu", dtype="float32")


def rows(part, cfg):
    cfg.time_limit += time.perf_counter()
    return {what: (figure, goal) for what, figure, goal in part(cfg, True, measure)}


def test_the_whole_program_runs_at_toy_sizes(tmp_path):
    words = ["--check-gpu", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "nanorlhf.experiments.bench", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [*parts] == ["tests", "commands", "kernels", "GPT-2"]
    found = {what: figure for part in parts.values() for what, figure, _ in part}
    assert "error" not in found, found["error"]
    assert "1 passed" in found["tests on this device"]
    assert 0 <= found["win rate over the SFT model"] <= 1
    assert found["32 + 8 tokens, eager: mfu"] > 0
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_a_kernel_is_named_and_every_wait_for_the_device_counted(toy, monkeypatch):
    found = rows(check_gpu.kernels, toy)
    assert "scaled_dot_product" in found["attention in a decoding step"][0]
    assert found["waits for the device in a decoding step"][0] == "{}"
    step = fast.Decoder.step
    monkeypatch.setattr(fast.Decoder, "step", lambda x: (step(x), x.alive.any().item()))
    found = rows(check_gpu.kernels, toy)["waits for the device in a decoding step"][0]
    assert json.loads(found) == {"aten::item": 1, "aten::_local_scalar_dense": 1}


def test_what_was_measured_is_kept_whatever_comes_after_it(toy, monkeypatch):
    monkeypatch.setattr(check_gpu, "PARTS", dict.fromkeys(["kernels", "no such part"]))
    check_gpu.check(toy, measure)
    results = json.loads(Path(toy.out, "results.json").read_text())
    (*found, [seconds, _, _]), (_, [what, message, _]) = results["parts"].values()
    assert len(found) == 5 and seconds == "seconds, of the whole part" and what == "error"
    assert message.startswith("--part: expected one of tests, commands, ")
    table = Path(toy.out, "table.md").read_text()
    assert table.startswith("On cpu in float32, PyTorch ") and ", a toy." in table
    assert table.count("\n| kernels | ") == 6 and table.count(message) == 1

    toy.time_limit = 0  # no process can be so fast
    check_gpu.check(toy, measure)
    results = json.loads(Path(toy.out, "results.json").read_text())
    assert [rows[-1][:2] for rows in results["parts"].values()] == [["error", "out of time"]] * 2


def test_a_round_is_measured_and_an_error_in_one_leaves_the_others(toy, monkeypatch):
    part = partial(check_gpu.speed, check_gpu.GPT2, False)
    found = rows(part, toy)
    assert found["32 + 8 tokens, eager: mfu"][1] == "0.45" and len(found) > 10

    def no_memory(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")

    [(what, message, _)] = part(toy, True, no_memory)
    assert what == "32 + 8 tokens, eager: error" and message.endswith(": CUDA out of memory")


def test_the_memory_of_a_round_is_the_one_that_is_expected():
    """Of weights, gradients and Adam's moments by hand: 40 bytes a weight for the four models."""
    case = BenchConfig(**TINY)
    weights = sum(p.numel() for p in GPT(GPTConfig(50, 11, 2, 2, 16)).parameters())
    least = check_gpu.expected_memory(replace(case, batch=0), torch.float32, False)
    assert least == pytest.approx(40 * weights, rel=0.1)
    assert check_gpu.expected_memory(case, torch.float32, True) > least + 4 * weights
