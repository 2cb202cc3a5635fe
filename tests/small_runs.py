"""Each stage at a size that takes half a second, in processes of their own, to be killed.

    python tests/small_runs.py          says when it is ready, reads lines "stage folder", answers
                                        with a process id, and at its end with its exit status

One process imports PyTorch and forks for every run: a kill then costs the run and nothing more.
A run continues from what its folder holds.
"""

import copy
import os
import sys
from pathlib import Path

import torch

from nanorlhf import dpo, ilql, ppo, reward, sft
from nanorlhf.model import GPT, QGPT, GPTConfig, ScalarGPT
from nanorlhf.support.runlog import RunLog

TINY = GPTConfig(vocab_size=12, n_positions=20, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
STILL = GPTConfig(vocab_size=12, n_positions=20, n_layer=1, n_head=2, n_embd=16)
END, PAD = 10, 11
ROWS = [([i % 9, *[j % 9 for j in range(i % 7 + 1)], END], 1) for i in range(40)]
GROUPS = [([a, b], [(0, 1)]) for a, b in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)]
COMMON = dict(device="cpu", dtype="float32", save_every=3)


def run_sft(folder, resume):
    cfg = sft.SFTConfig(out=folder, resume=resume, steps=40, batch_size=6, **COMMON)
    sft.train(GPT(TINY), ROWS, ROWS[:4], PAD, cfg, RunLog(folder))


def run_rm(folder, resume):
    cfg = reward.RMConfig(out=folder, resume=resume, steps=40, batch_size=6, **COMMON)
    reward.train(ScalarGPT(TINY), GROUPS, PAD, cfg, RunLog(folder))


def run_ppo(folder, resume):
    cfg = ppo.PPOConfig(
        out=folder,
        resume=resume,
        steps=14,
        batch_size=12,
        max_new_tokens=8,
        kl_target=1.0,
        **COMMON,
    )
    policy, critic = GPT(STILL), ScalarGPT(STILL)
    prompts = [row[0][:2] for row in ROWS]
    score = lambda tokens, prompt_len, mask: mask.sum(1).float()  # noqa: E731
    reference = copy.deepcopy(policy)
    ppo.train(policy, reference, critic, score, prompts, END, PAD, cfg, RunLog(folder))


def run_dpo(folder, resume):
    cfg = dpo.DPOConfig(out=folder, resume=resume, steps=40, batch_size=6, **COMMON)
    policy = GPT(STILL)
    dpo.train(policy, copy.deepcopy(policy), GROUPS, PAD, cfg, RunLog(folder))


def run_ilql(folder, resume):
    cfg = ilql.ILQLConfig(out=folder, resume=resume, steps=40, batch_size=6, **COMMON)
    ilql.train(QGPT(STILL), ROWS, [float(len(t) % 3) for t, _ in ROWS], PAD, cfg, RunLog(folder))


STAGES = dict(sft=run_sft, rm=run_rm, ppo=run_ppo, dpo=run_dpo, ilql=run_ilql)


def run(stage, folder):
    """-> exit status. All that is random starts from 0, or from where the folder says."""
    torch.manual_seed(0)
    try:
        STAGES[stage](folder, resume=(Path(folder) / "state.pt").exists())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports half of PyTorch, once instead of in every run
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            sys.stdout = open(os.devnull, "w")
            os._exit(run(*line.split()))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
