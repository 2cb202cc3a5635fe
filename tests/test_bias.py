"""What the report on biases finds in score functions that are known, and in a file of labels."""

import json
import random
import re

import numpy as np
import pytest
import torch

from nanorlhf import environment, tokenizer
from nanorlhf.environment import Annotator, Request, gold, parts, prompts, write
from nanorlhf.experiments import bias
from nanorlhf.experiments.bias import BiasConfig, bootstrap, changed_stories, preferences, weigh
from nanorlhf.model import GPT, GPTConfig, ReadingGPT
from nanorlhf.support import UserError, data, user_code

POINTS = [f"a point of {name}" for name in parts(prompts(1)[0], "")]
SHAPE = dict(n_positions=400, n_layer=1, n_head=1, n_embd=8)


@pytest.fixture(scope="module")
def tok():
    texts = [r["prompt"] + r["response"] for r in environment.demonstrations(100)]
    return tokenizer.learn(texts, 300)


@pytest.fixture(scope="module")
def sft(tok):
    torch.manual_seed(0)
    return GPT(GPTConfig(tok.vocab_size, **SHAPE))


@pytest.fixture(scope="module")
def groups(tok):
    """Two stories by authors of any skill for each of 80 requests; the first is the chosen one."""
    rng = random.Random(0)
    records = [
        dict(prompt=p, chosen=write(Request.parse(p), rng), rejected=write(Request.parse(p), rng))
        for p in prompts(80)
    ]
    rows = data.encode_pairs(records, tok, 400, data.Counter())
    return [(pair, [(0, 1)]) for pair in rows]


@pytest.fixture(scope="module")
def stories():
    return changed_stories(20, 1)


@pytest.fixture
def described(tok, sft, groups, stories):
    """judge -> {what: [value, low, high]}"""

    def describe(judge):
        score = user_code.by_text(lambda pairs: [judge(*pair) for pair in pairs], tok)
        table = bias.describe(score, 1.0, groups, stories, tok, sft)
        return {name: [float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)]
                for name, text in table.items()}  # fmt: skip

    return describe


def near(*values):
    return pytest.approx(values, abs=0.0051)  # the table has two digits


def words(text):
    return len(text.split())


def test_a_fair_judge_gives_one_to_each_part_and_nothing_to_a_word(described):
    found = described(lambda prompt, answer: 2 * gold(prompt, answer) - 5)
    assert [found[name] for name in POINTS] == [near(1, 1, 1)] * 9
    assert found["one more word"] == near(0, 0, 0)


def test_a_planted_love_of_length_is_found_at_its_size(described):
    found = described(lambda p, answer: 3 * Annotator(likes_length=0.1).reward(p, answer))
    assert [found[name] for name in POINTS] == [near(1, 1, 1)] * 9
    assert found["one more word"] == near(0.1, 0.1, 0.1)


def test_a_part_that_a_judge_ignores_is_worth_nothing_to_it(described):
    found = described(lambda p, answer: gold(p, answer) - parts(p, answer)["ending"])
    assert found["a point of ending"] == near(0, 0, 0)
    assert found["without its end"] == near(0, 0, 0)
    assert found["a point of mood"][0] > 0.9


def test_noise_alone_is_no_bias_and_does_not_hide_one(described):
    def noise(answer):
        return random.Random(answer).gauss(0, 1)

    low, high = described(lambda p, a: gold(p, a) + noise(a))["one more word"][1:]
    assert low < 0 < high
    low, high = described(lambda p, a: gold(p, a) + 0.1 * words(a) + noise(a))["one more word"][1:]
    assert 0 < low < 0.1 < high


def test_every_change_costs_a_fair_judge_what_it_costs_in_true_reward(described, stories):
    found = described(gold)
    own = [gold(*r.values()) for r in stories["as it is"]]
    for name, changed in [*stories.items()][1:]:
        cost = [gold(*r.values()) - x for r, x in zip(changed, own, strict=True)]
        assert found[name][:1] == near(np.mean(cost))
        assert found[name][1] <= found[name][0] <= found[name][2]
    for slot in environment.ASKED:
        assert found[f"another {slot} asked for"][2] < -0.9


def test_a_judge_who_does_not_read_the_request_is_told(described):
    [prompt] = prompts(1)
    found = described(lambda _, answer: gold(prompt, answer))
    for slot in environment.ASKED:
        assert found[f"another {slot} asked for"] == near(0, 0, 0)


def test_a_story_has_one_change_and_no_other(stories):
    own = stories["as it is"]
    assert {len(records) for records in stories.values()} == {20}
    for name, changed in [*stories.items()][1:]:
        for before, after in zip(own, changed, strict=True):
            asks = name.startswith("another")
            assert (before["prompt"] != after["prompt"]) == asks
            assert (before["response"] != after["response"]) == (not asks)
    for name in "one more sentence that fits", "one more that does not":
        for before, after in zip(own, stories[name], strict=True):
            old, new = (r["response"].split(".") for r in (before, after))
            assert new[:1] + new[2:] == old
            fits = bool({*Request.parse(after["prompt"]).__dict__.values()} & {*new[1].split()})
            assert fits == (name == "one more sentence that fits")


def test_weights_are_in_points_whatever_the_scale_of_the_score():
    rng = np.random.default_rng(1)
    gaps = rng.normal(size=(200, 4))
    margins = 7 * (gaps[:, :3].sum(1) + 0.25 * gaps[:, 3])
    worth, unit = weigh(gaps, margins)
    assert worth == pytest.approx([1, 1, 1, 0.25]) and unit == pytest.approx(7)


def test_the_bootstrap_of_a_mean_is_the_interval_of_the_textbook():
    x = np.random.default_rng(2).normal(size=(400, 1))
    low, high = bootstrap(lambda i: x[i].mean(0), 400, draws=4000)[:, 0]
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)


# --- a file of labels ---


def label(number, choice, **fields):
    record = dict(showing=f"{number}/1/anna", id=str(number), prompt="p", first="a b", second="a",
                  choice=choice, position="first", annotator="anna", repeat=False)  # fmt: skip
    if choice in ("first", "second"):
        other = "second" if choice == "first" else "first"
        record |= dict(chosen=record[choice], rejected=record[other])
    return record | fields


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_position_and_length_are_counted_for_each_annotator(tmp_path):
    choices = [label(n, "first") for n in range(3)] + [label(3, "second", position="second")]
    choices += [label(4, "second"), label(5, "tie"), label(6, "skip"), label(7, "first")]
    choices += [label(7, "undo"), label(8, "first", repeat=True)]
    choices += [label(9, "first", annotator="ben", position="second", chosen="a", rejected="b")]
    anna, ben = preferences(written(tmp_path / "labels.jsonl", choices))
    # Wilson's intervals, by hand: of 4 of 5, 3 of 5 and 0 of 1
    assert anna == ["anna", 5, "0.80 [0.38, 0.96]", "0.60 [0.23, 0.88]", "unknown"]
    assert ben == ["ben", 1, "0.00 [0.00, 0.79]", "unknown", "unknown"]  # both of one word


def test_beside_the_choice_of_the_longer_answer_stands_what_the_true_reward_says(tmp_path):
    prompt = prompts(1)[0]
    good = write(Request.parse(prompt), random.Random(0), care=1)
    texts = dict(prompt=prompt, first=f"{good} {good}", second=good)  # too long, and repeated
    longer = [label(n, "first", **texts, chosen=texts["first"], rejected=good) for n in range(4)]
    [line] = preferences(written(tmp_path / "labels.jsonl", longer))
    assert line[3:] == ["1.00 [0.51, 1.00]", "0.00 [0.00, 0.49]"]


def test_a_file_that_does_not_say_what_was_shown_first_is_refused(tmp_path, capsys):
    path = written(tmp_path / "pairs.jsonl", [dict(prompt="p", chosen="a", rejected="b")])
    with pytest.raises(UserError, match=r"made with nanorlhf.people.label.*pairs.jsonl has none"):
        bias.main(BiasConfig(labels=path))


# --- from end to end ---


def test_reward_models_stand_side_by_side(tok, sft, tmp_path, capsys):
    folders = [str(tmp_path / name) for name in ("sft", "one", "two")]
    for folder, kind in zip(folders, (GPT, ReadingGPT, ReadingGPT), strict=True):
        kind(sft.config).save(folder, tok)
    bias.main(BiasConfig(sft=folders[0], rm=folders[1:], prompts=20, device="cpu"))
    *table, last = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["", "true reward", *folders[1:]] and {len(row) for row in rows} == {4}
    names = [row[0] for row in rows[2:]]
    assert names == [*POINTS, "one more word", *[*changed_stories(2, 1)][1:], "accuracy",
                     "calibration error"]  # fmt: skip
    assert 0.5 < float(last.split()[-4]) < 1
