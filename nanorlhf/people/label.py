"""Choose between two answers, pair by pair, in a browser: the human in human feedback.

    python -m nanorlhf.people.label --policy out/sft       choices to learn from; then
    python train_rm.py --data out/labels.jsonl --init out/rm --out out/my-rm

    python -m nanorlhf.people.label --policy out/ppo --against out/sft --out out/arena.jsonl
    python -m nanorlhf.evaluate --judge out/arena.jsonl    says which of the two models is better

A choice is on the disk before the next pair is shown; support/labels.py describes the file. Started
again, the program goes on at the first pair without one. The page is label.html.
"""
import hashlib
import json
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanorlhf import environment, reward
from nanorlhf.evaluate import held_out_prompts
from nanorlhf.generate import generate_texts
from nanorlhf.model import load_policy
from nanorlhf.people.page import PageConfig, serve
from nanorlhf.support import UserError, data
from nanorlhf.support.config import run, setup
from nanorlhf.support.formats import read_records
from nanorlhf.support.labels import append, ready, summary
from nanorlhf.support.runlog import printable
from nanorlhf.support.stats import disagreement

KEYS = {"1": "left", "2": "right", "3": "tie", "4": "both bad", "s": "skip", "u": "undo"}
MENU = "1 first  2 second  3 tie  4 both bad  s skip  u undo  q quit: "


@dataclass
class LabelConfig(PageConfig):
    """Choose between two answers to a prompt, in a browser or in the terminal."""
    policy: str = "out/sft"           # the model whose answers are compared
    against: str = ""                 # another model, which then writes one answer of each pair
    data: list[str] = field(default_factory=list)  # files of prompts; none: the built-in world
    prompts: int = 100                # how many pairs: one a prompt, and some come back once
    active: list[str] = field(default_factory=list)  # reward models: show where they differ most
    out: str = "out/labels.jsonl"     # the file of labels, which grows
    annotator: str = "me"             # who chooses; stands in each label
    terminal: bool = False            # ask in the terminal


def make_pairs(cfg, device):
    """Two answers to each prompt. -> list of {"id", "prompt", "first", "second"}"""
    if cfg.active and (cfg.against or len(cfg.active) < 2):
        raise UserError("--active: expected two reward models or more, and no --against, as a win "
                        f"rate needs pairs chosen at random; came {' '.join(cfg.active)}")
    n = 10 * cfg.prompts if cfg.active else cfg.prompts
    # Two models are compared on prompts that neither has seen.
    prompts = (held_out_prompts(cfg.data, n, cfg.seed) if cfg.against else
               data.prompts(cfg.data)[0][:n] if cfg.data else environment.prompts(n, cfg.seed))
    columns = [prompts]
    for number, name in enumerate((cfg.policy, cfg.against or cfg.policy)):
        model, tok = load_policy(name, device)
        room = model.config.n_positions - cfg.max_new_tokens
        rows = generate_texts(model, tok, data.encode_prompts(prompts, tok, room, data.Counter()),
                              cfg.max_new_tokens, cfg.temperature, seed=2 * cfg.seed + number)
        columns.append([answer for _, answer in rows])
    pairs = [dict(zip(("prompt", "first", "second"), texts),
                  id=hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16])
             for texts in zip(*columns) if cfg.against or texts[1] != texts[2]]
    if not pairs:
        raise UserError("expected answers that differ, came the same twice to every prompt: try a "
                        "higher --temperature")
    return most_disputed(pairs, cfg, model, tok) if cfg.active else pairs


def most_disputed(pairs, cfg, policy, tok):
    """The tenth of the pairs on which the reward models in cfg.active differ most."""
    records = [dict(prompt=p["prompt"], chosen=p["first"], rejected=p["second"]) for p in pairs]
    rows = data.encode_pairs(records, tok, policy.config.n_positions, data.Counter())
    groups = [(two, [(0, 1)]) for two in rows]
    judges = [reward.by_model(reward.load_for(name, policy, tok)) for name in cfg.active]
    margins = [reward.report(judge, groups, tok.pad, policy.device, "float32")[1]
               for judge in judges]
    disputed = disagreement(torch.stack(margins)).argsort(descending=True)
    return [pairs[i] for i in disputed[:cfg.prompts]]


def make_showings(pairs, annotator):
    """Every pair once, and every fifth once more, ten pairs later: do people agree with themselves?
    -> {showing: (pair, its first showing, or None if this is it)}"""
    showings = {}
    for i, pair in enumerate(pairs):
        showings[f"{pair['id']}/1/{annotator}"] = pair, None
        if i >= 10 and i % 5 == 0:
            again = pairs[i - 10]
            showings[f"{again['id']}/2/{annotator}"] = again, f"{again['id']}/1/{annotator}"
    return showings


class Labels:
    """Which pair is next, and what was chosen: all that the page and the terminal do."""

    def __init__(self, cfg, pairs):
        self.cfg, self.path, self.lock = cfg, Path(cfg.out), threading.Lock()
        self.showings, self.labels = make_showings(pairs, cfg.annotator), {}
        ready(self.path)
        for _, record in read_records(self.path) if self.path.stat().st_size else ():
            if record.get("showing") in self.showings:
                self.keep(record)

    def keep(self, record):
        self.labels.pop(record["showing"], None)
        if record["choice"] != "undo":
            self.labels[record["showing"]] = record

    def sides(self, showing):
        """Which answer stands left and which right: at random, and the same in every window."""
        return random.Random(f"{self.cfg.seed} {showing}").sample(["first", "second"], 2)

    def choose(self, showing, choice, seconds=0):
        """Keep a choice, "left" or another of KEYS, or take one back. The same showing a second
        time, by a double click or in another window, changes nothing. Raises ValueError or
        TypeError for what was never shown."""
        if showing not in self.showings or choice not in KEYS.values() or not 0 <= seconds < 1e9:
            raise ValueError("expected a choice between answers that were shown here: reload")
        with self.lock:
            if (showing in self.labels) != (choice == "undo"):
                return
            (pair, earlier), cfg, sides = self.showings[showing], self.cfg, self.sides(showing)
            choice = dict(zip(("left", "right"), sides)).get(choice, choice)
            record = dict(showing=showing, choice=choice, annotator=cfg.annotator,
                          time=datetime.now(UTC).isoformat(timespec="seconds"))
            if choice != "undo":
                record |= dict(pair, position=sides[0], seconds=round(seconds, 2),
                               repeat=bool(earlier), policy=cfg.policy,
                               against=cfg.against or cfg.policy)
            if choice in sides:
                record |= dict(chosen=pair[choice], rejected=pair[sides[choice == sides[0]]])
            append(self.path, record)
            self.keep(record)

    def state(self):
        """What is to be shown: the next pair without a label, and how it goes so far. -> dict"""
        with self.lock:
            due = [showing for showing, (_, earlier) in self.showings.items()
                   if showing not in self.labels
                   and self.labels.get(earlier, {}).get("choice") != "skip"]
            n, last = len(self.labels), next(reversed(self.labels), None)
            progress = [f"{n} of {n + len(due)} done", *summary(self.labels.values())]
            state = dict(progress=" \u00b7 ".join(progress), last=last, revealed="")
            if due:
                (left, right), (pair, _) = self.sides(due[0]), self.showings[due[0]]
                state |= dict(showing=due[0], prompt=pair["prompt"], left=pair[left],
                              right=pair[right])
            if last and self.cfg.against:
                names = dict(first=self.cfg.policy, second=self.cfg.against)
                left, right = (names[answer] for answer in self.sides(last))
                state["revealed"] = f"The last pair: 1 was by {left}, 2 by {right}."
            return state


def actions(labels):
    """What the page asks for: GET /state is what it shows, POST /choose answers with the same."""
    return {"GET /state": labels.state,
            "POST /choose": lambda **fields: labels.choose(**fields) or labels.state()}


def in_terminal(labels, key=""):
    """The same without a page."""
    while key != "q":
        state, began = labels.state(), time.perf_counter()
        print(f"\n{state['progress']}  {state['revealed']}")
        for name, title in {"prompt": "prompt", "1": "left", "2": "right"}.items():
            text = printable(state.get(title, "every pair has a label").strip())
            print(f"{name:8}" + text.replace("\n", "\n        "))
        key = input(MENU).strip().lower()
        showing = state["last"] if key == "u" else state.get("showing")
        if showing and key in KEYS:
            labels.choose(showing, KEYS[key], time.perf_counter() - began)


def main(cfg):
    device = setup(cfg)
    ready(Path(cfg.out))              # or the models would be loaded for nothing
    labels = Labels(cfg, make_pairs(cfg, device))
    with suppress(KeyboardInterrupt, EOFError):
        if cfg.terminal:
            in_terminal(labels)
        else:
            page = Path(__file__).with_suffix(".html")
            serve(page, actions(labels), cfg, note="; all choices are kept")
    print(f"\nlabels    {labels.state()['progress']}, in {cfg.out}\nnext: python " + (
        f"-m nanorlhf.evaluate --judge {cfg.out}" if cfg.against else
        f"train_rm.py --data {cfg.out} --sft {cfg.policy} --init out/rm --out out/my-rm\n"
        "      (--init: a reward model to go on from; without it, a new one)"))


if __name__ == "__main__":
    run(main, LabelConfig)
