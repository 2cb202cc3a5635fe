"""Does a long run leak? PPO for 2,000 small steps in one process, its resident memory on the way.

    python tests/soak.py                    2,000 steps, some minutes
    python tests/soak.py --steps 500        fewer, and a wider interval

Prints the memory now and then, and in the end by how much it grows a step, with a 95 % interval.
Exits with status 1 if the interval leaves room for more than LIMIT. The first quarter of the run
is left out: there caches, pools and the allocator's arenas fill up.
"""

import argparse
import copy
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanorlhf import environment, ppo, tokenizer
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support import data, user_code
from nanorlhf.support.runlog import RunLog

LIMIT = 2.0  # KB a step: a run of the default length would not notice, nor one a thousand times it
EVERY = 10  # steps from one sample to the next


def resident():
    """Resident memory of this process in KB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


class Watch(RunLog):
    """A log that also writes down how much memory there is in use."""

    def write(self, step, **metrics):
        super().write(step, **metrics)
        self.memory = getattr(self, "memory", [])
        if step % EVERY == 0:
            self.memory.append((step, resident()))
        if step % 200 == 0:
            print(f"step {step:>5}  {resident() / 1024:.1f} MB", file=sys.stderr, flush=True)


def slope(points, blocks=10):
    """KB a step, and half its 95 % interval.

    Memory comes in jumps and neighbours resemble each other, so single samples are no evidence:
    the least-squares line goes through the means of blocks.
    """
    size = len(points) // blocks
    means = [tuple(map(statistics.fmean, zip(*points[i * size : (i + 1) * size], strict=True)))
             for i in range(blocks)]  # fmt: skip
    xs, ys = zip(*means, strict=True)
    rate, start = statistics.linear_regression(xs, ys)
    spread = sum((y - start - rate * x) ** 2 for x, y in means) / (blocks - 2)
    error = math.sqrt(spread / sum((x - statistics.fmean(xs)) ** 2 for x in xs))
    return rate, 2.306 * error  # Student's t with 8 degrees of freedom


def soak(steps, folder):
    """A run with everything that a real one has: sampling, a reward of texts, saving, logging."""
    torch.manual_seed(0)
    texts = environment.prompts(200, 1)
    tok = tokenizer.learn(texts, 300)
    shape = GPTConfig(tok.vocab_size, n_positions=96, n_layer=1, n_head=2, n_embd=16)
    policy, critic = GPT(shape).eval(), ScalarGPT(shape).eval()
    cfg = ppo.PPOConfig(
        out=folder, steps=steps, batch_size=8, max_new_tokens=12, device="cpu", dtype="float32",
        save_every=50,
    )  # fmt: skip
    score = user_code.by_text(lambda pairs: [environment.gold(*pair) for pair in pairs], tok)
    prompts = data.encode_prompts(texts, tok, 80, data.Counter())
    log = Watch(folder, every=steps)
    ppo.train(
        policy, copy.deepcopy(policy), critic, score, prompts, tok.eos, tok.pad, cfg, log
    )  # fmt: skip
    return log.memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = max(200, parser.parse_args().steps)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        memory = soak(steps, folder)
    rate, half = slope([point for point in memory if point[0] >= steps / 4])
    leaks = rate + half > LIMIT
    print(f"{rate:+.3f} KB a step (95 %: {rate - half:+.3f} to {rate + half:+.3f}) over steps "
          f"{steps // 4} to {steps}, {memory[-1][1] / 1024:.0f} MB at the end; "
          f"{'too much: the' if leaks else 'the'} limit is {LIMIT} KB a step")  # fmt: skip
    sys.exit(1 if leaks else 0)


if __name__ == "__main__":
    main()
