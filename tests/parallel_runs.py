"""Several processes on this machine, as torchrun starts them, at a size that takes a second.

    python tests/parallel_runs.py       says when it is ready, reads lines of JSON (how many, which
                                        job, a folder, its settings), answers with exit statuses

One process imports PyTorch and forks for every run. What a job returns lies in the folder as
0.pt, 1.pt, ..., what its process said in 0.out, 0.err, ...
"""

import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanorlhf import dpo, ilql, ppo, reward, sft
from nanorlhf.generate import generate_rows
from nanorlhf.model import GPT, QGPT, GPTConfig, ScalarGPT
from nanorlhf.support import UserError, config, parallel, runlog

SIZE = dict(vocab_size=12, n_positions=24, n_layer=1, n_head=2, n_embd=16)
END, PAD = 10, 11
ROWS = [([i % 9, *[(i + j) % 9 for j in range(i % 7 + 1)], END], 1) for i in range(40)]
GROUPS = [
    (ROWS[i : i + 3], [(0, 1), (2, 1), (0, 2)][: 1 + i % 3])  # of one to three comparisons
    for i in range(37)
]
PROMPTS = [tokens[: 1 + i % 3] for i, (tokens, _) in enumerate(ROWS)]
COMMON = dict(device="cpu", dtype="float32", save_every=3)
PATIENCE = 60  # seconds, after which a run counts as hanging


class ExactLog(runlog.RunLog):
    """A log that also keeps every digit. At `at` = (rank, step), Ctrl-C comes to that process."""

    def __init__(self, folder, at=()):
        super().__init__(folder)
        self.rows, self.at = [], tuple(at)

    def write(self, step, **metrics):
        super().write(step, **metrics)
        self.rows.append({name: float(x) for name, x in metrics.items() if name != "tokens_per_s"})
        if self.at == (parallel.rank(), step):
            os.kill(os.getpid(), signal.SIGINT)


def models(*kinds, dropout=0.0):
    """In float64, so that sums in another order agree to a dozen digits."""
    torch.manual_seed(0)
    return [kind(GPTConfig(**SIZE, dropout=dropout)).double() for kind in kinds]


def result(log, *trained):
    weights = {f"{i} {k}": w for i, m in enumerate(trained) for k, w in m.state_dict().items()}
    return dict(rows=log.rows, weights=weights, random=torch.rand(3))


# --- jobs: what each process does -----------------------------------------------------------------


def run_sft(folder, dropout=0.0, at=(), **settings):
    cfg = sft.SFTConfig(out=folder, **dict(COMMON, steps=6, batch_size=6) | settings)
    config.setup(cfg)
    [model], log = models(GPT, dropout=dropout), ExactLog(folder, at)
    sft.train(model, ROWS, ROWS[:4], PAD, cfg, log)
    return result(log, model)


def run_rm(folder, dropout=0.0, at=(), **settings):
    cfg = reward.RMConfig(out=folder, **dict(COMMON, steps=6, batch_size=6) | settings)
    config.setup(cfg)
    [model], log = models(ScalarGPT, dropout=dropout), ExactLog(folder, at)
    reward.train(model, GROUPS, PAD, cfg, log)
    return result(log, model)


def run_dpo(folder, at=(), **settings):
    cfg = dpo.DPOConfig(out=folder, **dict(COMMON, steps=6, batch_size=6) | settings)
    config.setup(cfg)
    [policy], log = models(GPT), ExactLog(folder, at)
    dpo.train(policy, copy.deepcopy(policy), GROUPS, PAD, cfg, log)
    return result(log, policy)


def run_ilql(folder, at=(), **settings):
    cfg = ilql.ILQLConfig(out=folder, **dict(COMMON, steps=6, batch_size=6) | settings)
    config.setup(cfg)
    torch.set_default_dtype(torch.float64)  # for the scores, which become a tensor in train
    [model], log = models(QGPT), ExactLog(folder, at)
    ilql.train(model, ROWS, [len(tokens) % 3 - 1.0 for tokens, _ in ROWS], PAD, cfg, log)
    return result(log, model)


def ppo_config(folder, settings):
    changed = dict(batch_size=6, max_new_tokens=8, steps=4) | settings
    cfg = ppo.PPOConfig(out=folder, **COMMON, **changed)
    config.setup(cfg)
    return cfg


def even(tokens, prompt_len, mask):
    """The score: how many tokens are even?"""
    return ((tokens % 2 == 0).sum(1) / 8).double()


def three_models(cfg):
    """The reference has moved away from the policy: there is KL to pay for."""
    policy, critic = models(GPT, ScalarGPT)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.transformer.wte.weight += 0.1 * torch.randn(12, 16)
    return policy.eval(), reference.eval(), critic.eval() if cfg.advantage == "gae" else None


def run_ppo(folder, at=(), **settings):
    cfg = ppo_config(folder, settings)
    policy, reference, critic = three_models(cfg)
    torch.manual_seed(5)
    log = ExactLog(folder, at)
    ppo.train(policy, reference, critic, even, PROMPTS, END, PAD, cfg, log)
    return result(log, *filter(None, (policy, critic)))


def collect(folder, prompts, **settings):
    cfg = ppo_config(folder, settings)
    rollout = ppo.collect(*three_models(cfg), even, prompts, cfg, 0.1, END, PAD)
    return dict(vars(rollout), random=torch.rand(3))


def update(folder, **settings):
    """One rollout, made by each process for itself from the same seed, and then shared work."""
    cfg = ppo.PPOConfig(out=folder, **COMMON, max_new_tokens=8, batch_size=7, learning_rate=1e-2,
                        critic_learning_rate=1e-2, epochs=2, **settings)  # fmt: skip
    policy, reference, critic = three_models(cfg)
    rollout = ppo.collect(policy, reference, critic, even, PROMPTS[:7], cfg, 0.1, END, PAD)
    config.setup(cfg)
    metrics = ppo.update(policy, critic, ppo.make_optimizers(policy, critic, cfg), rollout, cfg)
    log = ExactLog(None)
    log.rows = [metrics]
    return result(log, policy, critic)


def sample(folder, batch_size=0):
    config.setup(reward.RMConfig(**COMMON))
    prompts = [[1, i % 3] for i in range(7)]
    [model] = models(GPT)
    rows = generate_rows(model.eval(), prompts, 12, END, PAD, G=2, batch_size=batch_size)
    return dict(rows=rows, random=torch.rand(3))


def random_numbers(folder, inside=True):
    """Random numbers: everyone's, of each part of the work (if `inside`), and everyone's again."""
    config.setup(sft.SFTConfig(**COMMON))
    before = torch.rand(3)
    parts = parallel.micro_batches(list(range(8)), 2)
    drawn = [torch.rand(3) if inside else torch.zeros(3) for _ in parts]
    return dict(before=before, drawn=drawn, after=torch.rand(3))


def open_run(folder, fails="", **settings):
    """A whole command, which ends in a mistake of everyone's, or of the last process."""

    def main(cfg):
        config.setup(cfg)
        print("started")
        runlog.open_run(Path(folder) / "run", cfg)
        (Path(folder) / f"{parallel.rank()} went on").touch()
        if fails and parallel.rank() == parallel.world_size() - 1:
            raise dict(user=UserError("this process has no luck"), crash=ZeroDivisionError)[
                fails
            ]
        parallel.all_gather(None)
        parallel.finish()
        print(f"finished, one of {parallel.world_size()}")

    sys.argv = ["train_sft.py", "--device", "cpu"]
    sys.argv += [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    config.run(main, sft.SFTConfig)


JOBS = [run_sft, run_rm, run_dpo, run_ilql, run_ppo, collect, update, sample, random_numbers]
JOBS += [open_run]


# --- processes ------------------------------------------------------------------------------------


def child(rank, n, address, job, folder, settings):
    """A process of its own, from here to its end. -> never"""
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    port = os.read(address, 5).decode()
    if n > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it is there, and not to be made
    status = 1
    try:
        result = {job.__name__: job for job in JOBS}[job](folder, **settings)
        torch.save(result, f"{folder}/{rank}.pt")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(n, job, folder, settings):
    """-> exit statuses; None where a process had to be killed, for it did not end by itself"""
    pids, pipes = [], [os.pipe() for _ in range(n)]
    for rank in range(n):
        pids.append(os.fork())
        if not pids[-1]:
            child(rank, n, pipes[rank][0], job, folder, settings)
    # Where the processes meet is made here, as torchrun does, so that nobody else can take the
    # port; and not before they are there, for it is a thread, and threads do not survive a fork.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in pipes:
        os.write(pipe[1], b"%d" % store.port)
        os.close(pipe[0])
        os.close(pipe[1])
    statuses, deadline = {}, time.monotonic() + PATIENCE
    while len(statuses) < n:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        time.sleep(0.005)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports half of PyTorch, once instead of in every run
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
