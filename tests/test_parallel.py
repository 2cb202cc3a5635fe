"""Several processes compute what one would, and end together, whatever happens to one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_runs import PROMPTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server():
    python = [sys.executable, ROOT / "tests" / "parallel_runs.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        python, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def start(server, tmp_path):
    """Run a job in n processes, in tmp_path / name. -> their exit statuses"""

    def run(n, job, name, **settings):
        (tmp_path / name).mkdir(exist_ok=True)
        server.stdin.write(json.dumps([n, job, str(tmp_path / name), settings]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    return run


@pytest.fixture
def results(start, tmp_path):
    """The same, for a job that is to succeed. -> what each process returned"""

    def run(n, job, name="", **settings):
        name = name or f"{n} {job}"
        statuses = start(n, job, name, **settings)
        assert statuses == [0] * n, [said(tmp_path / name, i, "err") for i in range(n)]
        return [torch.load(tmp_path / name / f"{i}.pt", weights_only=True) for i in range(n)]

    return run


def said(folder, rank, where):
    return (folder / f"{rank}.{where}").read_text()


def same(a, b, atol=0.0):
    """Are two results, of whatever is in them, the same?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], atol) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y, atol) for x, y in zip(a, b))
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def learnt_the_same(a, b, atol=1e-9):
    """Weights, and every number of the log. Shares and accuracies are float32: 6e-8 of 1."""
    assert len(a["rows"]) > 1 and same(a["rows"], b["rows"], 1e-6)
    return same(a["weights"], b["weights"], atol)


# --- the same numbers -----------------------------------------------------------------------------

STAGES = ["run_sft", "run_rm", "run_dpo", "run_ilql"]
BATCHES = {
    "an even batch": dict(batch_size=6),
    "an uneven one": dict(batch_size=5),
    "in small parts": dict(batch_size=7, micro_batch_size=2),
    "too small for all": dict(batch_size=1),
}


@pytest.mark.parametrize("settings", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(results, stage, settings):
    [one], two = results(1, stage, **settings), results(2, stage, **settings)
    assert same(two[0], two[1])  # to the bit, or they would drift apart
    assert len(one["rows"]) == 6 and learnt_the_same(one, two[0])


def test_three_processes_learn_what_one_does(results):
    [one], three = results(1, "run_rm", batch_size=5), results(3, "run_rm", batch_size=5)
    assert learnt_the_same(one, three[0])
    assert same(three[0], three[1]) and same(three[0], three[2])


ADVANTAGES = {
    "gae": dict(kl_target=1.0),
    "rloo": dict(advantage="rloo", responses=2),
    "small parts": dict(micro_batch_size=2, no_end_penalty=0.5),
    "one prompt": dict(batch_size=2, responses=2),
    "one response": dict(batch_size=1, minibatches=1),
}


@pytest.mark.parametrize("settings", ADVANTAGES.values(), ids=ADVANTAGES)
def test_ppo_in_two_processes_learns_what_one_does(results, settings):
    [one], two = results(1, "run_ppo", **settings), results(2, "run_ppo", **settings)
    assert same(two[0], two[1])
    assert len(one["rows"]) == 4 and learnt_the_same(one, two[0], 1e-8)


UPDATES = {
    "as it comes": {},
    "a row at a time": dict(micro_batch_size=1),
    "fewer rows than processes": dict(minibatches=7),
}


@pytest.mark.parametrize("settings", UPDATES.values(), ids=UPDATES)
def test_an_update_on_one_rollout_is_the_same(results, settings):
    [one], two = results(1, "update", **settings), results(2, "update", **settings)
    names = {"policy_loss", "value_loss", "clip_frac", "policy_grad_norm", "critic_grad_norm"}
    assert one["rows"][0].keys() >= names and one["rows"][0]["clip_frac"] > 0
    assert same(two[0], two[1]) and same(one, two[0], 1e-8)  # and the random numbers after it


# --- the rollout ----------------------------------------------------------------------------------

FIELDS = "old_logprobs ref_logprobs entropy scores rewards advantages old_values returns"


@pytest.mark.parametrize("prompts", [PROMPTS[:6], PROMPTS[:5], PROMPTS[2:3]], ids=len)
@pytest.mark.parametrize("n", [2, 3])
def test_a_rollout_that_is_shared_out_is_that_of_one_process(results, n, prompts):
    settings = dict(prompts=prompts, responses=2, micro_batch_size=3)
    [one], several = results(1, "collect", **settings), results(n, "collect", **settings)
    assert all(same(several[0], other) for other in several)
    assert len(one["mask"]) == 2 * len(prompts)
    for name in "tokens prompt_len mask ended random".split():
        assert same(one[name], several[0][name]), name
    for name in FIELDS.split():
        a, b = one[name], several[0][name]
        if a.dim() == 2:
            a, b = a * one["mask"], b * one["mask"]
        assert same(a, b, 1e-12), name


@pytest.mark.parametrize("batch_size", [0, 2, 5])
def test_two_and_three_processes_sample_the_very_rows_that_one_does(results, batch_size):
    [one] = results(1, "sample", "one")  # all rows at once
    for n in 1, 2, 3:
        for process in results(n, "sample", batch_size=batch_size):
            assert process["rows"] == one["rows"] and same(process["random"], one["random"])
    assert [tokens[:2] for tokens, _ in one["rows"]] == [[1, i // 2 % 3] for i in range(14)]
    responses = [tuple(tokens[2:]) for tokens, _ in one["rows"]]
    assert len(set(responses)) > 10  # the same prompt is answered in a new way every time


def test_dropout_differs_from_process_to_process_and_what_is_common_stays_common(results):
    first, second = results(2, "random_numbers")
    assert len(first["drawn"]) == 2
    drawn = [*first["drawn"], *second["drawn"], first["before"], first["after"]]
    assert len({tuple(x.tolist()) for x in drawn}) == 6
    assert same(first["before"], second["before"]) and same(first["after"], second["after"])


def test_where_there_is_no_dropout_several_processes_draw_the_next_number_of_one(results):
    [one] = results(1, "random_numbers", inside=False)
    for n in 2, 3:
        for process in results(n, "random_numbers", inside=False):
            assert same(process["before"], one["before"]) and same(process["after"], one["after"])


# --- stopping, saving, resuming -------------------------------------------------------------------

RUNS = {
    "sft": ("run_sft", {}),
    "sft with dropout": ("run_sft", dict(dropout=0.3)),
    "rm": ("run_rm", dict(dropout=0.3)),
    "dpo": ("run_dpo", {}),
    "ilql": ("run_ilql", {}),
    "ppo": ("run_ppo", dict(kl_target=1.0)),
}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage, settings", RUNS.values(), ids=RUNS)
def test_ctrl_c_in_one_process_stops_all_and_resuming_gives_the_very_bits(
    start, results, tmp_path, stage, settings
):
    settings = dict(steps=5, **settings)
    whole = results(2, stage, "whole", **settings)
    assert start(2, stage, "broken", at=(1, 1), **settings) == [130, 130]
    assert steps(tmp_path / "broken") == [0, 1]  # saved then, though it was not yet time
    resumed = results(2, stage, "broken", resume=True, **settings)
    assert same(resumed[0], resumed[1]) and len(resumed[0]["rows"]) == 3
    assert resumed[0]["rows"] == whole[0]["rows"][2:]
    assert same(resumed[0]["weights"], whole[0]["weights"])
    assert steps(tmp_path / "broken") == [0, 1, 2, 3, 4]  # one process writes, and each step once


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("stage, settings", [("run_sft", {}), ("run_ppo", {})])
def test_a_run_goes_on_in_another_number_of_processes(
    start, results, tmp_path, stage, settings, before, after
):
    settings = dict(steps=5, **settings)
    [whole] = results(1, stage, "whole", **settings)
    assert start(before, stage, "broken", at=(0, 1), **settings) == [130] * before
    resumed = results(after, stage, "broken", resume=True, **settings)
    assert all(same(resumed[0], other) for other in resumed)
    assert len(resumed[0]["rows"]) == 3
    assert learnt_the_same(dict(whole, rows=whole["rows"][2:]), resumed[0], 1e-8)
    assert steps(tmp_path / "broken") == [0, 1, 2, 3, 4]


# --- mistakes -------------------------------------------------------------------------------------


def test_one_process_speaks_and_goes_on_alone(start, tmp_path):
    assert start(2, "open_run", "") == [0, 0]
    assert said(tmp_path, 0, "out") == "started\nfinished, one of 1\n"
    assert [said(tmp_path, 1, "out"), said(tmp_path, 0, "err"), said(tmp_path, 1, "err")] == [
        ""
    ] * 3


@pytest.mark.parametrize("settings, sentence", [
    (dict(steps=7), "holds a run with other settings (steps 800 there, 7 here)"),
    (dict(stepz=7), "--stepz is not a flag of"),
    (dict(device="mps"), "--device: PyTorch sees cpu on this machine"),
])  # fmt: skip
def test_a_mistake_of_all_is_said_once_and_ends_all(start, tmp_path, settings, sentence):
    start(1, "open_run", "")
    before = (tmp_path / "run" / "settings.json").read_text()
    (tmp_path / "0 went on").unlink()
    assert start(2, "open_run", "", **settings) == [2, 2]
    words = said(tmp_path, 0, "err") + said(tmp_path, 1, "err")
    assert sentence in words and words.count("\n") == 1
    assert (tmp_path / "run" / "settings.json").read_text() == before
    assert not list(tmp_path.glob("* went on"))


def test_a_mistake_of_one_process_is_said_by_it_and_ends_all(start, tmp_path):
    assert start(3, "open_run", "", fails="user") == [2, 2, 2]
    assert [said(tmp_path, i, "err") for i in range(3)] == ["", "", "this process has no luck\n"]


def test_a_crash_of_one_process_is_said_by_it_and_ends_all(start, tmp_path):
    assert start(2, "open_run", "", fails="crash") == [2, 1]
    assert "ZeroDivisionError" in said(tmp_path, 1, "err")
    assert said(tmp_path, 0, "err").startswith("lost the other processes: ")
    assert said(tmp_path, 0, "err").count("\n") == 1


# --- the real thing -------------------------------------------------------------------------------


def torchrun(folder, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # whichever port is free
    return subprocess.run(
        [*command, *words.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


TINY = (
    f"{ROOT}/train_sft.py --steps 3 --device cpu --dtype float32 --demos 150 --vocab-size 300"
    " --n-layer 1 --n-head 2 --n-embd 16 --batch-size 5"
)


def test_the_command_of_the_readme(tmp_path):
    done = torchrun(tmp_path, TINY)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out" / "sft"
    names = "model.safetensors vocab.json curves.png samples.md summary.json state.pt"
    assert {path.name for path in run.iterdir()} >= set(names.split())
    assert steps(run) == [0, 1, 2]
    assert done.stdout.count("step     0") == done.stdout.count("next: python train_rm.py") == 1
