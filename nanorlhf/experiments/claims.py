"""Does what the README says still hold? Its commands are run again, and the results compared.

    python -m nanorlhf.experiments.claims

One seed is enough: the limits have held for every seed so far.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.support import UserError
from nanorlhf.support.config import ComputeConfig, run
from nanorlhf.support.runlog import open_run

# Commands, in which {out} is the folder of all runs. Claims: a sentence, the run, a number of its
# summary or a ratio of two, and its limits.
COMMANDS, CLAIMS = json.loads(Path(__file__).with_name("claims.json").read_bytes()).values()


@dataclass
class ClaimsConfig(ComputeConfig):
    """Run the README's commands again, and check what it says about them."""
    out: str = "out/claims"           # the folder of all the runs


def main(cfg):
    """Run the commands, and compare. Raises UserError where a claim does not hold."""
    open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    flags = f"--seed {cfg.seed} --device {cfg.device} --dtype {cfg.dtype} --overwrite"
    for command in COMMANDS:
        run_command(f"{command.format(out=shlex.quote(cfg.out))} {flags}")
    failed = 0
    for text, folder, number, low, high in CLAIMS:
        summary = json.loads(Path(cfg.out, folder, "summary.json").read_text())
        name, *divisor = number.split(" / ")
        value = summary[name] / (summary[divisor[0]] if divisor else 1)
        failed += (fails := not low < value < high)
        print(f"{'FAILS' if fails else 'holds'} {text}: {number} is {value:.3f}, "
              f"expected {low} to {high}")
    if failed:
        raise UserError(f"{failed} of {len(CLAIMS)} claims no longer hold")


def run_command(command):
    """Run a Python command. What it prints is shown only if it fails."""
    print(f"python {command}", flush=True)
    ended = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"python {command} ended with {ended.returncode}: {ended.stderr[-300:]}")


if __name__ == "__main__":
    run(main, ClaimsConfig)
