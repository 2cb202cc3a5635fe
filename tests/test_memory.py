"""What a run says it will need is what it needs, and where that is too much it says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf.model import GPT, GPTConfig
from nanorlhf.support import memory

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def measured(words):
    """-> estimate and measured rise of the peak, in bytes, of a process of its own"""
    out = subprocess.run(
        [sys.executable, HERE / "small_memory.py", *words.split()],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return map(float, out.split())


#                vocabulary, width, layers, heads, prompt, response, rows, micro, dtype
SIZES = {
    "where weights count": "2000 512 4 8 32 96 4 0 float32",
    "where layers and attention count": "300 128 6 4 128 128 32 0 float32",
    "where logits count": "20000 128 2 2 16 64 32 0 float32",
    "in parts": "300 128 6 4 128 128 32 8 float32",
}


@pytest.mark.parametrize(
    "stage, size",
    [
        ("sft", "where layers and attention count"),
        ("sft", "where logits count"),
        ("rm", "where layers and attention count"),
        ("sft", "in parts"),
        ("dpo", "where logits count"),
        ("ilql", "where logits count"),
        ("ppo", "where weights count"),
        ("ppo", "where logits count"),
    ],
)
def test_the_estimate_is_right_within_a_factor_of_one_and_a_half(stage, size):
    estimate, true = measured(f"{stage} {SIZES[size]}")
    assert true > 250e6  # large enough to be told from what Python itself does
    assert true / 1.5 < estimate < true * 1.5


def test_smaller_parts_are_said_to_need_less():
    model = GPT(GPTConfig(vocab_size=12, n_positions=64, n_layer=2, n_head=2, n_embd=16))
    whole, half = (memory.activations(model, rows, 64) for rows in (8, 4))
    assert whole == 2 * half > 0


@pytest.mark.parametrize(
    "free, needed, micro, line",
    [
        (8e9, 0.94e9, 0, "memory    about 0.9 GB at --micro-batch-size 0 (no limit)\n"),
        (None, 94e9, 4, "memory    about 94.0 GB at --micro-batch-size 4\n"),
        (
            0.5e9,
            0.94e9,
            16,
            "memory    about 0.9 GB at --micro-batch-size 16, and 0.5 GB are free:"
            " try a smaller one\n",
        ),
    ],
)
def test_one_line_says_what_a_run_needs_and_where_that_is_too_much_what_to_do(
    free, needed, micro, line, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "free", lambda device: free)
    memory.tell(needed, CPU, micro)
    assert capsys.readouterr().out == line


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system does not say")
def test_what_is_free_is_less_than_what_there_is():
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.free(CPU) < there
