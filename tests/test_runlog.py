"""A run's folder: what it keeps, what it prints, and what it refuses to overwrite."""

import json
import os
import signal
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from nanorlhf.support import UserError, runlog
from nanorlhf.support.runlog import RunLog, open_run, read, samples


@dataclass
class Config:
    """Train."""

    steps: int = 4  # updates
    learning_rate: float = 0.1  # of AdamW
    data: list[str] = field(default_factory=list)  # files
    out: str = ""  # folder
    device: str = "auto"  # where
    resume: bool = False  # continue
    overwrite: bool = False  # replace


def finished_run(folder, **settings):
    open_run(folder, Config(**settings))
    log = RunLog(folder)
    for step in log.steps(0, 4):
        log.write(step, score=float(step))
    log.finish(steps=4)
    (folder / "state.pt").write_bytes(b"state")


def test_a_new_folder_gets_the_settings_that_make_the_run_what_it_is(tmp_path):
    open_run(tmp_path / "a" / "b", Config(data=["x"], out="elsewhere", device="cpu"))
    written = json.loads((tmp_path / "a" / "b" / "settings.json").read_text())
    assert written == dict(steps=4, learning_rate=0.1, data=["x"])


def test_the_same_command_can_be_run_again(tmp_path):
    finished_run(tmp_path)
    open_run(tmp_path, Config(device="cpu"))  # another device is no other run
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_run_with_other_settings_is_not_overwritten(tmp_path):
    finished_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as refusal:
        open_run(tmp_path, Config(learning_rate=0.2, steps=5))
    for part in ("steps 4 there, 5 here", "learning_rate 0.1 there, 0.2 here", "--overwrite"):
        assert part in str(refusal.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_replaces_a_run_with_other_settings(tmp_path):
    finished_run(tmp_path)
    open_run(tmp_path, Config(steps=5), overwrite=True)
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 5
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("settings", [None, "{broken", "3"])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, settings):
    (tmp_path / "thesis.txt").write_text("years of work")
    if settings:
        (tmp_path / "settings.json").write_text(settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="no run"):
        open_run(tmp_path, Config(), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        open_run(tmp_path / "out" / "sft", Config())


def test_resuming_keeps_the_log_and_may_go_further(tmp_path):
    finished_run(tmp_path)
    open_run(tmp_path, Config(steps=8), resume=True)
    assert len(read(tmp_path)) == 4
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 8


def test_resuming_with_other_settings_is_refused_by_name(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(UserError, match=r"learning_rate 0.1 there, 0.2 here\)"):
        open_run(tmp_path, Config(steps=8, learning_rate=0.2), resume=True)
    with pytest.raises(UserError, match="steps 4 there, 3 here"):
        open_run(tmp_path, Config(steps=3), resume=True)


def test_one_pass_over_the_data_has_no_length_that_could_be_raised(tmp_path):
    finished_run(tmp_path, steps=0)
    open_run(tmp_path, Config(steps=0), resume=True)
    for steps in 3, 5:
        with pytest.raises(UserError, match=f"steps 0 there, {steps} here"):
            open_run(tmp_path, Config(steps=steps), resume=True)


def test_resuming_needs_a_saved_state(tmp_path):
    open_run(tmp_path, Config())
    with pytest.raises(UserError, match="state.pt"):
        open_run(tmp_path, Config(), resume=True)


def test_a_step_is_one_json_line_with_six_digits(tmp_path):
    log = RunLog(tmp_path)
    log.write(0, kl=1 / 3, tokens=7, score=torch.tensor(0.5), loss=np.float32(2e-7))
    text = (tmp_path / "log.jsonl").read_text()
    assert text == '{"step": 0, "kl": 0.333333, "tokens": 7, "score": 0.5, "loss": 2e-07}\n'


def test_the_screen_shows_the_named_columns_now_and_then(capsys):
    log = RunLog(every=2, columns=("score", "kl"))
    for step in log.steps(0, 6):
        log.write(step, score=0.9494 * 10**step, kl=-3.71e-5, unnamed=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "2", "4", "5"]  # the last one, too
    assert lines[0] == "step     0  score    0.949  kl -3.71e-5"
    assert len({len(line) for line in lines}) == 1  # the columns stand still


def test_a_metric_that_is_missing_for_a_step_leaves_its_column_empty(capsys):
    RunLog(columns=("score", "win_rate")).write(0, score=1.0)
    assert capsys.readouterr().out == "step     0  score     1.00  win_rate        -\n"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_a_number_that_went_bad_stops_the_run(tmp_path, bad):
    with pytest.raises(UserError, match="policy_loss is -?(nan|inf) at step 7"):
        RunLog(tmp_path).write(7, score=1.0, policy_loss=bad)
    assert not (tmp_path / "log.jsonl").exists()  # JSON has no word for it


def test_each_step_stands_once_after_resuming(tmp_path):
    finished_run(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "sco')  # it died here, having saved after step 1
    log = RunLog(tmp_path)
    for step in log.steps(2, 5):
        log.write(step, score=10.0 + step)
    assert [(row["step"], row["score"]) for row in read(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0),
    ]  # fmt: skip


def test_reading_tolerates_a_cut_last_line_and_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "sc')
    assert read(tmp_path) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1, "sc\n{"step": 2}\n')
    with pytest.raises(UserError, match="log.jsonl:2: expected JSON"):
        read(tmp_path)
    with pytest.raises(UserError, match="log.jsonl:1: expected JSON .*No such file"):
        read(tmp_path / "nowhere")


def test_the_summary_holds_what_is_given_and_the_seconds(tmp_path, monkeypatch):
    clock = iter([100.0, 103.5])
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    summary = RunLog(tmp_path).finish(steps=3, perplexity=1 / 3)
    assert summary == dict(steps=3, perplexity=0.333333, seconds=3.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_crash_while_writing_leaves_the_old_summary(tmp_path, monkeypatch):
    RunLog(tmp_path).finish(steps=3)
    monkeypatch.setattr(runlog.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        RunLog(tmp_path).finish(steps=4)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


def test_samples_stand_beside_their_prompt_on_page_and_screen(tmp_path, capsys):
    samples(tmp_path, [("Say hi.", "oh\nno")], [("Say hi.", "")], ("SFT", "PPO"))
    page = (tmp_path / "samples.md").read_text()
    assert "**SFT**\n\n    oh\n    no\n\n" in page and "(nothing)" in page
    assert (
        capsys.readouterr().out == "prompt  Say hi.\nSFT     oh\n        no\nPPO     (nothing)\n\n"
    )


def test_no_response_can_break_out_of_its_block(tmp_path, capsys):
    hostile = "````\n# big\n<script>alert(1)</script>\r\x1b[2J\ud800\u2028| a |"
    samples(tmp_path, [("p", hostile)], [("p", "x")])
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert "\n    ````\n    # big\n    <script>alert(1)</script>" in page and "| a |\n\n" in page
    assert not {"\r", "\x1b", "\u2028"} & set(page + capsys.readouterr().out)


# --- Ctrl-C ---


def test_ctrl_c_lets_the_step_end_and_asks_for_a_save(tmp_path):
    log, saves, before = RunLog(tmp_path), [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for step in log.steps(0, 9):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            log.write(step, loss=1.0)
            saves.append(log.due(step + 1, every=100))
    assert saves == [False, False, True] and len(read(tmp_path)) == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    log, reached = RunLog(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        for step in log.steps(0, 9):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(step)
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")
    assert reached == [0]


def test_a_save_is_due_now_and_then_and_at_the_end_and_never_without_a_folder(tmp_path):
    log = RunLog(tmp_path)
    found = []
    for step in log.steps(0, 8):
        log.write(step, loss=1.0)
        found.append(log.due(step + 1, every=3))
    assert found == [False, False, True, False, False, True, False, True]
    bare = RunLog()
    assert not any(bare.due(step + 1, every=1) for step in bare.steps(0, 3))


def test_a_run_in_another_thread_needs_no_signals():
    steps = []
    thread = threading.Thread(target=lambda: steps.extend(RunLog().steps(0, 3)))
    thread.start()
    thread.join()
    assert steps == [0, 1, 2]
