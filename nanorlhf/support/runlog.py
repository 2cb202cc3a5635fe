"""The log of a run: settings.json, log.jsonl with one object a step, summary.json, samples.md."""
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from nanorlhf.support import UserError, parallel
from nanorlhf.support.checkpoint import read_json, write_whole

# These say how to run and not what is run, so they may differ when a run is resumed or repeated.
NOT_SETTINGS = ("out", "device", "micro_batch_size", "compile", "resume", "overwrite")


def open_run(folder, cfg, resume=False, overwrite=False):
    """Make the folder ready for a run, or raise UserError where something else is in it."""
    if parallel.rank() > 0:
        return parallel.all_gather(None)  # waits for the first process, or loses it
    folder = Path(folder)
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_SETTINGS}
    if resume and not (folder / "state.pt").exists():
        raise UserError(f"--resume: expected a saved state in {folder}, and state.pt is not there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from None
    old = settings if new else read_json(folder / "settings.json", f"--out: {folder} is no run")
    if resume and 0 < old.get("steps", 0) < settings.get("steps", 0):  # 0: one pass over the data
        old["steps"] = settings["steps"]  # a longer run; the steps that were made stay as they are
    changed = "; ".join(f"{k} {old.get(k, 'unset')} there, {settings.get(k, 'unset')} here"
                        for k in {**old, **settings} if old.get(k, ...) != settings.get(k, ...))
    if changed and (resume or not overwrite):
        raise UserError(f"{folder} holds a run with other settings ({changed}); give the same, or "
                        "choose another --out, or replace it with --overwrite, without --resume")
    if not resume:  # or --resume would take these up later
        for name in "log.jsonl", "summary.json", "state.pt", "bad_batch.jsonl":
            (folder / name).unlink(missing_ok=True)
    write_whole(folder / "settings.json", settings)
    parallel.all_gather(None)


class RunLog:
    """Writes all metrics to log.jsonl at each step, and some (columns; none: all) to the screen at
    every so many steps (0: 20 lines). The rows of a step that goes wrong are kept."""

    def __init__(self, folder=None, every=0, columns=(), decode=None):
        self.folder = Path(folder) if folder and parallel.rank() == 0 else None
        self.every, self.columns, self.decode = every, columns, decode
        self.ends, self.interrupted, self.stopping = (), False, False
        self.batch, self.saved, self.began = (), 0, time.perf_counter()

    def steps(self, start, stop):
        """start ... stop - 1. After Ctrl-C the step ends and is saved; a second stops at once."""
        if self.folder:  # a run that died has logged steps that were not saved and come again
            rows = read(self.folder) if start else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] < start]
            write_whole(self.folder / "log.jsonl", "".join(kept))
        self.ends, self.saved = (start, stop - 1), start
        self.every = self.every or max(1, stop // 20)
        bar = tqdm(total=stop, initial=start, disable=parallel.rank() > 0 or None, leave=False)
        in_main = threading.current_thread() is threading.main_thread()  # others get no signals
        before = signal.signal(signal.SIGINT, self.interrupt) if in_main else None
        try:
            for step in range(start, stop):
                yield step
                bar.update()
                if self.stopping:
                    raise KeyboardInterrupt
        finally:
            bar.close()
            if in_main:
                signal.signal(signal.SIGINT, before)

    def interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        tqdm.write("stops and saves after this step; Ctrl-C again stops at once")

    def due(self, done, every):
        """Save after `done` steps: enough, the last, or Ctrl-C? Then their log is on the disk."""
        self.stopping = any(parallel.all_gather(self.interrupted))  # all after the same step
        wanted = self.stopping or done % every == 0 or done == self.ends[1] + 1
        if self.folder and wanted:
            self.append("", sync=True)
            self.saved = done
        return bool(self.folder and wanted)

    def append(self, line, sync=False):
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(line)
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; the last save stays") from None

    def write(self, step, **metrics):
        try:
            metrics = {name: rounded(name, x, f"at step {step}") for name, x in metrics.items()}
        except UserError as error:
            raise UserError(f"{error}{self.keep_bad_batch() if self.folder else ''}") from None
        if self.folder:
            self.append(json.dumps(dict(step=step, **metrics)) + "\n")
        if step % max(1, self.every) == 0 or step in self.ends:
            cells = [f"{k} {cell(metrics.get(k)):>8}" for k in self.columns or metrics]
            tqdm.write("  ".join([f"step {step:>5}", *cells]))
            sys.stdout.flush()  # a pipe would keep it back for pages

    def keep_bad_batch(self):
        """Write the rows of a step that went wrong, and say where they and the last save are."""
        lines, path = [], self.folder / "bad_batch.jsonl"
        for tokens, n in self.batch:
            row = dict(tokens=list(map(int, tokens)), prompt_len=int(n))
            if self.decode:
                row["prompt"] = self.decode(row["tokens"][:n])
                row["response"] = self.decode(row["tokens"][n:])
            lines.append(json.dumps(row) + "\n")
        write_whole(path, "".join(lines))
        save = (f"--resume continues from the save after {self.saved} steps" if self.saved
                else "nothing had been saved")
        return f"; the step's {len(lines)} rows are in {path}, and {save}"

    def finish(self, **summary):
        """Write summary.json: what is given, and the seconds since this RunLog was made."""
        summary["seconds"] = time.perf_counter() - self.began
        summary = {name: rounded(name, x, "in the summary") for name, x in summary.items()}
        if self.folder:
            write_whole(self.folder / "summary.json", summary)
        return summary


def rounded(name, value, where):
    """Six digits. NaN or infinity stops the run: every number after it would be the same."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value} {where}: a lower --learning-rate is the usual remedy")
    return float(f"{value:.6g}") if isinstance(value, float) else value


def cell(value):
    """Three digits in at most eight characters, so that columns stay aligned."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".replace("e-0", "e-")


def read(folder):
    """log.jsonl as a list of dicts, without a last line that a crash cut in two."""
    path, rows = Path(folder) / "log.jsonl", []
    try:
        for line in path.read_text().split("\n")[:-1]:
            row = json.loads(line)
            int(row["step"])
            rows.append(row)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}:{len(rows) + 1}: expected JSON of a step: {error!r:.80}") from None
    return rows


def samples(folder, before, after, titles=("before", "after")):
    """Print responses before and after, lists of (prompt, response); keep them in samples.md."""
    titles, page = ("prompt", *titles), ["# Samples\n"]
    width = max(map(len, titles)) + 2
    for number, ((prompt, old), (_, new)) in enumerate(zip(before, after, strict=True), 1):
        page.append(f"## {number}\n")
        for title, text in zip(titles, (prompt, old, new)):
            lines = (printable(text) or "(nothing)").split("\n")
            page += [f"**{title}**\n", *(f"    {line}" for line in lines), ""]  # a block, indented
            print(f"{title:{width}}" + ("\n" + " " * width).join(lines))
        print()
    write_whole(Path(folder) / "samples.md", "\n".join(page))


def printable(text):
    """The text without characters that could do something to a terminal or to the text beside."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
