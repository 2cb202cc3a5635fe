"""What the README claims, run again: python -m nanorlhf.evaluate claims

In: nothing but the repository. Out: a line for each claim, with what was expected, what came, and
whether it still holds. One seed, as each claim is of a size that every seed so far has met.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path

from nanorlhf import UserError


@dataclass
class Claim:
    """After the command, a number of its summary.json lies between low and high."""
    says: str
    command: str                      # in it, {out} is the folder of all the runs
    folder: str                       # of the summary
    number: str                       # a key of it, or two with a / or - between them
    low: float = -inf
    high: float = inf


SFT = "train_sft.py --out {out}/sft"
RM = "train_rm.py --sft {out}/sft --out {out}/rm"
PPO = "train_ppo.py --sft {out}/sft --rm {out}/rm --out {out}/ppo"
RLOO = PPO + "-rloo --advantage rloo --responses 4"
DPO = "-m nanorlhf.dpo --sft {out}/sft --out {out}/dpo"
ILQL = "-m nanorlhf.ilql --sft {out}/sft --rm {out}/rm --out {out}/ilql"
JUDGE = "-m nanorlhf.evaluate --against {{out}}/sft --policy {{out}}/{0} --out {{out}}/{0}-judged"

CLAIMS = [
    Claim("imitation learns the language", SFT, "sft", "perplexity", high=2.5),
    Claim("the reward model comes near what its noisy annotators allow", RM, "rm",
          "accuracy / accuracy_ceiling", low=0.92),
    Claim("and is no ruler: it beats length alone", RM, "rm", "accuracy_low - length_accuracy",
          low=0.0),
    Claim("PPO is preferred to SFT by the truth", PPO, "ppo", "win_rate_low", low=0.75),
    Claim("and pays few nats for it", PPO, "ppo", "kl", high=15),
    Claim("RLOO does it without a critic", RLOO, "ppo-rloo", "win_rate_low", low=0.7),
    Claim("DPO does it without a reward model", DPO + " && " + JUDGE.format("dpo"), "dpo-judged",
          "win_rate_low", low=0.7),
    Claim("ILQL does it from a log, without sampling", ILQL + " && " + JUDGE.format("ilql"),
          "ilql-judged", "win_rate_low", low=0.7),
]


def claims(cfg):
    """Run the commands, each once, and compare."""
    done, failed = set(), 0
    for claim in CLAIMS:
        for command in claim.command.split(" && "):
            if command not in done:
                call(command.format(out=cfg.out))
                done.add(command)
        summary = json.loads((Path(cfg.out) / claim.folder / "summary.json").read_text())
        found = number(claim.number, summary)
        holds = claim.low < found < claim.high
        failed += not holds
        expected = f"above {claim.low:g}" if claim.low > -inf else f"below {claim.high:g}"
        print(f"{'holds' if holds else 'FAILS':6}{claim.says}: {claim.number} is {found:.3f}, "
              f"expected {expected}", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(CLAIMS)} claims no longer hold")


def call(command):
    """A command of the README, with what it prints kept back unless it fails."""
    words = [sys.executable, *shlex.split(command), "--overwrite"]
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"python {command} ended with {ended.returncode}: {ended.stderr[-300:]}")


def number(text, summary):
    """The value of "a", "a / b" or "a - b", a and b being keys of the summary."""
    first, operator, second = (text.split() + ["", ""])[:3]
    other = summary[second] if second else None
    return {"": lambda a, _: a, "/": lambda a, b: a / b, "-": lambda a, b: a - b}[operator](
        summary[first], other)
