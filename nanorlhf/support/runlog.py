"""The log of a run: settings.json, log.jsonl with one object a step, summary.json, samples.md.

In: numbers, by name. Out: one line on the screen and one line in a file. A folder never mixes two
runs, and a run of other settings replaces what is in it only with --overwrite.

    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("score", "kl"))
    for step in log.steps(0, cfg.steps):
        log.write(step, score=0.9, kl=3.2, clip_frac=0.1)
    log.finish(steps=cfg.steps, score=0.9)
"""
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from nanorlhf.support import UserError, parallel
from nanorlhf.support.checkpoint import write_whole

# These say how to run and not what is run, so they may differ when a run is resumed or repeated.
NOT_SETTINGS = ("out", "device", "micro_batch_size", "compile", "resume", "overwrite")
BAD_BATCH = "bad_batch.jsonl"  # the rows of a step that went wrong


def open_run(folder, cfg, resume=False, overwrite=False):
    """Make the folder ready for a run with these settings. The same settings again replace the run,
    so that a command can be repeated as it is. Raises UserError where other files are in the way.
    """
    if parallel.rank() == 0:
        prepare(Path(folder), cfg, resume, overwrite)
    parallel.all_gather(None)  # the others wait for it; if it fails, they lose the first one


def prepare(folder, cfg, resume, overwrite):
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_SETTINGS}
    if resume and not (folder / "state.pt").exists():
        raise UserError(f"--resume: expected a saved state in {folder}, and state.pt is not there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = read_settings(folder) if any(folder.iterdir()) else settings
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from None
    # When resuming, more steps are allowed: the steps that were made stay as they are, and from
    # there on the learning rate is the one of the longer run. (0 means one pass over the data, so
    # there is no number to compare.)
    longer = resume and 0 < old.get("steps", 0) < settings.get("steps", 0)
    changed = "; ".join(f"{k} {old.get(k, 'unset')} there, {settings.get(k, 'unset')} here"
                        for k in {**old, **settings} if old.get(k, ...) != settings.get(k, ...)
                        and not (longer and k == "steps"))
    if changed and resume:
        raise UserError(f"--resume: {folder} was run with other settings ({changed}); give the "
                        "same ones, or start again in another --out")
    if changed and not overwrite:
        raise UserError(f"{folder} holds a run with other settings ({changed}); choose another "
                        "--out, or replace it with --overwrite")
    if not resume:  # or --resume would take these up later
        for name in "log.jsonl", "summary.json", "state.pt", BAD_BATCH:
            (folder / name).unlink(missing_ok=True)
    write_whole(folder / "settings.json", settings)


def read_settings(folder):
    try:
        return dict(json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"--out: {folder} holds files but no run (no settings.json that can be "
                        "read), so nothing in it is touched; choose another --out") from None


class RunLog:
    """Writes all metrics to log.jsonl at every step, and some to the screen now and then.

    every: steps from one line on the screen to the next (0: 20 lines in all)
    columns: the metrics that a line shows (none: all)
    decode: makes text of tokens; batch: the rows (tokens, prompt_len) of the current step. Both are
    used where a step goes wrong: its rows are then written to a file.

    Of several processes the first one writes, and the others have no folder.
    """

    def __init__(self, folder=None, every=0, columns=(), decode=None):
        self.folder = Path(folder) if folder and parallel.rank() == 0 else None
        self.every, self.columns, self.decode = every, columns, decode
        self.ends, self.bar, self.interrupted, self.stopping = set(), None, False, False
        self.batch, self.saved = (), 0
        self.began = time.perf_counter()

    def steps(self, start, stop):
        """start ... stop - 1, with a progress bar on a terminal.
        After Ctrl-C the current step ends and is saved; a second Ctrl-C stops at once."""
        if self.folder:  # a run that died has logged steps that were not saved and come again
            rows = read(self.folder) if start > 0 else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] < start]
            write_whole(self.folder / "log.jsonl", "".join(kept))
        self.ends, self.saved = {start, stop - 1}, start
        self.every = self.every or max(1, stop // 20)
        bar = tqdm(total=stop, initial=start, disable=parallel.rank() > 0 or None, leave=False)
        with bar as self.bar, delayed_interrupt(self):
            for step in range(start, stop):
                yield step
                self.bar.update()
                if self.stopping:
                    raise KeyboardInterrupt

    def due(self, done, every):
        """Is it time to save, when `done` steps are done? If so, their log is safe on the disk.
        It is after every so many steps, the last one and Ctrl-C; never without a folder."""
        self.stopping = any(parallel.all_gather(self.interrupted))  # all after the same step
        last = done - 1 == max(self.ends, default=None)
        if not self.folder or not (last or self.stopping or done % every == 0):
            return False
        self.append("", sync=True)
        self.saved = done
        return True

    def append(self, line, sync=False):
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(line)
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; {self.last_save()}") from None

    def last_save(self):
        return (f"--resume continues from the save after {self.saved} steps" if self.saved
                else "nothing had been saved")

    def write(self, step, **metrics):
        try:
            metrics = {name: rounded(name, x, f"at step {step}") for name, x in metrics.items()}
        except UserError as error:
            raise UserError(f"{error}{self.keep_bad_batch()}") from None
        if self.folder:
            self.append(json.dumps(dict(step=step, **metrics)) + "\n")
        line = "  ".join(f"{k} {cell(metrics.get(k)):>8}" for k in self.columns or metrics)
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)
        if step % max(1, self.every) == 0 or step in self.ends:
            tqdm.write(f"step {step:>5}  {line}")
            sys.stdout.flush()  # a pipe would keep it back for pages

    def keep_bad_batch(self):
        """Write the rows of a step that went wrong, and say where they and the last save are."""
        if not self.folder:
            return ""
        lines, path = [], self.folder / BAD_BATCH
        for tokens, n in self.batch:
            tokens, n = [int(token) for token in tokens], int(n)
            texts = dict(prompt=tokens[:n], response=tokens[n:]) if self.decode else {}
            texts = {name: self.decode(part) for name, part in texts.items()}
            lines.append(json.dumps(dict(tokens=tokens, prompt_len=n, **texts)) + "\n")
        write_whole(path, "".join(lines))
        return f"; the step's {len(lines)} rows are in {path}, and {self.last_save()}"

    def finish(self, **summary):
        """Write summary.json: what is given, and the seconds since this RunLog was made."""
        summary["seconds"] = time.perf_counter() - self.began
        summary = {name: rounded(name, x, "in the summary") for name, x in summary.items()}
        if self.folder:
            write_whole(self.folder / "summary.json", summary)
        return summary


@contextmanager
def delayed_interrupt(log):
    """Within it, the first Ctrl-C only sets log.interrupted."""

    def note(*_):
        if log.interrupted:
            raise KeyboardInterrupt
        log.interrupted = True
        tqdm.write("stops and saves after this step; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def rounded(name, value, where):
    """Six digits. NaN or infinity stops the run: every number after it would be the same."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise UserError(f"{name} is {value} {where}: a lower --learning-rate is the usual remedy")
    return float(f"{value:.6g}")


def cell(value):
    """Three digits in at most eight characters, so that columns stay aligned."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".replace("e-0", "e-")


def read(folder):
    """log.jsonl as a list of dicts, without a last line that a crash cut in two."""
    path = Path(folder) / "log.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1]
    except (OSError, ValueError):
        raise UserError(f"expected the log of a run, {path}, and cannot read one") from None
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            int(rows[-1]["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise UserError(f"{path}:{n}: expected JSON with a step, got {line[:40]!r}") from None
    return rows


def samples(folder, before, after, titles=("before", "after")):
    """Print the responses before and after, and keep them in samples.md.
    before, after: lists of (prompt, response), both for the same prompts."""
    titles = ("prompt", *titles)
    width = max(map(len, titles)) + 2
    page = ["# Samples\n"]
    for number, ((prompt, old), (_, new)) in enumerate(zip(before, after, strict=True), 1):
        page.append(f"## {number}\n")
        for title, text in zip(titles, (prompt, old, new), strict=True):
            text = printable(text) or "(nothing)"
            fence = "`" * max(3, 1 + max(map(len, re.findall("`*", text))))  # longer than any in it
            page.append(f"**{title}**\n\n{fence}text\n{text}\n{fence}\n")
            print(f"{title:{width}}" + text.replace("\n", "\n" + " " * width))
        print()
    write_whole(Path(folder) / "samples.md", "\n".join(page))


def printable(text):
    """The text without control characters, which an untrained model often writes."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
