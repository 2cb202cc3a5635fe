"""What the studies share: frontier, knobs and overoptimise each compare many independent runs.

A job is one run, or several that share their preparation, in a process of its own. Its rows are
written when it ends, so a study that was interrupted goes on when it is started again.
"""
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from tqdm import tqdm

from nanorlhf.support.config import ComputeConfig, run
from nanorlhf.support.runlog import open_run, write_whole


@dataclass
class StudyConfig(ComputeConfig):
    """Make many runs and compare them."""
    out: str = ""                     # the folder of the results; none: out/ and the study's name
    sft: str = "out/sft"              # where every run starts; also the reference
    rm: str = "out/rm"                # the reward model
    seeds: int = 0                    # runs of each setting, from --seed on; 0: the study's own
    prompts: int = 4000               # prompts to train on
    eval_prompts: int = 500           # held-out prompts to measure on
    steps: int = 0                    # rounds of PPO and the like; 0: the study's own number
    quick: bool = False               # one seed, at most 1,000 prompts and 20 rounds


def main(study, seeds=3, steps=40):
    """The program of a study, a function of a StudyConfig; seeds, steps: where none are given."""
    def program(cfg):
        cfg = replace(cfg, out=cfg.out or f"out/{study.__name__}", seeds=cfg.seeds or seeds,
                      steps=cfg.steps or steps)
        if cfg.quick:
            cfg = replace(cfg, seeds=1, steps=min(cfg.steps, 20), prompts=min(cfg.prompts, 1000),
                          eval_prompts=min(cfg.eval_prompts, 200))
        open_run(cfg.out, cfg, overwrite=cfg.overwrite)
        if cfg.overwrite:
            Path(cfg.out, f"{study.__name__}.csv").unlink(missing_ok=True)
        study(cfg)
        print(f"see {cfg.out}")

    run(program, StudyConfig)


def carry_out(jobs, path, columns, keys):
    """Call the jobs that have no rows in the CSV file at path yet. -> its rows, in the jobs' order.
    jobs: {values of the columns `keys`: function without arguments -> rows of other columns}"""
    done = grouped(read_csv(path) if path.exists() else [], keys)
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"))        # one for each core
    try:
        futures = [pool.submit(rows_of, job, dict(zip(keys, key)))
                   for key, job in jobs.items() if key not in done]
        for future in tqdm(as_completed(futures), total=len(futures), leave=False):
            done |= grouped(future.result(), keys)
            done = {key: done[key] for key in jobs if key in done} | done       # in order
            lines = [columns] + [[str(row[name]) for name in columns]
                                 for rows in done.values() for row in rows]
            write_whole(path, "".join(",".join(line) + "\n" for line in lines))
    finally:
        pool.shutdown(cancel_futures=True)          # or Ctrl-C would wait for all that is queued
    return read_csv(path)


def rows_of(job, names):
    """One job, on one thread and without a word. -> its rows, with its names in them"""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    return [names | row for row in job()]


def grouped(rows, names):
    """Rows that agree in the columns `names`, in the order of their first. -> {values: rows}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def read_csv(path):
    """-> list of dicts; a column of numbers becomes numbers"""
    table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8", ndmin=1)
    return [dict(zip(table.dtype.names, row.tolist())) for row in table]


def print_means(rows, names):
    """A line for each setting: mean over the seeds, and half the width of its 95 % interval."""
    lines = []
    for setting, same in grouped(rows, names).items():
        cells = ["{:.2f} ± {:.2f}".format(*mean_and_half_width([row[name] for row in same]))
                 for name in ("kl", "gold", "win_rate")]
        lines.append([*setting, len(same), *cells])
    print_table([*names, "seeds", "KL, nats", "true reward", "win rate"], lines)


def mean_and_half_width(xs):
    """Mean, and half the width of its 95 % interval by Student's t distribution."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(len(xs), 2.26)
    return mean(xs), t * stdev(xs) / len(xs) ** 0.5 if len(xs) > 1 else float("nan")


def print_table(titles, lines):
    for cells in titles, ["---"] * len(titles), *lines:
        print(f"| {' | '.join(map(str, cells))} |")
