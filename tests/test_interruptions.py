"""Runs that are killed again and again, at any moment, end as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import STAGES

HERE = Path(__file__).parent
KILLS = 4  # of each stage, each way


@pytest.fixture(scope="module")
def start():
    """Start a stage in a process. -> its id, and a function that waits for its exit status"""
    server = subprocess.Popen(
        [sys.executable, HERE / "small_runs.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )

    assert server.stdout.readline() == "ready\n"

    def run(stage, folder):
        server.stdin.write(f"{stage} {folder}\n")
        server.stdin.flush()
        return int(server.stdout.readline()), lambda: int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def rows(folder):
    """log.jsonl without what is measured in seconds."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: x for k, x in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def leaves(state):
    """Every tensor and number of a saved state, in order."""
    if isinstance(state, dict):
        return [leaf for key in sorted(state, key=str) for leaf in leaves(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for item in state for leaf in leaves(item)]
    return [state]


def same_bits(a, b):
    a, b = (leaves(torch.load(folder / "state.pt", weights_only=True)) for folder in (a, b))
    assert len(a) == len(b) > 20
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_and_resumed_ends_with_the_very_bits(start, stage, how, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in whole, broken:
        folder.mkdir()
    began = time.perf_counter()
    assert start(stage, whole)[1]() == 0
    seconds = time.perf_counter() - began  # the kills come within the same

    rng, kills, resumed = random.Random(stage), 0, 0
    while kills < KILLS or resumed < 3:
        resumed += (broken / "state.pt").exists()
        pid, wait = start(stage, broken)
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(pid, how)
        status = wait()
        if status == 0:  # too late; once more from the beginning
            assert rows(broken) == rows(whole)
            shutil.rmtree(broken)
            broken.mkdir()
            continue
        kills += 1
        if status == 130 and (broken / "state.pt").exists():
            saved = torch.load(broken / "state.pt", weights_only=True)
            assert saved["numbers"]["step"] == len(rows(broken))  # Ctrl-C loses nothing
    assert start(stage, broken)[1]() == 0
    assert rows(broken) == rows(whole)
    assert [row["step"] for row in rows(whole)] == list(range(len(rows(whole))))
    assert same_bits(whole, broken)


# --- a whole command ---


COMMAND = (
    "train_sft.py --steps 120 --save-every 4 --demos 150 --vocab-size 300 --n-layer 1 --n-head 2"
    " --n-embd 16 --batch-size 4 --dropout 0.1 --device cpu --dtype float32"
)


def launch(words, out):
    script, *flags = words.split()
    return subprocess.Popen(
        [sys.executable, HERE.parent / script, *flags, "--out", out],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def when_saved(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_command_that_is_killed_and_resumed_leaves_the_very_files_of_one_that_was_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch(COMMAND, whole).wait() == 0

    rng, words = random.Random(0), COMMAND
    for _ in range(2):
        command, before = launch(words, broken), when_saved(broken / "state.pt")
        while command.poll() is None and when_saved(broken / "state.pt") == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        command.kill()
        assert command.wait() == -signal.SIGKILL
        words = COMMAND + " --resume"
    assert not (broken / "model.safetensors").exists()
    command = launch(words, broken)
    assert command.wait() == 0, command.stderr.read()

    assert rows(broken) == rows(whole) and len(rows(whole)) == 120
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in broken.iterdir()} - names <= {"state.pt.tmp", "log.jsonl.tmp"}
    for name in names - {"log.jsonl", "summary.json", "state.pt"}:  # seconds stand in these
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
