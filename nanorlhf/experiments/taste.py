"""Do a hundred labels move a model to the taste of the person who gave them?

    python -m nanorlhf.experiments.taste                three seeds; --quick: one seed, short runs

Two simulated people label the same pairs through the page of people/label.py, into one file. To
vera each dark word (spooky or gloomy) is worth something and each bright one (cheerful or silly)
costs as much, whatever mood was asked for; to sunny it is the opposite. Of each one's labels
train_rm.py makes a reward model, and train_ppo.py follows it.
"""
import json
import random
import re
import threading
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import train_ppo
import train_rm
from nanorlhf import environment
from nanorlhf.experiments import study
from nanorlhf.generate import generate_texts
from nanorlhf.model import load_policy
from nanorlhf.people import label, page
from nanorlhf.ppo import PPOConfig
from nanorlhf.reward import RMConfig
from nanorlhf.support.config import setup
from nanorlhf.support.stats import interval

PEOPLE = dict(vera=2, sunny=-2)         # what a dark word is worth; a bright one costs as much
COLUMNS = "seed", "labels_of", "dark", "dark_low", "dark_high", "gold"


def darkness(story):
    """How many more different dark words than bright ones a story has."""
    moods = [environment.MOOD_OF.get(word) for word in {*re.findall(r"\w+", story.lower())}]
    return sum(1 if mood in ("spooky", "gloomy") else -1 for mood in moods if mood)


def taste(cfg):
    jobs = {(seed,): partial(run_all, cfg, seed) for seed in range(cfg.seed, cfg.seed + cfg.seeds)}
    rows = study.carry_out(jobs, Path(cfg.out) / "taste.csv", COLUMNS, COLUMNS[:1])
    study.print_table(COLUMNS, [row.values() for row in rows])


def run_all(cfg, seed, labels=100):
    """-> rows: the SFT model, PPO by the reward model as it was, and by that of each person"""
    usual = dict(sft=cfg.sft, seed=seed, device=cfg.device, dtype=cfg.dtype, overwrite=True)
    yield dict(labels_of="(SFT)", **measure(cfg.sft, cfg, seed))
    for name in ["nobody", *PEOPLE]:
        rm, out, file = cfg.rm, f"{cfg.out}/{seed}/{name}", f"{cfg.out}/{seed}/labels.jsonl"
        if name in PEOPLE:
            rm = f"{out}-rm"
            click(label.LabelConfig(policy=cfg.sft, prompts=labels, out=file, annotator=name,
                                    seed=seed, device=cfg.device))
            train_rm.main(RMConfig(data=[file], annotator=name, init=cfg.rm, out=rm, **usual))
        train_ppo.main(PPOConfig(rm=rm, out=out, steps=cfg.steps, prompts=cfg.prompts,
                                 eval_prompts=cfg.eval_prompts, **usual))
        yield dict(labels_of=name, **measure(out, cfg, seed))


def click(cfg):
    """A person opens the page, reads two answers and chooses, until every pair has a label."""
    def worth(story):
        taste = PEOPLE[cfg.annotator] * darkness(story)
        return sum((environment.parts(state["prompt"], story) | dict(mood=taste)).values())

    rng, judge = random.Random(f"{cfg.annotator} {cfg.seed}"), environment.Annotator(0.45)
    labels = label.Labels(cfg, label.make_pairs(cfg, setup(cfg)))
    with page.make_server(None, label.actions(labels), port=0) as server:
        threading.Thread(target=server.serve_forever).start()
        url, kind = f"http://127.0.0.1:{server.server_port}", {"Content-Type": "application/json"}
        state = json.load(urlopen(f"{url}/state"))
        while "showing" in state:
            p = judge.prefers_first(worth(state["left"]) - worth(state["right"]))
            said = dict(showing=state["showing"], choice="left" if rng.random() < p else "right")
            state = json.load(urlopen(Request(f"{url}/choose", json.dumps(said).encode(), kind)))
        server.shutdown()


def measure(folder, cfg, seed):
    """-> the share of stories that are dark, with its interval, and the mean true reward"""
    prompts = environment.prompts(cfg.eval_prompts, seed, held_out=True)
    model, tok = load_policy(folder, setup(cfg))
    stories = [story for _, story in generate_texts(model, tok, [*map(tok.encode, prompts)], 80)]
    n, dark = len(stories), sum(darkness(story) > 0 for story in stories)
    gold = sum(map(environment.gold, prompts, stories)) / n
    return dict(zip(COLUMNS[2:], (round(x, 3) for x in (dark / n, *interval(dark, n), gold))))


if __name__ == "__main__":
    study.main(taste)
