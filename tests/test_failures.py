"""When something gives way in the middle of a run: a number, the disk. The last good save stays."""

import contextlib
import errno
import json
import os
import resource
import stat
import sys
from dataclasses import dataclass

import pytest
import small_runs
import torch
from small_runs import ROWS, STAGES, STILL
from test_interruptions import rows, same_bits

from nanorlhf import dpo, ilql, ppo, reward, sft, tokenizer
from nanorlhf.generate import generate
from nanorlhf.model import GPT
from nanorlhf.support import UserError, checkpoint
from nanorlhf.support.checkpoint import load_state, save_state
from nanorlhf.support.config import run
from nanorlhf.support.runlog import RunLog, open_run, write_whole

LOSSES = dict(
    sft=(sft, "loss"), rm=(reward, "bradley_terry_loss"), ppo=(ppo, "policy_loss"),
    dpo=(dpo, "dpo_loss"),
    ilql=(ilql, "expectile_loss"),
)  # fmt: skip
TEXTS = [tokens for tokens, _ in ROWS]


@pytest.fixture
def folders(tmp_path, capsys):
    for name in "whole", "broken":
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "broken"


# --- a number that is none ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_goes_bad_stops_the_run_with_its_rows_and_the_last_good_save(
    stage, folders, monkeypatch
):
    whole, broken = folders
    small_runs.run(stage, whole)
    with monkeypatch.context() as patch:
        module, name = LOSSES[stage]
        true_loss = getattr(module, name)

        def loss(*args, **kwargs):  # spoilt as soon as there is something to go back to
            spoilt = (broken / "state.pt").exists()
            return true_loss(*args, **kwargs) * (float("nan") if spoilt else 1)

        patch.setattr(module, name, loss)
        with pytest.raises(UserError) as stopped:
            small_runs.run(stage, broken)
    said = str(stopped.value)
    bad = [json.loads(line) for line in (broken / "bad_batch.jsonl").read_text().splitlines()]
    assert "loss is nan at step 3: a lower --learning-rate" in said
    assert f"the step's {len(bad)} rows are in {broken}/bad_batch.jsonl" in said
    assert said.endswith("and --resume continues from the save after 3 steps")
    assert len(bad) >= 4 and {"tokens", "prompt_len"} == bad[0].keys()
    if stage != "ppo":  # which answers rows of its own
        assert all(row["tokens"] in TEXTS for row in bad)

    assert [row["step"] for row in rows(broken)] == [0, 1, 2]
    small_runs.run(stage, broken)
    assert rows(broken) == rows(whole) and same_bits(whole, broken)


def test_the_rows_of_a_bad_step_can_be_read_as_text(tmp_path):
    log = RunLog(tmp_path, decode=lambda tokens: "".join(chr(96 + token) for token in tokens))
    log.batch = zip(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 2]), strict=True)
    with pytest.raises(UserError, match="loss is inf .* rows are in .*nothing had been saved"):
        log.write(0, loss=float("inf"))
    lines = (tmp_path / "bad_batch.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        dict(tokens=[1, 2, 3], prompt_len=1, prompt="a", response="bc"),
        dict(tokens=[4, 5, 6], prompt_len=2, prompt="de", response="f"),
    ]


def test_a_resumed_run_that_goes_bad_at_once_names_the_save_it_came_from(tmp_path):
    write_whole(tmp_path / "log.jsonl", '{"step": 0}\n{"step": 1}\n')
    log = RunLog(tmp_path)
    with pytest.raises(UserError, match="--resume continues from the save after 2 steps"):
        for step in log.steps(2, 5):
            log.write(step, loss=float("nan"))


def test_weights_that_are_no_numbers_are_never_saved_over_good_ones(tmp_path):
    model = torch.nn.Linear(2, 2)
    save_state(tmp_path, dict(model=model), step=1)
    with torch.no_grad():
        model.weight[1, 0] = float("inf")
    with pytest.raises(UserError, match="weights of the model are not finite numbers"):
        save_state(tmp_path, dict(model=model), step=2)
    assert load_state(tmp_path, dict(model=model)) == dict(step=1)


def test_a_model_that_is_spoilt_says_so_before_it_says_nonsense():
    model = GPT(STILL).eval()
    generate(model, [[1, 2]], 3)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not a finite number.*--learning-rate"):
        generate(model, [[1, 2]], 3)


# --- a full disk ---


@pytest.fixture
def one_thread():
    """A child has none of the threads that PyTorch has started here, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_a_child(function):
    """-> what it says as it dies: a sentence, or nothing. Its limits die with it."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        said = b"no sentence at all"
        with contextlib.suppress(BaseException):
            try:
                function()
                said = b""
            except UserError as error:
                said = str(error).encode()
        os.write(write, said)
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode()


class FillsUp(RunLog):
    """From step 7 on no file may be longer than `limit` bytes: the first save is after step 2."""

    def write(self, step, **metrics):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        super().write(step, **metrics)


@pytest.mark.parametrize("limit, lost", [(100, "log.jsonl"), (4096, "state.pt")])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_is_one_sentence_and_the_save_before_still_resumes(
    stage, limit, lost, folders, monkeypatch, one_thread
):
    whole, broken = folders
    small_runs.run(stage, whole)
    monkeypatch.setattr(FillsUp, "limit", limit, raising=False)
    monkeypatch.setattr(small_runs, "RunLog", FillsUp)
    said = in_a_child(lambda: small_runs.run(stage, broken))
    monkeypatch.undo()
    assert said.startswith(f"cannot write {broken}/{lost}: File too large; ")
    assert sorted(path.name for path in broken.iterdir()) == ["log.jsonl", "state.pt"]
    assert torch.load(broken / "state.pt", weights_only=True)["numbers"]["step"] == 6
    small_runs.run(stage, broken)
    assert rows(broken) == rows(whole) and same_bits(whole, broken)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Config:
    """Train."""

    steps: int = 4  # updates
    out: str = ""  # folder


def write_settings(folder):
    open_run(folder, Config(out="x"))


def write_summary(folder):
    RunLog(folder).finish(steps=3)


def write_tokenizer(folder):
    small_tokenizer().save(folder)


def write_model(folder):
    GPT(STILL).save(folder)


def small_tokenizer():
    return tokenizer.learn(["ha ha ha"], 258)


@pytest.mark.parametrize("write", [write_settings, write_summary, write_tokenizer, write_model])
def test_whatever_is_written_is_written_whole_or_not_at_all(write, tmp_path, monkeypatch):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device; it is as it "):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_that_nobody_expected_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run(full, Config)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "cannot use a file: No space left on device\n"


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch):
    def main(cfg):
        raise FileNotFoundError(errno.ENOENT, "No such file", "our own mistake")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(FileNotFoundError):
        run(main, Config)


# --- a power cut ---


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_whole(folder / "a", "text"),
        lambda folder: checkpoint.save_tensors(folder / "a", dict(a=torch.ones(2))),
        lambda folder: save_state(folder, {}, step=1),
    ],
)
def test_first_the_content_is_on_the_disk_then_the_name_then_the_folder(
    write, tmp_path, monkeypatch
):
    order, replace = [], os.replace
    kind = lambda handle: "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content"  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(kind(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("name") or replace(*names))
    write(tmp_path)
    assert order == ["content", "name", "folder"]


def test_a_system_that_cannot_sync_a_folder_saves_all_the_same(tmp_path, monkeypatch):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
