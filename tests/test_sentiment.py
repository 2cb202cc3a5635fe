"""The study of film reviews: no judge sees what trains, and each counts what it says it counts."""

import json
import math
import zipfile

import pytest

from nanorlhf import reward, sft
from nanorlhf.experiments import sentiment
from nanorlhf.experiments.sentiment import labelled, logistic_regression, naive_bayes, pairs
from nanorlhf.support import UserError

GOOD, BAD = ["fine", "warm", "funny", "lovely"], ["dull", "cold", "silly", "tedious"]


def sentence(words, i):
    first = ["the", "a", "this"][i % 3]
    return f"{first} film number {i} is {words[i % 4]} and {words[i // 4 % 4]} ."


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("reviews") / "sentence_polarity.zip"
    with zipfile.ZipFile(path, "w") as file:
        for end, words in ("pos", GOOD), ("neg", BAD):
            text = "\n".join([*(sentence(words, i) for i in range(80)), "too short", ""])
            file.writestr(f"sentence_polarity/rt-polarity.{end}", text)
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_trains_and_what_judges_have_no_sentence_in_common(reviews, tmp_path):
    training, judges = labelled(reviews)
    assert len(training) + len(judges) == 160 and 70 < len(training) < 125
    cfg = sentiment.SentimentConfig(data=reviews, out=str(tmp_path), vocab_size=300)
    sentiment.main(cfg)
    ours, theirs = ({text for text, _ in part} for part in (training, judges))
    whole = lambda name: {r["prompt"] + r["response"] for r in read(tmp_path / name)}  # noqa: E731
    assert whole("sentences.jsonl") == ours and whole("second.jsonl") == theirs
    label = dict(training)
    records = read(tmp_path / "pairs.jsonl")
    assert len(records) > 50
    for r in records:
        chosen, rejected = r["prompt"] + r["chosen"], r["prompt"] + r["rejected"]
        assert label[chosen] and not label[rejected]
        assert chosen.split()[0] == rejected.split()[0] == r["prompt"]


def test_a_positive_sentence_is_in_at_most_so_many_pairs(reviews):
    import random

    training, _ = labelled(reviews)
    records = pairs(training, random.Random(0), 2)
    often = [sum(r["chosen"] == other["chosen"] for other in records) for r in records]
    assert set(often) == {2}


def test_naive_bayes_adds_up_the_logarithms_of_how_much_more_often_each_word_occurs():
    classify = naive_bayes([("so good", True), ("good", True), ("so bad", False)])
    # Words and pairs: so, good, (so good), good | so, bad, (so bad). Five are known.
    weight = lambda pos, neg: math.log((pos + 1) / (4 + 5)) - math.log((neg + 1) / (3 + 5))  # noqa: E731
    assert classify("good") == pytest.approx(weight(2, 0))
    assert classify("so bad") == pytest.approx(weight(1, 1) + weight(0, 1) + weight(0, 1))
    assert classify("unknown") == 0 and classify("good good") > 0 > classify("bad")


def test_logistic_regression_learns_which_words_decide(reviews):
    training, judges = labelled(reviews)
    classify = logistic_regression(training)
    assert sentiment.accuracy(classify, judges) == 1
    assert classify("warm") > 0 > classify("dull") and abs(classify("film")) < 0.1


def test_the_judgement_of_tiny_models_has_all_its_figures(reviews, tmp_path, monkeypatch):
    import train_rm
    import train_sft

    monkeypatch.setattr("sys.argv", ["x"])
    out, small = str(tmp_path), dict(device="cpu", dtype="float32", steps=4, batch_size=8)
    cfg = sentiment.SentimentConfig(data=reviews, out=f"{out}/files", vocab_size=300)
    sentiment.main(cfg)
    for name, file in ("sft", "sentences"), ("second", "second"):
        train_sft.main(sft.SFTConfig(
            data=[f"{out}/files/{file}.jsonl"], tokenizer=f"{out}/files/tokenizer", n_layer=1,
            n_embd=32, block_size=128, out=f"{out}/{name}", **small))
    train_rm.main(reward.RMConfig(data=[f"{out}/files/pairs.jsonl"], sft=f"{out}/sft",
                                  max_new_tokens=8, out=f"{out}/rm", **small))
    sentiment.main(sentiment.SentimentConfig(
        data=reviews, policy=f"{out}/sft", against=f"{out}/sft", judge=f"{out}/rm",
        second=f"{out}/second", prompts=30, max_new_tokens=12, out=f"{out}/judged", device="cpu"))
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert summary["judge_accuracy"] == summary["words_accuracy"] == 1
    assert summary["positive_before"] == summary["positive_after"]       # one model, one seed
    assert 0.3 < summary["positive_people"] < 0.7
    # The second model knows little more than that there are 300 tokens.
    assert 200 < summary["perplexity_people"] < 600
    assert summary["perplexity_before"] == summary["perplexity_after"]
    assert (tmp_path / "judged" / "samples.md").read_text().count("**after**") == 20


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_another_file_ends_in_one_sentence(content, tmp_path):
    path = tmp_path / "x.zip"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match="x.zip: expected sentence_polarity.zip of nltk_data"):
        labelled(str(path))
