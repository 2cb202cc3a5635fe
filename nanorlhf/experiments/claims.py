"""Does what the README says still hold? Its commands are run again, and the results compared.

    python -m nanorlhf.experiments.claims

Out: a line for each claim, with the result, what was expected, and whether it holds. One seed is
enough: the limits have held for every seed so far.
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

COMMANDS = [                          # {out} is the folder of all the runs
    "train_sft.py --out {out}/sft",
    "train_rm.py --sft {out}/sft --out {out}/rm",
    "train_ppo.py --sft {out}/sft --rm {out}/rm --out {out}/ppo",
    "train_ppo.py --sft {out}/sft --rm {out}/rm --out {out}/rloo --advantage rloo --responses 4",
    "-m nanorlhf.dpo --sft {out}/sft --out {out}/dpo",
    "-m nanorlhf.evaluate --against {out}/sft --policy {out}/dpo --out {out}/judged-dpo",
    "-m nanorlhf.ilql --sft {out}/sft --rm {out}/rm --out {out}/ilql",
    "-m nanorlhf.evaluate --against {out}/sft --policy {out}/ilql --out {out}/judged-ilql"]

CLAIMS = [                            # the run, a number of its summary or a ratio, its limits
    ("SFT learns the language", "sft", "perplexity", 1, 2.5),
    ("the RM errs little more than its annotators", "rm", "accuracy / accuracy_ceiling", 0.92, 1.1),
    ("the RM is better than length alone", "rm", "accuracy_low / length_accuracy", 1, 2),
    ("PPO beats SFT by the true reward", "ppo", "win_rate_low", 0.75, 1),
    ("PPO stays close to SFT", "ppo", "kl", 0, 15),
    ("RLOO beats SFT, without a critic", "rloo", "win_rate_low", 0.7, 1),
    ("DPO beats SFT, without a reward model", "judged-dpo", "win_rate_low", 0.7, 1),
    ("ILQL beats SFT, from logged responses", "judged-ilql", "win_rate_low", 0.7, 1)]


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
