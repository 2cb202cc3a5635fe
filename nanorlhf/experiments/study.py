"""What the studies share: frontier, knobs and overoptimise each compare many independent runs.

In: an SFT model and a reward model of the built-in world. Out: a CSV file with one row a result,
and a table or a figure of it. Each job (a run, or several that share their preparation) has a
process with one thread, and there are as many at a time as cores. The rows of a job are written
when it ends, so a study that was interrupted goes on when its command is given again.
"""
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from tqdm import tqdm

from nanorlhf import environment, evaluate, reward
from nanorlhf.support.config import ComputeConfig, run
from nanorlhf.support.runlog import open_run, write_whole


@dataclass
class StudyConfig(ComputeConfig):
    """Make many runs and compare them."""
    out: str = "out/study"            # the folder of the results
    sft: str = "out/sft"              # where every run starts; also the reference
    rm: str = "out/rm"                # the reward model
    seeds: int = 3                    # runs of each setting; the first has the seed --seed
    prompts: int = 3000               # prompts to train on
    eval_prompts: int = 500           # held-out prompts to measure on
    steps: int = 40                   # rounds of PPO and of the other policy gradients
    quick: bool = False               # one seed, at most 1,000 prompts and 20 rounds

    def every_seed(self):
        return range(self.seed, self.seed + self.seeds)


def run_study(study, cls):
    """The program of a study, a function of its settings: they are an instance of cls."""
    def main(cfg):
        began = time.perf_counter()
        if cfg.quick:
            cfg = replace(cfg, seeds=1, prompts=min(cfg.prompts, 1000), steps=min(cfg.steps, 20),
                          eval_prompts=min(cfg.eval_prompts, 200))
        open_run(cfg.out, cfg, overwrite=cfg.overwrite)
        if cfg.overwrite:
            (Path(cfg.out) / f"{study.__name__}.csv").unlink(missing_ok=True)
        study(cfg)
        print(f"{(time.perf_counter() - began) / 60:.0f} minutes; see {cfg.out}")
    run(main, cls)


def evaluate_policy(policy, reference, tok, cfg, seed):
    """On held-out prompts: KL in nats a response, mean true reward, win rate over the reference."""
    prompts = environment.prompts(cfg.eval_prompts, seed, held_out=True)
    result = evaluate.compare(policy, reference, tok, prompts, reward.true_reward(tok),
                              evaluate.EvaluateConfig(seed=seed, dtype=cfg.dtype))
    return dict(kl=result["kl_policy"], gold=result["score_policy"], win_rate=result["win_rate"])


# --- many runs at a time -------------------------------------------------------------------------

def carry_out(jobs, path, columns, keys):
    """Call each job in a process of its own, as many at a time as there are cores. -> rows, dicts

    jobs: {values of the columns `keys`: function without arguments -> rows, with the rest of the
    columns}. A job that has rows in the CSV file at path is not called again. The rows of the
    others are added as they end.
    """
    done = grouped(read_csv(path) if path.exists() else [], keys)
    missing = {key: job for key, job in jobs.items() if key not in done}
    workers = max(1, min(os.cpu_count(), len(missing)))
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker) as pool:
        try:
            futures = [pool.submit(rows_of, job, dict(zip(keys, key)))
                       for key, job in missing.items()]
            for future in tqdm(as_completed(futures), total=len(missing), leave=False):
                done |= grouped(future.result(), keys)
                done = {key: done[key] for key in jobs if key in done} | done   # in order
                write_csv(path, columns, [row for rows in done.values() for row in rows])
        except BaseException:
            pool.shutdown(cancel_futures=True)      # or Ctrl-C would wait for all that is queued
            raise
    return read_csv(path)


def rows_of(job, names):
    return [names | row for row in job()]


def prepare_worker():
    """One thread for each process, as there is a process for each core; and nothing is printed."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"


def grouped(rows, names):
    """Rows that agree in the columns `names`, in the order of their first. -> {values: rows}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def write_csv(path, columns, rows):
    lines = [columns] + [[f"{x:.6g}" if isinstance(x, float) else str(x)
                          for x in (row[name] for name in columns)] for row in rows]
    write_whole(path, "".join(",".join(line) + "\n" for line in lines))


def read_csv(path):
    """-> list of dicts; a column of numbers becomes numbers"""
    table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8", ndmin=1)
    return [dict(zip(table.dtype.names, row.tolist())) for row in table]


# --- tables --------------------------------------------------------------------------------------

def mean_and_half_width(xs):
    """Mean, and half the width of its 95 % interval by Student's t distribution."""
    if len(xs) == 1:
        return xs[0], math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(len(xs), 2.26)
    return mean(xs), t * stdev(xs) / len(xs) ** 0.5


def print_means(rows, names):
    """A line for each setting: mean over the seeds, and half the width of its 95 % interval."""
    lines = []
    for setting, same in grouped(rows, names).items():
        cells = ["{:.2f} ± {:.2f}".format(*mean_and_half_width([row[name] for row in same]))
                 .removesuffix(" ± nan") for name in ("kl", "gold", "win_rate")]
        setting = [f"{x:g}" if isinstance(x, float) else x for x in setting]
        lines.append([*setting, len(same), *cells])
    print_table([*names, "seeds", "KL, nats", "true reward", "win rate"], lines)


def print_table(titles, lines):
    for cells in titles, ["---"] * len(titles), *lines:
        print(f"| {' | '.join(map(str, cells))} |")
