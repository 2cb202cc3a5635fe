"""From a person's labels to that person's model: agreement between people, whose labels are read,
and a reward model that goes on from another one."""

import dataclasses
import json
import math
import random
import sys

import pytest
import torch

import train_rm
from nanorlhf import environment, reward, tokenizer
from nanorlhf.experiments import study, taste
from nanorlhf.model import GPT, GPTConfig, ReadingGPT, ScalarGPT
from nanorlhf.people import agreement, label
from nanorlhf.support import UserError, data
from nanorlhf.support.config import run
from nanorlhf.support.runlog import RunLog, read
from nanorlhf.support.stats import interval, kappa


def labelled(pair, choice, annotator, again=False, **fields):
    """A line of a file of labels; the answers of each pair are " one" and " two"."""
    line = dict(showing=f"{pair}/{1 + again}/{annotator}", id=pair, prompt=f"prompt {pair}\n",
                first=" one", second=" two", choice=choice, repeat=again,
                annotator=annotator) | fields  # fmt: skip
    if choice in ("first", "second"):
        other = "second" if choice == "first" else "first"
        line |= dict(chosen=line[choice], rejected=line[other])
    return line


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# --- agreement ---


def test_kappa_by_hand():
    # Ten choices: 4 + 3 alike, 1 + 2 not. p = .7; e = .5 * .6 + .5 * .4 = .5
    first, second = list("aaaaabbbbb"), list("aaaabaabbb")
    low, high = interval(7, 10)
    assert kappa(first, second) == pytest.approx((0.4, 2 * low - 1, 2 * high - 1))
    assert kappa(second, first) == pytest.approx(kappa(first, second))


def test_what_is_alike_by_chance_is_what_strangers_agree_on():
    """Against its definition: each choice of the one meets every choice of the other."""
    rng = random.Random(0)
    for _ in range(20):
        first, second = ([rng.choice("aab") for _ in range(9)] for _ in range(2))
        second[0] = "c"  # a choice that the other never makes
        p = sum(a == b for a, b in zip(first, second, strict=True)) / 9
        e = sum(a == b for a in first for b in second) / 81
        assert kappa(first, second)[0] == pytest.approx((p - e) / (1 - e))


def test_kappa_at_its_ends():
    assert kappa("abab", "abab")[0] == 1 and kappa("abab", "baba")[0] == -1
    assert kappa("aabb", "abab")[0] == 0
    assert kappa("abcabc", "abcabc")[2] == pytest.approx(1)  # the upper end is not above 1
    assert all(map(math.isnan, kappa("aaa", "aaa")))  # chance alone makes them alike
    assert kappa("aaa", "aba")[0] == 0  # as one always says the same, the other agrees by chance


def said(paths, capsys):
    """What the program prints: {who: the line}"""
    agreement.main(agreement.AgreementConfig(data=paths))
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_two_people_are_compared_on_the_pairs_that_both_labelled(tmp_path, capsys):
    anna = [labelled(i, choice, "anna") for i, choice in
            enumerate(["first"] * 5 + ["second"] * 5 + ["tie", "skip"])]  # fmt: skip
    ben = [labelled(i, choice, "ben") for i, choice in
           enumerate(["first"] * 4 + ["second"] * 6 + ["both bad", "first", "first"])]  # fmt: skip
    # 4 + 5 alike, and a tie is a tie; the skip and the pair that anna never saw do not count.
    # Of 11 each: anna 5, 5, 1; ben 4, 6, 1. e = (20 + 30 + 1) / 121, kappa = (10/11 - e) / (1 - e)
    e, (low, high) = 51 / 121, interval(10, 11)
    expected = "10 of 11 pairs alike: 0.91 [{:.2f}, {:.2f}]; kappa {:.2f} [{:.2f}, {:.2f}]".format(
        low, high, *((p - e) / (1 - e) for p in (10 / 11, low, high)))  # fmt: skip
    files = [write(tmp_path / "a", anna), write(tmp_path / "b", ben)]
    assert said(files, capsys)["anna and ben"].strip() == expected
    both = write(tmp_path / "both", [line for two in zip(anna, ben) for line in two] + ben[-1:])
    assert said([both], capsys)["anna and ben"].strip() == expected


def test_everyone_is_compared_with_themselves_on_pairs_that_came_back(tmp_path, capsys):
    lines = [labelled(i, "first", "anna") for i in range(4)]
    lines += [labelled(0, "first", "anna", True), labelled(1, "second", "anna", True)]
    lines += [labelled(7, "first", "anna", True), labelled(0, "tie", "ben")]
    found = said([write(tmp_path / "l", lines)], capsys)
    assert found["anna again"].strip().startswith("1 of 2 pairs alike: 0.50 [0.09, 0.91]; kappa 0")
    assert found["ben again"].strip() == "no pair"
    assert found["anna and ben"].strip().startswith("0 of 1 pairs alike: 0.00")
    assert list(found) == ["anna and ben", "anna again", "ben again"]


def test_an_undone_label_agrees_with_nobody(tmp_path, capsys):
    lines = [labelled(i, "first", name) for i in range(2) for name in ("anna", "ben")]
    lines += [dict(showing="1/1/ben", choice="undo", annotator="ben")]
    assert "1 of 1 pairs alike" in said([write(tmp_path / "l", lines)], capsys)["anna and ben"]


@pytest.mark.parametrize("lines, message", [
    ([labelled(0, "skip", "anna")], "expected labels that are no skips, came none"),
    ([dict(prompt="a", chosen=" b", rejected=" c")], "x:1: expected a label, with id, annotator"),
    ([labelled(0, "maybe", "anna")], "x:1: expected a label, with id, annotator and choice"),
    ([{"showing": 1, "choice": ["first"]}], "x:1: expected a label"),
])  # fmt: skip
def test_a_file_of_no_labels_is_refused(lines, message, tmp_path, monkeypatch, capsys):
    write(tmp_path / "x", lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agreement", "--data", "x"])
    with pytest.raises(SystemExit) as end:
        run(agreement.main, agreement.AgreementConfig)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and message in errors, errors


# --- whose labels ---


def test_one_persons_labels_are_read_and_no_one_elses(tmp_path):
    lines = [labelled(i, "first", "anna") for i in range(4)]
    lines += [labelled(i, "second", "ben") for i in range(3)] + [labelled(9, "both bad", "ben")]
    path = write(tmp_path / "l", lines)
    anna, counts = data.preferences([path], "anna")
    assert [r["chosen"] for r in anna] == [" one"] * 4
    assert data.describe(counts) == "4 records; left out: 4 others' labels"
    ben, counts = data.preferences([path], "ben")
    assert [r["chosen"] for r in ben] == [" two"] * 3 and counts["ties"] == 1
    assert len(data.preferences([path])[0]) == 7
    with pytest.raises(UserError, match="expected a record of carl that is of use, came no r"):
        data.preferences([path], "carl")


# --- a reward model that goes on from another one ---


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An SFT model, and reward models with either head, untrained and of other weights."""
    folder = tmp_path_factory.mktemp("start")
    tok = tokenizer.learn(environment.prompts(50), 300)
    shape = GPTConfig(tok.vocab_size, 192, n_layer=1, n_head=2, n_embd=16)
    for seed, (name, kind) in enumerate(dict(sft=GPT, rm=ReadingGPT, scalar=ScalarGPT).items()):
        torch.manual_seed(seed)
        model = kind(shape)
        if name != "sft":
            model.score.weight.data *= 10  # else bfloat16 may give all samples one score
        model.save(folder / name, tok)
    lines = [labelled(i, "first", "anna", first=f" a {p}", second=f" the {p} end", prompt=p)
             for i, p in enumerate(environment.prompts(12))]  # fmt: skip
    lines += [labelled(0, "second", "ben"), labelled(1, "tie", "ben")]
    write(folder / "labels.jsonl", lines)
    return folder


def config(start, **settings):
    usual = dict(sft=f"{start}/sft", init=f"{start}/rm", max_new_tokens=8, device="cpu",
                 dtype="float32", data=[f"{start}/labels.jsonl"])  # fmt: skip
    return reward.RMConfig(**usual | settings)


@pytest.mark.parametrize("name", ["rm", "scalar"])
def test_it_starts_from_the_weights_of_the_folder(start, name):
    sft, tok = GPT.load(start / "sft"), tokenizer.load(start / "sft")
    model = reward.new_model(config(start, init=f"{start}/{name}"), sft, tok)
    saved, fresh = reward.load(start / name), reward.new_model(config(start, init=""), sft, tok)
    assert type(model) is type(saved)
    tokens = torch.randint(300, (4, 30))
    assert torch.equal(model(tokens), saved(tokens))
    assert not torch.equal(fresh(tokens), saved(tokens))


def test_a_head_that_the_folder_has_not_is_refused(start):
    sft, tok = GPT.load(start / "sft"), tokenizer.load(start / "sft")
    for head, name in ("scalar", "rm"), ("reading", "scalar"):
        with pytest.raises(UserError, match=f"--head: expected that of .*{name}, .* came {head}"):
            reward.new_model(config(start, head=head, init=f"{start}/{name}"), sft, tok)
        same = "reading" if head == "scalar" else "scalar"
        assert reward.new_model(config(start, head=same, init=f"{start}/{name}"), sft, tok)


@pytest.mark.parametrize("init, message", [
    ("nowhere", "nowhere is no checkpoint"),
    ("sft", "expected a reward model's score.weight"),
    ("other", "expected a reward model with the policy's vocabulary"),
])  # fmt: skip
def test_what_is_no_reward_model_for_this_policy_is_refused(start, init, message):
    other = tokenizer.learn(["the sea " * 50], 258)
    ScalarGPT(GPTConfig(other.vocab_size, 192, 1, 1, 8)).save(start / "other", other)
    sft, tok = GPT.load(start / "sft"), tokenizer.load(start / "sft")
    with pytest.raises(UserError, match=message):
        reward.new_model(config(start, init=f"{start}/{init}"), sft, tok)


def test_the_program_learns_from_one_persons_labels(start, tmp_path, monkeypatch):
    """Ben has one label that counts; Anna, who is as one-sided as can be, has twelve."""
    learnt_from, train = [], reward.train
    monkeypatch.setattr(
        reward, "train", lambda m, groups, *a: learnt_from.append(groups) or train(m, groups, *a)
    )
    train_rm.main(config(start, annotator="anna", out=str(tmp_path / "rm"), learning_rate=1e-3))
    assert data.pairs_in(learnt_from[0]) == 10  # two are held out
    assert len(list(read(tmp_path / "rm"))) == 100  # few labels are seen several times
    rows, chosen, rejected = data.flatten(learnt_from[0])
    before, after = (reward.score(reward.load(folder), *data.collate(rows, 0))
                     for folder in (start / "rm", tmp_path / "rm"))  # fmt: skip
    assert (after[chosen] > after[rejected]).sum() > (before[chosen] > before[rejected]).sum() + 2


@pytest.mark.filterwarnings("error")
def test_two_labels_are_few_and_end_without_a_warning(start, tmp_path):
    few = write(tmp_path / "few", [labelled(i, "first", "anna") for i in range(2)])
    train_rm.main(config(start, data=[few], out=str(tmp_path / "rm")))
    summary = json.loads((tmp_path / "rm" / "summary.json").read_text())
    assert summary["pairs"] == 1 and math.isfinite(summary["accuracy"])


def test_with_init_the_trunk_stays_and_the_whole_head_learns(start):
    sft, tok = GPT.load(start / "sft"), tokenizer.load(start / "sft")
    groups, _ = data.from_files([f"{start}/labels.jsonl"], tok, 192, "anna")
    for cfg in config(start), config(start, init="", head="reading"):
        model = reward.new_model(cfg, sft, tok)
        before = {name: w.clone() for name, w in model.named_parameters()}
        reward.train(model, groups, tok.pad, dataclasses.replace(cfg, steps=3), RunLog())
        moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
        head = {name for name in before if not name.startswith("transformer.")}
        assert moved >= {"score.weight", "match.weight", "offset"}
        assert moved <= head if cfg.init else not moved <= head


# --- the demonstration ---


def test_each_person_chooses_by_their_taste_on_the_page(start, tmp_path, monkeypatch):
    """Both see the same pairs of a dark and a bright story, and choose the opposite."""
    rng = random.Random(0)
    requests = [environment.Request(mood, "fox", "map", "barn") for mood in ("spooky", "silly")]
    pairs = [dict(id=f"{i:016x}", prompt=str(requests[i % 2]), first=first, second=second)
             for i in range(30)
             for first, second in [[environment.write(r, rng, 1) for r in requests]]]  # fmt: skip
    monkeypatch.setattr(label, "make_pairs", lambda *_: pairs)
    path = str(tmp_path / "labels.jsonl")
    for name in taste.PEOPLE:
        taste.click(label.LabelConfig(out=path, annotator=name, device="cpu"))
    vera, sunny = ([r["chosen"] for r in data.preferences([path], name)[0]]
                   for name in taste.PEOPLE)  # fmt: skip
    assert len(vera) == len(sunny) == 30
    assert sum(taste.darkness(story) > 0 for story in vera) >= 28
    assert sum(taste.darkness(story) < 0 for story in sunny) >= 28


def test_darkness_counts_each_word_once():
    assert taste.darkness(" The dark, Dark fox wept. It was pale and happy. A big joy.") == 3 - 2


def test_two_people_get_two_models_from_one_file(start, tmp_path):
    cfg = study.StudyConfig(sft=f"{start}/sft", rm=f"{start}/rm", out=str(tmp_path), prompts=64,
                            eval_prompts=2, steps=1, device="cpu", dtype="float32")  # fmt: skip
    rows = list(taste.run_all(cfg, 1, labels=6))
    assert [row["labels_of"] for row in rows] == ["(SFT)", "nobody", "vera", "sunny"]
    assert all({*row, "seed"} == {*taste.COLUMNS} for row in rows)
    shown = [json.loads(line) for line in (tmp_path / "1" / "labels.jsonl").open()]
    asked = [[r["id"] for r in shown if r["annotator"] == name] for name in taste.PEOPLE]
    assert asked[0] == asked[1] and len(asked[0]) == 6
    vera, sunny = (reward.load(tmp_path / "1" / f"{name}-rm") for name in taste.PEOPLE)
    assert not torch.equal(vera.score.weight, sunny.score.weight)
    policies = [GPT.load(tmp_path / "1" / name).transformer.ln_f.bias for name in taste.PEOPLE]
    assert not torch.equal(*policies)
