"""Train one stage for two steps in a process of its own, and say by how much its memory rose.

    python tests/small_memory.py sft V C layers heads prompt response rows micro dtype

Prints the estimate and what was measured, in bytes.
"""

import contextlib
import io
import sys

import torch

from nanorlhf import dpo, ilql, ppo, reward, sft
from nanorlhf.model import GPT, QGPT, GPTConfig, ScalarGPT
from nanorlhf.support import memory
from nanorlhf.support.runlog import RunLog


def peak():
    """Of the address space: what is resident, a busy system may take away in the middle."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmPeak"))


def train(stage, V, C, n_layer, n_head, P, R, B, micro, dtype):
    """-> the estimate"""
    shape = GPTConfig(V, P + R, n_layer, n_head, C)
    common = dict(device="cpu", dtype=dtype, steps=2, micro_batch_size=micro)
    rows = [(torch.randint(V, (P + R,)).tolist(), P) for _ in range(B)]
    groups = [(pair, [(0, 1)]) for pair in zip(rows[::2], rows[1::2], strict=True)]
    policy, frozen = (kind(shape).eval() for kind in (GPT, GPT))
    log = RunLog()
    if stage == "sft":
        del frozen
        cfg = sft.SFTConfig(batch_size=B, **common)
        sft.train(policy, rows, rows, 0, cfg, log)
        return memory.sft(policy, rows, cfg)
    if stage == "rm":
        model, cfg = ScalarGPT(shape), reward.RMConfig(batch_size=B // 2, **common)
        reward.train(model, groups, 0, cfg, log)
        return memory.comparisons(model, frozen, groups, cfg) + memory.held(frozen=[policy])
    if stage == "dpo":
        cfg = dpo.DPOConfig(batch_size=B // 2, **common)
        dpo.train(policy, frozen, groups, 0, cfg, log)
        return memory.comparisons(policy, frozen, groups, cfg)
    if stage == "ilql":
        model, cfg = QGPT(shape), ilql.ILQLConfig(batch_size=B, **common)
        ilql.train(model, rows, [float(i) for i in range(B)], 0, cfg, log)
        return memory.ilql(model, rows, cfg) + memory.held(frozen=[policy, frozen])
    critic, judge = ScalarGPT(shape).eval(), ScalarGPT(shape).eval()
    cfg = ppo.PPOConfig(batch_size=B, max_new_tokens=R, eval_prompts=1, **common)
    prompts = [tokens[:P] for tokens, _ in rows]
    ppo.train(policy, frozen, critic, reward.by_model(judge), prompts, V, 0, cfg, log)
    return memory.ppo(policy, critic, [frozen, judge], prompts, cfg)


def main():
    stage, *sizes, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        train(stage, 20, 8, 1, 1, 4, 4, 4, 0, dtype)  # what PyTorch itself wants
        before = peak()
        estimate = train(stage, *map(int, sizes), dtype)
    print(estimate, peak() - before)


if __name__ == "__main__":
    main()
