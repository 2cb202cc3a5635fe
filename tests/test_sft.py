"""Imitation: which tokens are learnt from, on what schedule, and that it learns."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from nanorlhf import sft
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.sft import SFTConfig, held_out_loss, loss
from nanorlhf.support import loop
from nanorlhf.support.data import collate, encode
from nanorlhf.support.runlog import RunLog, read

V, EOS, PAD = 12, 10, 11
TINY = GPTConfig(vocab_size=V, n_positions=12, n_layer=1, n_head=2, n_embd=16)
ROWS = [([1, 2, 3, 4, EOS], 2), ([5, 6, EOS], 1), ([7, 8, 9, 1, 2, 3, EOS], 3), ([4, 4, 6, EOS], 2)]
CFG = SFTConfig(device="cpu", dtype="float32", batch_size=4, steps=60, warmup=5, learning_rate=1e-2)


class Letters:
    eos, pad = EOS, PAD

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


class Table:
    """A model that has learnt its logits by heart: (B, T, V), one row of them a position."""

    def __init__(self, B, T):
        self.logits = torch.zeros(B, T, V, requires_grad=True)

    def transformer(self, tokens):
        return self.logits

    def head(self, hidden):
        return hidden


def where_it_learns(rows):
    """The (row, position)s whose prediction the loss pulls at."""
    tokens, prompt_len, mask = collate(rows, PAD)
    table = Table(*tokens.shape)
    loss(table, tokens, prompt_len, mask).backward()
    gradient = table.logits.grad
    return gradient, {tuple(at) for at in gradient.abs().sum(-1).nonzero().tolist()}


# --- the loss ---


def test_only_the_response_is_learnt_and_its_end_with_it():
    gradient, places = where_it_learns(ROWS[:2])
    # Position t predicts token t + 1: [1 2 | 3 4 end] learns at its 2, 3, 4; [5 | 6 end] at 5, 6.
    assert places == {(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    pulled_up = {(r, t, gradient[r, t].argmin().item()) for r, t in places}
    assert pulled_up == {(0, 1, 3), (0, 2, 4), (0, 3, EOS), (1, 0, 6), (1, 1, EOS)}


def test_what_stands_in_the_prompt_is_no_target():
    one, other = ([1, 2, 3, EOS], 2), ([1, 9, 3, EOS], 2)  # the prompt's second token differs
    assert torch.equal(where_it_learns([one])[0], where_it_learns([other])[0])


def test_plain_text_is_learnt_from_its_first_token_to_its_end():
    rows = encode([{"prompt": "", "response": "abcdefg"}], Letters(), 5, Counter())
    found = [row[t + 1] for n, (row, _) in enumerate(rows) for t in sorted(
        t for r, t in where_it_learns(rows)[1] if r == n)]  # fmt: skip
    assert found == [0, 1, 2, 3, 4, 5, 6, EOS]


def test_a_model_that_knows_nothing_pays_ln_v_a_token():
    tokens, prompt_len, mask = collate(ROWS, PAD)
    found = loss(Table(*tokens.shape), tokens, prompt_len, mask)
    assert found.item() == pytest.approx(math.log(V))


def test_every_token_weighs_the_same_however_rows_are_batched():
    torch.manual_seed(0)
    model = GPT(TINY)
    whole = held_out_loss(model, ROWS, PAD, CFG)
    for size in 1, 3:
        for changes in dict(batch_size=size), dict(micro_batch_size=size):
            parts = held_out_loss(model, ROWS, PAD, dataclasses.replace(CFG, **changes))
            assert parts == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        assert whole == pytest.approx(loss(model, *collate(ROWS, PAD)).item(), rel=1e-5)


# --- the schedule ---


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [loop.cosine(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half-way down
    assert 0.1 <= rates[99] < 0.102
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_may_be_shorter_than_its_warm_up_or_have_none():
    assert loop.cosine(1, 2, 10) == pytest.approx(0.2)
    assert loop.cosine(0, 2, 0) == 1.0


def test_a_run_follows_that_schedule_in_every_group_of_weights():
    """Warm-up, then down: a run that kept its rate, or followed another one, would show here."""
    cfg, log = dataclasses.replace(CFG, steps=20), Notes()
    learn(cfg, log)
    expected = [cfg.learning_rate * loop.cosine(step, 20, 5) for step in range(20)]
    assert [row["lr"] for row in log.rows] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.12 * max(expected)


def test_biases_and_layernorms_are_not_decayed():
    model = GPT(TINY)
    decayed, free = sft.make_optimizer(model, CFG).param_groups
    assert decayed["weight_decay"] == CFG.weight_decay and free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# --- training ---


def diary(cfg):
    """A log with a folder if the test has given one; without, nothing is saved."""
    return RunLog(cfg.out if Path(cfg.out).is_absolute() else None)


def learn(cfg, log=None):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, dropout=cfg.dropout))
    summary = sft.train(model, ROWS, ROWS[:2], PAD, cfg, log or diary(cfg))
    return model, summary


def test_a_handful_of_rows_is_learnt_by_heart(tmp_path):
    _, summary = learn(dataclasses.replace(CFG, out=str(tmp_path)))
    assert summary["loss"] < 0.05
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["steps"] == 60 and summary["tokens"] == 60 * (5 + 3 + 7 + 4)


class Notes(RunLog):
    def write(self, step, **metrics):
        self.__dict__.setdefault("rows", []).append({k: float(x) for k, x in metrics.items()})


@pytest.mark.parametrize("size", [1, 3])
def test_how_the_rows_are_split_to_fit_into_memory_changes_nothing(size, tmp_path):
    """Rows differ in length, so that a mean of means would be another number."""
    found = []
    for micro_batch_size in 0, size:
        log = Notes()
        learn(dataclasses.replace(CFG, micro_batch_size=micro_batch_size, out=str(tmp_path)), log)
        found.append(log.rows)
    for whole, parts in zip(*found, strict=True):
        assert parts == pytest.approx(whole, rel=1e-3)


def same(a, b):
    weights = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in weights)


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    """With dropout and a batch size that does not divide the rows: dice and order go on, too."""
    cfg = dataclasses.replace(
        CFG, steps=10, save_every=4, batch_size=3, dropout=0.2, out=str(tmp_path)
    )
    model, summary = learn(cfg)
    with pytest.raises(KeyboardInterrupt):
        learn(cfg, Interrupted(tmp_path))
    again, summary_again = learn(dataclasses.replace(cfg, resume=True))
    assert summary == summary_again
    assert same(model, again)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    cfg = dataclasses.replace(CFG, steps=3, out=str(tmp_path))
    model, summary = learn(cfg)
    again, summary_again = learn(dataclasses.replace(cfg, resume=True))
    assert summary == summary_again
    assert same(model, again)


def test_a_run_that_is_taken_further_goes_on_at_the_rate_of_the_longer_run(tmp_path):
    short = dataclasses.replace(CFG, steps=4, warmup=1, out=str(tmp_path))
    learn(short, RunLog(tmp_path))
    long = dataclasses.replace(short, steps=7, resume=True)
    learn(long, RunLog(tmp_path))
    expected = [
        cfg.learning_rate * loop.cosine(step, cfg.steps, cfg.warmup)
        for step, cfg in enumerate([short] * 4 + [long] * 3)
    ]
    assert [row["lr"] for row in read(tmp_path)] == pytest.approx(expected, rel=1e-5)
    assert expected[3] < expected[4]  # it had nearly come to rest
