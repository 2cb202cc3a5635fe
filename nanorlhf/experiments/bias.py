"""What does a reward model reward besides what was asked?

    python -m nanorlhf.experiments.bias --rm out/rm out/rm-long      reward models, side by side
    python -m nanorlhf.experiments.bias --labels out/labels.jsonl    the choices in a file

The unit is a point: what a point of true reward adds to the score. First, two answers of the SFT
model to one prompt: least squares explain the gap of their scores by the gaps in each part of the
true reward and in words. A fair judge gives 1 to a point of any part, and 0 to a word. Second,
careful stories with a single change. Brackets: 95 % intervals (bootstrap over pairs or stories).
"""
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanorlhf import environment, reward
from nanorlhf.experiments.study import grouped, print_table
from nanorlhf.model import load_policy
from nanorlhf.support import UserError, data
from nanorlhf.support.checkpoint import read_json
from nanorlhf.support.config import ComputeConfig, run, setup
from nanorlhf.support.formats import read_records
from nanorlhf.support.labels import standing
from nanorlhf.support.stats import interval
from train_rm import calibration


@dataclass
class BiasConfig(ComputeConfig):
    """Say what reward models prefer, or the people who made a file of labels."""
    rm: list[str] = field(default_factory=lambda: ["out/rm"])  # folders of reward models
    sft: str = "out/sft"              # the model whose answers they score
    labels: str = ""                  # a file of labels, which is then described instead
    prompts: int = 1000               # held-out requests, with two answers each


def main(cfg):
    if cfg.labels:
        return print_table(["annotator", "choices", "of the one shown first", "of the longer one",
                            "the longer one is better"], preferences(cfg.labels))
    device, stage = setup(cfg), reward.ComparisonConfig(seed=cfg.seed)
    sft, tok = load_policy(cfg.sft, device)
    # With each judge, the number that turns its margins into those whose sigmoid is a probability.
    judges = {"true reward": (reward.true_reward(tok), 1 / stage.annotator_temperature)}
    for name in cfg.rm:
        model = reward.load_for(name, sft, tok)
        saved = read_json(Path(name) / "config.json", "--rm")
        judges[name] = reward.by_model(model), saved.get("reward_std", 1)
    groups, ceiling = reward.compare_samples(sft, tok, cfg.prompts, 2, stage, held_out=True)
    stories = changed_stories(min(400, cfg.prompts), cfg.seed)
    columns = [describe(*judge, groups, stories, tok, sft) for judge in judges.values()]
    print_table(["", *judges], [[name, *(column[name] for column in columns)]
                                for name in columns[0]])
    print(f"Fair annotators err: no accuracy above {ceiling:.3f} can be expected.")


def describe(judge, scale, groups, stories, tok, sft):
    """All that is said of a score function. -> {what: text}"""
    metrics, margin = reward.report(judge, groups, tok.pad, sft.device, "float32")
    names, gaps = gaps_of(groups, tok)
    margins = margin.numpy()
    worth, unit = weigh(gaps, margins)
    rows = [data.encode(records, tok, sft.config.n_positions, Counter())
            for records in stories.values()]
    own, *changed = (data.score_rows(judge, part, tok.pad, sft.device, "float32").cpu().numpy()
                     for part in rows)
    moved = (np.stack(changed, 1) - own[:, None]) / unit                    # (stories, changes)
    low_high = np.concatenate([
        bootstrap(lambda i: weigh(gaps[i], margins[i])[0], len(gaps)),
        bootstrap(lambda i: moved[i].mean(0), len(moved))], 1)
    table = {name: f"{value:+z.2f} [{low:+z.2f}, {high:+z.2f}]" for name, value, low, high in zip(
        [*names, *[*stories][1:]], [*worth, *moved.mean(0)], *low_high, strict=True)}
    error = sum(n * abs(said - true) for said, true, n in calibration(margin * scale))
    accuracy = "{accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**metrics)
    return table | {"accuracy": accuracy, "calibration error": f"{error / len(margin):.3f}"}


def gaps_of(groups, tok):
    """Chosen minus rejected of each pair. -> names (F), gaps (pairs, F): parts, then words"""
    rows, chosen, rejected = data.flatten(groups)
    texts = [(tok.decode(tokens[:n]), tok.decode(tokens[n:])) for tokens, n in rows]
    parts = [environment.parts(*pair) for pair in texts]
    features = np.array([[*p.values(), len(answer.split())]
                         for p, (_, answer) in zip(parts, texts, strict=True)])
    names = [f"a point of {name}" for name in parts[0]] + ["one more word"]
    return names, features[chosen] - features[rejected]


def weigh(gaps, margins):
    """Least squares. gaps (pairs, F): of the parts, and last of words; margins (pairs,)
    -> what each is worth (F,), in points; what a point is worth in the score"""
    whole = np.stack([gaps[:, :-1].sum(1), gaps[:, -1]], 1)            # the true reward, and words
    unit, _ = np.linalg.lstsq(whole, margins, rcond=None)[0]
    return np.linalg.lstsq(gaps, margins, rcond=None)[0] / unit, unit


def bootstrap(statistic, n, draws=1000):
    """statistic: indices (n,) -> (F,). -> lower and upper ends of the 95 % intervals (2, F)"""
    rng = np.random.default_rng(0)
    return np.quantile([statistic(rng.integers(n, size=n)) for _ in range(draws)],
                       (0.025, 0.975), axis=0)


def changed_stories(n, seed):
    """Stories by careful authors for held-out requests: as they are, then with one change.
    -> {change: list of {"prompt", "response"}}"""
    rng = random.Random(f"bias {seed}")
    prompts = environment.prompts(n, seed, held_out=True)
    stories, others = ([environment.write(environment.Request.parse(p), rng, care=1)
                        for p in prompts] for _ in range(2))

    def with_second(sentences):                                 # a sentence put behind the first
        return [story.replace(".", f".{sentence}.", 1)
                for story, sentence in zip(stories, sentences, strict=True)]

    recipes = [environment.DIGRESSIONS[0].format(
        **{slot: rng.choice(words) for slot, words in environment.OTHERS.items()}) for _ in prompts]
    changes = {"as it is": (prompts, stories)} | {
        f"another {slot} asked for": ([environment.near_miss(p, rng, slot) for p in prompts],
                                      stories) for slot in environment.ASKED} | {
        "without its end": (prompts, [s.removesuffix(environment.THE_END) for s in stories]),
        "one more sentence that fits": (prompts, with_second(s.split(".")[2] for s in others)),
        "one more that does not": (prompts, with_second(s.rstrip(".") for s in recipes))}
    return {name: [dict(prompt=p, response=r) for p, r in zip(*pair, strict=True)]
            for name, pair in changes.items()}


def preferences(path):
    """How often each annotator in a file of labels chose the answer that was shown first, which is
    half the time for a fair one, and how often the longer one; and how often it is the better one
    by the true reward, where that knows the prompts. -> lines of a table"""
    labels = [label for _, label in standing(read_records(path), Counter())
              if label.get("choice") in ("first", "second") and "position" in label]
    if not labels:
        raise UserError(f"--labels: expected choices made with nanorlhf.people.label, which say "
                        f"what was shown first; {path} has none")
    lines = []
    for (name,), same in grouped(labels, ["annotator"]).items():
        first = [label["choice"] == label["position"] for label in same]
        pairs = [(label["prompt"], label["chosen"], label["rejected"]) for label in same]
        gaps = [len(chosen.split()) - len(rejected.split()) for _, chosen, rejected in pairs]
        better = []
        with suppress(UserError):     # the prompts are not of the built-in world
            better = [gap * (environment.gold(p, chosen) - environment.gold(p, rejected)) > 0
                      for gap, (p, chosen, rejected) in zip(gaps, pairs, strict=True) if gap]
        lines.append([name, len(same), *map(share, (first, [g > 0 for g in gaps if g], better))])
    return lines


def share(flags):
    if not flags:
        return "unknown"
    low, high = interval(sum(flags), len(flags))
    return f"{sum(flags) / len(flags):.2f} [{low:z.2f}, {high:z.2f}]"


if __name__ == "__main__":
    run(main, BiasConfig)
