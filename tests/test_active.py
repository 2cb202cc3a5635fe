"""Which pairs are labelled next: those on which an ensemble of reward models disagrees most."""

import math
import random
from statistics import stdev

import pytest
import torch

from nanorlhf import environment, reward, tokenizer
from nanorlhf.experiments import active, study
from nanorlhf.model import GPT, GPTConfig, load_policy
from nanorlhf.people import label
from nanorlhf.people.label import LabelConfig
from nanorlhf.support import UserError, user_code
from nanorlhf.support.stats import disagreement


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_disagreement_is_the_deviation_of_the_probabilities():
    margins = torch.tensor([[1.0, 9.0, -2.0], [1.0, 5.0, 2.0], [1.0, 7.0, 0.0]])
    by_hand = [0.0, stdev(map(sigmoid, (9, 5, 7))), stdev(map(sigmoid, (-2, 2, 0)))]
    assert disagreement(margins).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_which_answer_is_called_the_first_does_not_matter():
    margins = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(disagreement(margins), disagreement(-margins), atol=1e-6)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The smallest SFT model of the built-in world, untrained."""
    folder = tmp_path_factory.mktemp("start") / "sft"
    texts = [r["prompt"] + r["response"] for r in environment.demonstrations(100)]
    tok = tokenizer.learn(texts, 300)
    torch.manual_seed(0)
    GPT(GPTConfig(tok.vocab_size, 192, n_layer=1, n_head=1, n_embd=8)).save(folder, tok)
    return str(folder)


def judge(sign, tok):
    """By length; of the two judges one likes and one hates it. Theirs is the dispute of a pair."""
    return user_code.by_text(lambda pairs: [sign * len(a) / 100 for _, a in pairs], tok)


def gap(one, other):
    return abs(len(one) - len(other))


# --- the study ---


def in_this_process(jobs, *_):
    return [row for job in jobs.values() for row in job()]


@pytest.fixture
def small(start, tmp_path, monkeypatch):
    monkeypatch.setattr(active, "LABELS", (4, 8, 16))
    monkeypatch.setattr(active, "MODELS", 2)
    monkeypatch.setattr(study, "carry_out", in_this_process)
    return study.StudyConfig(seeds=2, prompts=40, eval_prompts=10, steps=2, sft=start,
                             out=str(tmp_path), device="cpu", dtype="float32")  # fmt: skip


def test_both_rules_at_every_number_of_labels(small, tmp_path, capsys, monkeypatch):
    rows = []

    def carry_out(*args):
        rows.extend(in_this_process(*args))
        return rows

    monkeypatch.setattr(study, "carry_out", carry_out)
    active.active(small)
    settings = [(row["rule"], row["labels"]) for row in rows]
    assert settings == 2 * [(rule, n) for rule in active.RULES for n in (4, 8, 16)]
    assert all(0 <= row[name] <= 1 for row in rows for name in active.COLUMNS[3:])
    for seed in 1, 2:
        first = [{**row, "rule": ""} for row in rows if (row["seed"], row["labels"]) == (seed, 4)]
        assert first[0] == first[1]  # both rules start from the same labels and models
    printed = capsys.readouterr().out
    assert "16 labels: disagreement - random" in printed
    assert (tmp_path / "active.png").read_bytes().startswith(b"\x89PNG")


def test_the_pairs_of_largest_disagreement_are_labelled_next(small, start, monkeypatch):
    tok, learnt = tokenizer.load(start), []

    def train_ensemble(groups, *_):
        learnt.append(groups)
        return 1, -1

    monkeypatch.setattr(active, "train_ensemble", train_ensemble)
    monkeypatch.setattr(reward, "by_model", lambda sign: judge(sign, tok))
    pool, compare = [], reward.compare_samples

    def kept(*args, held_out):
        groups, ceiling = compare(*args, held_out=held_out)
        pool.extend([] if held_out else groups)
        return groups, ceiling

    monkeypatch.setattr(reward, "compare_samples", kept)
    list(active.label_in_rounds(small, 1))

    def dispute(group):
        return gap(*(tok.decode(tokens[n:]) for tokens, n in group[0]))

    order = random.Random(1).sample(range(40), 40)
    assert learnt[0] == [pool[i] for i in order[:4]]
    assert learnt[1:3] == [[pool[i] for i in order[:n]] for n in (8, 16)]  # at random
    rest = sorted((pool[i] for i in order[4:]), key=dispute, reverse=True)
    for groups, n in zip(learnt[3:], (8, 16), strict=True):
        assert groups[:4] == learnt[0] and len(groups) == n
        assert sorted(map(dispute, groups[4:])) == sorted(map(dispute, rest[:n - 4]))


def test_the_members_of_an_ensemble_differ(small, start):
    stage = reward.RMConfig(sft=start, steps=3, batch_size=2, device="cpu", dtype="float32")
    sft, tok = load_policy(start, torch.device("cpu"))
    groups = [([([1, 2, 3 + i], 1), ([1, 4], 1)], [(0, 1)]) for i in range(8)]
    one, other = active.train_ensemble(groups, stage, sft, tok)
    assert not torch.equal(one.score.weight, other.score.weight)
    again, _ = active.train_ensemble(groups, stage, sft, tok)
    assert torch.equal(one.score.weight, again.score.weight)


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="--prompts: expected 800 or more.*came 799"):
        active.active(study.StudyConfig(prompts=799))


# --- the page ---


def test_the_page_shows_the_pairs_that_reward_models_dispute(start, monkeypatch):
    tok = tokenizer.load(start)
    monkeypatch.setattr(reward, "load_for", lambda name, *_: dict(likes=1, hates=-1)[name])
    monkeypatch.setattr(reward, "by_model", lambda sign: judge(sign, tok))
    settings = dict(policy=start, max_new_tokens=20, device="cpu")
    cfg = LabelConfig(prompts=3, active=["likes", "hates"], **settings)
    every = label.make_pairs(LabelConfig(prompts=30, **settings), torch.device("cpu"))
    every.sort(key=lambda pair: -gap(pair["first"], pair["second"]))
    found = label.make_pairs(cfg, torch.device("cpu"))
    gaps = [gap(pair["first"], pair["second"]) for pair in found]
    assert gaps == [gap(pair["first"], pair["second"]) for pair in every[:3]] and gaps[2] > 0
    assert all(pair in every for pair in found)


@pytest.mark.parametrize("settings", [dict(active=["a"]), dict(active=["a", "b"], against="c")])
def test_one_model_cannot_disagree_and_a_win_rate_needs_chance(settings):
    with pytest.raises(UserError, match="--active: expected two reward models or more.*came a"):
        label.make_pairs(LabelConfig(**settings), torch.device("cpu"))
