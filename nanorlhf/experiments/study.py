"""Many runs on one task where the truth is known: which method, how far, with which setting?

    python -m nanorlhf.evaluate frontier           every method over its dial: truth against KL
    python -m nanorlhf.evaluate frontier --quick   one seed, short runs
    python -m nanorlhf.evaluate knobs              PPO's settings, each turned down and up

In: an SFT model and a reward model of the built-in world. Out: a CSV file with a row a result, and
a figure or a table of it. Runs are independent: each has a process with one thread, and there are
as many at a time as cores. A run's rows are written when it ends, so a study that was interrupted
goes on when its command is given again.
"""
import csv
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
from tqdm import tqdm

from nanorlhf import dpo, environment, ilql, ppo, reward, tokenizer
from nanorlhf.evaluate import EvaluateConfig, best_of_n, compare, score_batches
from nanorlhf.generate import respond, sample_rows
from nanorlhf.model import GPT, QGPT
from nanorlhf.support import plotting
from nanorlhf.support.config import run, setup
from nanorlhf.support.runlog import RunLog, open_run, write_whole


@dataclass
class StudyConfig:
    """Make many runs, and one picture of them."""
    out: str = ""                     # the study's folder; none: out/ and the study's name
    sft: str = "out/sft"              # where every run starts
    rm: str = "out/rm"                # what judges them while they learn
    seeds: int = 0                    # of each run; 0: five for the frontier, three elsewhere
    prompts: int = 3000               # to learn from
    eval_prompts: int = 500           # held-out prompts to measure on
    steps: int = 0                    # rounds of a policy gradient; 0: 40, and 60 to over-optimise
    quick: bool = False               # one seed, 1,000 prompts, 20 rounds, half of the dials
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    overwrite: bool = False           # begin anew


# --- the runs: each yields (dial, {"kl", "gold", "win_rate"}) ------------------------------------

def policy_gradient(cfg, seed, dials, advantage, responses=1, **settings):
    """PPO's loop with any of the advantages. dial: kl_coef"""
    for dial in dials:
        own = dict(steps=cfg.steps or 40, kl_coef=dial,
                   learning_rate=RATES.get(dial, ppo.PPOConfig.learning_rate))
        stage = ppo.PPOConfig(advantage=advantage, responses=responses, seed=seed,
                              device=cfg.device, dtype=cfg.dtype, **own | settings)
        device = setup(stage)
        tok, policy, reference = start(cfg, device)
        critic = reward.load(cfg.rm).to(device) if advantage == "gae" else None
        score = reward.by_model(reward.load(cfg.rm).to(device))
        prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
        ppo.train(policy, reference, critic, score, prompts, tok.eos, tok.pad, stage, RunLog())
        yield dial, measure(policy, reference, tok, cfg, seed)


def run_dpo(cfg, seed, dials):
    """dial: beta. The same comparisons for all."""
    stage = dpo.DPOConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype)
    device = setup(stage)
    tok, _, reference = start(cfg, device)
    groups, _ = dpo.compare_samples(reference, tok, cfg.prompts, stage.responses, stage, False)
    for dial in dials:
        policy = start(cfg, device)[1]
        dpo.train(policy, reference, groups, tok.pad, replace(stage, beta=dial), RunLog())
        yield dial, measure(policy, reference, tok, cfg, seed)


def run_ilql(cfg, seed, dials):
    """dial: beta, which is turned when the learning is over."""
    stage = ilql.ILQLConfig(seed=seed, prompts=cfg.prompts, device=cfg.device, dtype=cfg.dtype)
    device = setup(stage)
    tok, _, reference = start(cfg, device)
    prompts = [tok.encode(p) for p in environment.prompts(cfg.prompts, seed)]
    rows = sample_rows(reference, tok, [p for p in prompts for _ in range(stage.responses)], stage)
    score = reward.by_model(reward.load(cfg.rm).to(device))
    scores = ilql.score_log(score, rows, tok.pad, device, cfg.dtype)
    policy = QGPT(reference.config).to(device)
    policy.transformer.load_state_dict(reference.transformer.state_dict())
    ilql.train(policy, rows, scores, tok.pad, stage, RunLog())
    for dial in dials:
        policy.beta.fill_(dial)
        yield dial, measure(policy, reference, tok, cfg, seed)


def run_best_of_n(cfg, seed, dials, pool=32):
    """dial: n. Nothing is trained: of n samples the reward model takes its favourite."""
    device = setup(EvaluateConfig(seed=seed, device=cfg.device))
    tok, _, sft = start(cfg, device)
    texts = environment.prompts(cfg.eval_prompts, seed, held_out=True)
    prompts = [tok.encode(p) for p in texts for _ in range(pool)]
    batches, responses = respond(sft, tok, prompts, 80, dtype=cfg.dtype)
    judge = reward.by_model(reward.load(cfg.rm).to(device))
    scores = torch.tensor(score_batches(judge, batches, cfg.dtype)).view(-1, pool)
    gold = torch.tensor([environment.gold(texts[i // pool], response)
                         for i, response in enumerate(responses)]).view(-1, pool)
    beats = ((gold[:, :, None] > gold[:, None, :]).double()
             + 0.5 * (gold[:, :, None] == gold[:, None, :])).mean(2)
    for n in dials:
        chance = best_of_n(scores, n)                                                  # (P, pool)
        sums = dict(kl=torch.xlogy(chance, chance * pool), proxy=chance * scores,
                    gold=chance * gold, win_rate=chance * beats)
        yield n, {name: x.sum(1).mean().item() for name, x in sums.items()}


def start(cfg, device):
    """The SFT model's tokenizer, and the model twice: one to learn, one to stay."""
    return tokenizer.load(cfg.sft), *(GPT.load(cfg.sft).to(device) for _ in range(2))


def measure(policy, reference, tok, cfg, seed):
    """On held-out prompts: KL in nats a response, mean true reward, win rate over the reference."""
    prompts = environment.prompts(cfg.eval_prompts, seed, held_out=True)
    found = compare(policy, reference, tok, prompts, reward.true_reward(tok),
                    EvaluateConfig(dtype=cfg.dtype))
    return dict(kl=found["kl_policy"], gold=found["score_policy"], win_rate=found["win_rate"])


PRICES = (1.0, 0.3, 0.05)
# A dear nat wants small steps: at 6e-4 the gradient's noise alone moves the policy a nat.
RATES = {1.0: 2e-4, 0.3: 2e-4, 0.1: 3e-4}
FRONTIER = dict(
    sft=(partial(run_best_of_n, pool=1), (1,)),
    best_of_n=(run_best_of_n, (2, 4, 8, 16)),
    ppo=(partial(policy_gradient, advantage="gae"), (1.0, 0.3, 0.1, 0.05)),
    reinforce=(partial(policy_gradient, advantage="reinforce"), PRICES),
    rloo=(partial(policy_gradient, advantage="rloo", responses=4), PRICES),
    grpo=(partial(policy_gradient, advantage="grpo", responses=4), PRICES),
    dpo=(run_dpo, (1.0, 0.3, 0.1)),
    ilql=(run_ilql, (1, 2, 4, 8, 16, 32)))

# PPO's settings that a reader may want to turn; lam by its distance from 1.
KNOBS = dict(learning_rate=(3e-4, 12e-4), critic_learning_rate=(5e-4, 2e-3), kl_coef=(0.05, 0.2),
             clip=(0.1, 0.4), lam=(0.975, 0.9), epochs=(1, 4), minibatches=(1, 4),
             batch_size=(32, 128), steps=(20, 80))

# --- many at a time ------------------------------------------------------------------------------

def carry_out(jobs, path, columns, keys):
    """Run each job in a process of its own, as many at a time as there are cores. -> rows, dicts

    jobs: {values of the columns `keys`: function without arguments -> rows}. A job that has rows in
    the CSV file at path is not run again; the others' are added to it as they end.
    """
    rows = read_csv(path) if path.exists() else []
    order = {key: place for place, key in enumerate(jobs)}

    def of_job(row):
        return tuple(row[name] for name in keys)

    made = {of_job(row) for row in rows}
    jobs = {key: job for key, job in jobs.items() if key not in made}
    workers = max(1, min(os.cpu_count(), len(jobs)))
    with ProcessPoolExecutor(workers, get_context("spawn"), alone) as pool:
        try:
            futures = [pool.submit(job) for job in jobs.values()]
            for future in tqdm(as_completed(futures), total=len(jobs), desc="runs", leave=False):
                rows += future.result()
                rows.sort(key=lambda row: order.get(of_job(row), len(order)))
                write_csv(path, columns, rows)
        except BaseException:
            pool.shutdown(cancel_futures=True)      # or Ctrl-C would wait for all that is queued
            raise
    return read_csv(path)


def alone():
    """A worker process has one thread, as there is one worker for each core, and says nothing."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"


def write_csv(path, columns, rows):
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(f"{x:.6g}" if isinstance(x, float) else str(x)
                              for x in (row[name] for name in columns)))
    write_whole(path, "\n".join(lines) + "\n")


def read_csv(path):
    """-> list of dicts; what looks like a number is one"""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="") as file:
        return [{name: number(x) for name, x in row.items()} for row in csv.DictReader(file)]


def labelled(names, run_one, *args):
    """Rows of one job: what it yields, under the names that tell it from other jobs. -> dicts"""
    return [dict(names, dial=dial, **found) for dial, found in run_one(*args)]


def mean_and_half(xs):
    """Mean and half the width of its 95 % interval over seeds, by Student's t. -> float, float"""
    if len(xs) == 1:
        return xs[0], math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(len(xs), 2.26)
    return mean(xs), t * stdev(xs) / len(xs) ** 0.5


# --- the studies ---------------------------------------------------------------------------------

def frontier(cfg):
    """Every method, every seed, every place of its dial: what does a nat buy?"""
    jobs = {}
    for seed in range(1, (cfg.seeds or 5) + 1):
        for method, (run_one, dials) in FRONTIER.items():
            jobs[method, seed] = partial(labelled, dict(method=method, seed=seed), run_one, cfg,
                                         seed, dials[::2] if cfg.quick else dials)
    rows = carry_out(jobs, Path(cfg.out) / "frontier.csv",
                     ("method", "dial", "seed", "kl", "gold", "win_rate"), ("method", "seed"))
    tell(rows, ("method", "dial"))
    panels = [(title, {method: [[(row["kl"], row[name]) for row in same]
                                for (whose, _), same in grouped(rows, ("method", "dial")).items()
                                if whose == method] for method in FRONTIER})
              for title, name in (("True reward", "gold"), ("Win rate over SFT", "win_rate"))]
    (Path(cfg.out) / "frontier.png").write_bytes(plotting.clouds(panels).png())


def knobs(cfg):
    """PPO as it is, and with one setting at a time turned down and up: which of them matter?"""
    settings = [("none", 0.0)] + [(knob, x) for knob, both in KNOBS.items() for x in both]
    jobs = {}
    for seed in range(1, (cfg.seeds or 3) + 1):
        for knob, x in settings:
            turned = dict(learning_rate=ppo.PPOConfig.learning_rate)
            if knob != "none":
                turned[knob] = x
            run_one = partial(policy_gradient, advantage="gae", **turned)
            jobs[knob, x, seed] = partial(labelled, dict(knob=knob, value=x, seed=seed), run_one,
                                          cfg, seed, (ppo.PPOConfig.kl_coef,))
    rows = carry_out(jobs, Path(cfg.out) / "knobs.csv",
                     ("knob", "value", "seed", "kl", "gold", "win_rate"), ("knob", "value", "seed"))
    tell(rows, ("knob", "value"))


def grouped(rows, names):
    """Rows that agree in the columns `names`, in the order of their first. -> {values: rows}"""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def tell(rows, names):
    """A line for each setting: mean over the seeds, and half the width of its 95 % interval."""
    print(f"| {' | '.join(names)} | seeds | KL, nats | true reward | win rate |")
    print("|" + "---|" * (len(names) + 4))
    for key, same in grouped(rows, names).items():
        cells = ["{:.2f} ± {:.2f}".format(*mean_and_half([row[name] for row in same]))
                 .removesuffix(" ± nan") for name in ("kl", "gold", "win_rate")]
        print("| " + " | ".join([*(f"{x:g}" if isinstance(x, float) else x for x in key),
                                 str(len(same)), *cells]) + " |")


def main(study):
    """What `python -m nanorlhf.evaluate STUDY` calls. study: a function of a StudyConfig"""
    run(partial(carry_on, study), StudyConfig)


def carry_on(study, cfg):
    began, name = time.perf_counter(), study.__name__
    cfg = replace(cfg, out=cfg.out or f"out/{name}")
    if cfg.quick:
        cfg = replace(cfg, seeds=1, prompts=1000, eval_prompts=200, steps=20)
    open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    if cfg.overwrite:
        (Path(cfg.out) / f"{name}.csv").unlink(missing_ok=True)
    study(cfg)
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes; see {cfg.out}")
