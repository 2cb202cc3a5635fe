"""Does what the README says still hold? Its commands are run again, and the results compared.

    python -m nanorlhf.experiments.claims

In: nothing but the repository. Out: a line for each claim, with the result, what was expected, and
whether it holds. The limits have held for every seed so far, so one seed is enough.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

from nanorlhf.support import UserError
from nanorlhf.support.config import ComputeConfig, run
from nanorlhf.support.runlog import open_run


@dataclass
class ClaimsConfig(ComputeConfig):
    """Run the README's commands again, and check what it says about them."""
    out: str = "out/claims"           # the folder of all the runs


class Claim(NamedTuple):
    """After the command, a number of its summary.json lies between low and high."""
    text: str
    command: str                      # in it, {out} is the folder of all the runs
    folder: str                       # of the summary
    number: str                       # a key of it, or two with a / or - between them
    low: float = -inf
    high: float = inf


SFT = "train_sft.py --out {out}/sft"
RM = "train_rm.py --sft {out}/sft --out {out}/rm"
PPO = "train_ppo.py --sft {out}/sft --rm {out}/rm --out {out}/ppo"
RLOO = PPO + "-rloo --advantage rloo --responses 4"
EVALUATE = " && -m nanorlhf.evaluate --against {out}/sft --policy {out}/X --out {out}/judged-X"
DPO = "-m nanorlhf.dpo --sft {out}/sft --out {out}/dpo" + EVALUATE.replace("X", "dpo")
ILQL = "-m nanorlhf.ilql --sft {out}/sft --rm {out}/rm --out {out}/ilql"
ILQL += EVALUATE.replace("X", "ilql")

CLAIMS = [
    Claim("SFT learns the language", SFT, "sft", "perplexity", high=2.5),
    Claim("the reward model comes close to the accuracy that its annotators' errors allow", RM,
          "rm", "accuracy / accuracy_ceiling", low=0.92),
    Claim("the reward model is better than a rule that looks at length alone", RM,
          "rm", "accuracy_low - length_accuracy", low=0.0),
    Claim("PPO beats SFT by the true reward", PPO, "ppo", "win_rate_low", low=0.75),
    Claim("PPO stays close to SFT", PPO, "ppo", "kl", high=15),
    Claim("RLOO beats SFT, without a critic", RLOO, "ppo-rloo", "win_rate_low", low=0.7),
    Claim("DPO beats SFT, without a reward model", DPO, "judged-dpo", "win_rate_low", low=0.7),
    Claim("ILQL beats SFT, from logged responses", ILQL, "judged-ilql", "win_rate_low", low=0.7),
]


def main(cfg):
    """Run the commands, each once, and compare. Raises UserError where a claim does not hold."""
    open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    done, failed = set(), 0
    flags = f"--seed {cfg.seed} --device {cfg.device} --dtype {cfg.dtype} --overwrite"
    for claim in CLAIMS:
        for command in claim.command.split(" && "):
            if command not in done:
                run_command(f"{command.format(out=shlex.quote(cfg.out))} {flags}")
                done.add(command)
        summary = json.loads((Path(cfg.out) / claim.folder / "summary.json").read_text())
        value = compute(claim.number, summary)
        holds = claim.low < value < claim.high
        failed += not holds
        expected = f"above {claim.low:g}" if claim.low > -inf else f"below {claim.high:g}"
        print(f"{'holds' if holds else 'FAILS':6}{claim.text}: {claim.number} is {value:.3f}, "
              f"expected {expected}", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(CLAIMS)} claims no longer hold")


def run_command(command):
    """Run a Python command. What it prints is shown only if it fails."""
    ended = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"python {command} ended with {ended.returncode}: {ended.stderr[-300:]}")


def compute(number, summary):
    """The value of "a", "a / b" or "a - b", where a and b are keys of the summary."""
    a, sign, b = (number.split() + ["", ""])[:3]
    if not sign:
        return summary[a]
    return summary[a] / summary[b] if sign == "/" else summary[a] - summary[b]


if __name__ == "__main__":
    run(main, ClaimsConfig)
