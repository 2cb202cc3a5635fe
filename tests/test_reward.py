"""From choices to numbers: the loss, where the score is read, the scale it has, what is learnt."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch

from nanorlhf import reward, tokenizer
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.reward import (
    RMConfig,
    bradley_terry_loss,
    by_model,
    load_for,
    normalise,
    report,
    score,
)
from nanorlhf.support import UserError, loop, user_code
from nanorlhf.support.data import by_prompt, collate, flatten, score_rows
from nanorlhf.support.runlog import RunLog
from nanorlhf.support.stats import accuracy_of, interval
from nanorlhf.support.user_code import by_text
from train_rm import calibration

TINY = GPTConfig(vocab_size=12, n_positions=16, n_layer=1, n_head=2, n_embd=16)
PAD = 11


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ScalarGPT(TINY).eval()


def scores_of(model, rows, **kwargs):
    return score_rows(by_model(model), rows, PAD, model.device, "float32", **kwargs)


def report_of(model, groups):
    return report(by_model(model), groups, PAD, model.device, "float32")


def some_rows(n, seed=0):
    """Rows of one prompt token and one to eight response tokens."""
    rng = random.Random(seed)
    return [([rng.randrange(11) for _ in range(rng.randint(2, 9))], 1) for _ in range(n)]


# --- the loss ---


def test_a_judge_who_knows_nothing_pays_ln_2():
    scores = torch.randn(5)
    assert bradley_terry_loss(scores, scores).item() == pytest.approx(math.log(2))


def test_the_loss_by_hand():
    # Margins ln 3 and -ln 7: probabilities 3/4 and 1/8 of what was chosen.
    loss = bradley_terry_loss(torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 7.0]).log())
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 8)) / 2)


def test_only_differences_count():
    chosen, rejected = torch.randn(2, 6)
    shifted = bradley_terry_loss(chosen + 100, rejected + 100)
    assert shifted.item() == pytest.approx(bradley_terry_loss(chosen, rejected).item(), abs=1e-4)


def test_a_hopeless_margin_costs_much_and_not_infinity():
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4


# --- where the score is read ---


def test_the_score_is_read_at_the_last_response_token(model):
    rows = [([1, 2, 3, 4, 5], 2), ([6, 7], 1), ([8, 9, 10], 1)]
    tokens, prompt_len, mask = collate(rows, PAD)
    everywhere = model(tokens)
    expected = torch.stack([everywhere[0, 4], everywhere[1, 1], everywhere[2, 2]])
    assert torch.equal(score(model, tokens, prompt_len, mask), expected)
    assert torch.equal(by_model(model)(tokens, prompt_len, mask), expected)


def test_a_score_does_not_depend_on_padding_or_on_who_shares_the_batch(model):
    rows = some_rows(20)
    together = score(model, *collate(rows, PAD))
    other_pad = score(model, *collate(rows, 0))
    alone = torch.cat([score(model, *collate([row], PAD)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, other_pad, atol=1e-6)
    threes = scores_of(model, rows, batch_size=3)
    assert torch.allclose(threes, together, atol=1e-5)


# --- comparisons ---

A, B, C, D = ([1, 2, 5], 2), ([1, 2, 6, 7], 2), ([1, 2, 8], 2), ([3, 9], 1)


def test_by_prompt_keeps_each_response_once():
    groups = by_prompt([(A, B), (D, ([3, 10], 1)), (C, A), (B, C)])
    assert groups == [
        ([A, B, C], [(0, 1), (2, 0), (1, 2)]),
        ([D, ([3, 10], 1)], [(0, 1)]),
    ]


def test_a_prompt_of_many_pairs_fills_several_groups():
    """Files may have one prompt for all pairs; in one group they would all be in one batch."""
    pairs = [(([1, 2, n], 2), ([1, 2, n + 1], 2)) for n in range(3, 22)]
    groups = by_prompt([*pairs, (D, ([3, 10], 1))])
    assert [len(compared) for _, compared in groups] == [8, 8, 3, 1]
    assert [(rows[i], rows[j]) for rows, compared in groups for i, j in compared][:19] == pairs


def test_the_same_tokens_after_another_prompt_are_another_response():
    """[1 | 2 5] and [1 2 | 5] hold the same tokens, and begin elsewhere."""
    assert len(by_prompt([(A, B), (([1, 2, 5], 1), ([1, 4], 1))])) == 2


def test_flatten_finds_the_pairs_again_in_one_batch():
    pairs = [(A, B), (D, ([3, 10], 1)), (C, A), (B, C)]
    rows, chosen, rejected = flatten(by_prompt(pairs))
    assert len(rows) == 5  # each response once, and all of them in one batch
    found = {repr((rows[i], rows[j])) for i, j in zip(chosen, rejected, strict=True)}
    assert len(chosen) == 4 and found == set(map(repr, pairs))


# --- after training: shift and scale ---


def test_normalised_scores_have_mean_0_and_deviation_1_also_after_loading(model, tmp_path):
    rows = some_rows(100)
    before = scores_of(model, rows)
    mean, std = normalise(model, rows, PAD, "float32")
    after = scores_of(model, rows)
    assert (mean, std) == (pytest.approx(before.mean().item()), pytest.approx(before.std().item()))
    assert after.mean().abs() < 1e-4 and after.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(after, (before - mean) / std, atol=1e-4)

    model.save(tmp_path, reward_mean=mean, reward_std=std)
    assert torch.equal(scores_of(reward.load(tmp_path), rows), after)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == (mean, std)


# --- loading ---


def saved(folder, model, *texts):
    tok = tokenizer.learn(texts, 300)
    tok.save(folder)
    model.save(folder)
    return tok


def test_a_language_model_in_the_place_of_a_reward_model_is_refused(tmp_path):
    GPT(TINY).save(tmp_path)
    with pytest.raises(UserError, match="a reward model's score.weight, .* no such weight"):
        reward.load(tmp_path)


def test_a_reward_model_must_share_the_policys_vocabulary(tmp_path, model):
    tok = saved(tmp_path / "rm", model, "see the sea " * 9)
    policy = GPT(TINY)
    assert torch.equal(load_for(tmp_path / "rm", policy, tok).score.weight, model.score.weight)
    other = tokenizer.learn(["a tea at the estate " * 9], 300)
    assert other.ranks != tok.ranks
    with pytest.raises(UserError, match="rm: expected a reward model with the policy's vocabulary"):
        load_for(tmp_path / "rm", policy, other)


def test_a_reward_model_must_read_as_far_as_the_policy_writes(tmp_path, model):
    tok = saved(tmp_path, model, "see the sea " * 9)
    policy = GPT(dataclasses.replace(TINY, n_positions=17))
    with pytest.raises(UserError, match="reads 17 tokens as the policy does, came one of 16"):
        load_for(tmp_path, policy, tok)


# --- how good is it? ---


def test_a_model_that_says_the_same_of_everything_cannot_be_normalised(model):
    with torch.no_grad():
        model.score.weight.zero_()
    with pytest.raises(UserError, match="gives 0 to every response"):
        normalise(model, [([1, 2, 9], 1), ([3, 4, 9], 2)], PAD, "float32")


def test_calibration_by_hand():
    odds = torch.tensor([3.0, 3.0, 1 / 3, 3.0, 19.0, 19.0])  # 75 % sure four times, 95 % twice
    table = calibration(odds.log(), bins=2)
    assert [(round(said, 4), round(true, 4), n) for said, true, n in table] == [
        (pytest.approx((0.75 * 4 + 0.95 * 2) / 6, abs=1e-4), pytest.approx(5 / 6, abs=1e-4), 6)
    ]
    table = calibration(odds.log(), bins=5)
    assert [n for _, _, n in table] == [4, 2]
    assert table[0][:2] == (pytest.approx(0.75), pytest.approx(0.75))  # true to its word
    assert table[1][:2] == (pytest.approx(0.95), pytest.approx(1.0))


def test_calibration_loses_no_pair():
    margin = torch.cat([torch.randn(500) * 3, torch.tensor([0.0, 100.0, -100.0])])
    assert sum(n for _, _, n in calibration(margin)) == 503


def test_interval_by_hand():
    # Wilson's for 8 of 10, as in any table of it.
    assert interval(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    low, high = interval(0, 10)
    assert low == pytest.approx(0, abs=1e-9) and 0.2 < high < 0.3
    assert interval(500, 1000)[1] - interval(500, 1000)[0] == pytest.approx(0.062, abs=1e-3)


def test_an_interval_holds_the_truth_nineteen_times_in_twenty():
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        low, high = interval(sum(rng.random() < 0.8 for _ in range(50)), 50)
        held += low <= 0.8 <= high
    assert 930 <= held <= 975


def one_pair_each(pairs):
    """Each pair (chosen, rejected) as a group of its own."""
    return [(list(pair), [(0, 1)]) for pair in pairs]


def test_the_report_counts_what_the_scores_say(model):
    pairs = list(zip(some_rows(40, 1), some_rows(40, 2), strict=True))
    found, margin = report_of(model, one_pair_each(pairs))
    chosen, rejected = (scores_of(model, list(side)) for side in zip(*pairs, strict=True))
    right = (chosen > rejected).sum().item()
    assert 5 < right < 35  # or it would show little
    assert found["accuracy"] == pytest.approx(right / 40) and found["pairs"] == 40
    assert (found["accuracy_low"], found["accuracy_high"]) == interval(right, 40)
    assert found["held_out_loss"] == pytest.approx(bradley_terry_loss(chosen, rejected).item())
    assert torch.allclose(margin, chosen.double() - rejected.double(), atol=1e-6)


def test_a_report_of_pairs_of_equal_length_says_nothing_of_length(model):
    found, _ = report_of(model, one_pair_each([(([1, 2], 1), ([1, 3], 1))] * 4))
    assert found["length_accuracy"] == 0.5


def test_length_alone_is_judged_from_the_side_that_is_right_more_often(model):
    """Here the shorter response is chosen three times, the longer one once, and one is a tie."""
    short, long, same = ([1, 2], 1), ([1, 2, 3], 1), ([1, 3], 1)
    pairs = [(short, long)] * 3 + [(long, short), (short, same)]
    found, _ = report_of(model, one_pair_each(pairs))
    assert found["length_accuracy"] == pytest.approx(3.5 / 5)


# --- a tie is half right: a model that says nothing is no better and no worse than a coin ---


def test_a_tie_is_half_right_by_hand():
    assert accuracy_of(torch.tensor([2.0, 0.0, -1.0, 0.0, 0.5])).item() == pytest.approx(3 / 5)


def test_a_model_that_gives_every_response_the_same_score_is_half_right(model):
    with torch.no_grad():
        model.score.weight.zero_()
    pairs = zip(some_rows(40, 1), some_rows(40, 2), strict=True)
    found, margin = report_of(model, one_pair_each(pairs))
    assert found["accuracy"] == 0.5
    assert (found["accuracy_low"], found["accuracy_high"]) == interval(20, 40)
    # Of every pair it says one half, and half of the pairs come true: it is calibrated.
    assert calibration(margin) == [(0.5, 0.5, 40)]


def test_in_the_calibration_a_tie_is_half_true():
    # In the lowest bin: two ties, and one pair that is right at 51 %.
    [(said, true, n)] = calibration(torch.tensor([0.0, 0.0, math.log(0.51 / 0.49)]))
    assert said == pytest.approx((0.5 + 0.5 + 0.51) / 3)
    assert (true, n) == (pytest.approx((0.5 + 0.5 + 1) / 3), 3)


def test_in_the_log_of_training_a_tie_is_half_right():
    """A response is compared with itself: whatever the model learns, that is a tie."""
    groups, log = [([([1, 2, 3, 9], 1)], [(0, 0)])] * 8, Notes()
    torch.manual_seed(0)
    reward.train(ScalarGPT(TINY), groups, PAD, dataclasses.replace(CFG, steps=2), log)
    assert [row["accuracy"] for row in log.rows] == [0.5, 0.5]


# --- it learns ---


def toy_comparisons(n, seed):
    """Three responses a prompt, compared each with each: the more 3s, the better."""
    rng, groups = random.Random(seed), []
    for _ in range(n):
        prompt = [rng.randrange(11), rng.randrange(11)]
        rows = [(prompt + [3] * k + [5] * (4 - k) + [9], 2) for k in rng.sample(range(5), 3)]
        order = sorted(range(3), key=lambda i: -rows[i][0].count(3))
        groups.append((rows, [(order[0], order[1]), (order[0], order[2]), (order[1], order[2])]))
    return groups


def diary(cfg):
    """A log with a folder if the test has given one; without, nothing is saved."""
    return RunLog(cfg.out if Path(cfg.out).is_absolute() else None)


def learn(cfg, log=None):
    torch.manual_seed(0)
    model = ScalarGPT(dataclasses.replace(TINY, dropout=0.1))  # dropout, so that dice are thrown
    summary = reward.train(model, toy_comparisons(200, 1), PAD, cfg, log or diary(cfg))
    return model, summary


CFG = RMConfig(device="cpu", dtype="float32", batch_size=4, learning_rate=3e-3)


def test_it_learns_a_known_order():
    model, summary = learn(CFG)
    assert summary["steps"] == 100  # 200 prompts are few: two passes, four an update
    assert report_of(model, toy_comparisons(100, 2))[0]["accuracy"] > 0.95
    ladder = [([1, 2] + [3] * k + [5] * (4 - k) + [9], 2) for k in range(5)]
    scores = scores_of(model, ladder)
    assert scores.tolist() == sorted(scores.tolist())


def test_a_trained_reward_model_throws_no_dice():
    model, _ = learn(dataclasses.replace(CFG, steps=1))
    assert not any(module.training for module in model.modules())


class Notes(RunLog):
    def write(self, step, **metrics):
        self.__dict__.setdefault("rows", []).append({k: float(x) for k, x in metrics.items()})


def test_the_rate_rises_and_then_falls_to_zero_and_the_heads_is_ten_times_as_high(monkeypatch):
    """A run that kept its rate after the warm-up would show here."""
    made, rates, real = [], [], loop.adamw
    monkeypatch.setattr(loop, "adamw", lambda *a, **k: made.append(real(*a, **k)) or made[-1])

    class Rates(RunLog):
        def write(self, step, **metrics):
            rates.append([group["lr"] for group in made[0].param_groups])

    learn(dataclasses.replace(CFG, steps=60), Rates())
    head, trunk = zip(*rates, strict=True)
    expected = [CFG.learning_rate * min((step + 1) / 20, 1 - step / 60) for step in range(60)]
    assert trunk == pytest.approx(expected, rel=1e-6)
    assert head == pytest.approx([10 * rate for rate in expected], rel=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_how_the_prompts_are_split_to_fit_into_memory_changes_nothing(size):
    """Prompts differ in their comparisons, so that a mean of means would be another number."""
    groups = [(rows, wins[: 1 + i % 3]) for i, (rows, wins) in enumerate(toy_comparisons(12, 1))]
    found = []
    for micro_batch_size in 0, size:
        torch.manual_seed(0)
        model, log = ScalarGPT(TINY), Notes()
        cfg = dataclasses.replace(CFG, micro_batch_size=micro_batch_size, steps=3)
        reward.train(model, groups, PAD, cfg, log)
        found.append((model, log.rows))
    for whole, parts in zip(*(rows for _, rows in found), strict=True):
        assert parts == pytest.approx(whole, abs=1e-4)


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    cfg = dataclasses.replace(CFG, steps=9, save_every=5, out=str(tmp_path))
    model, summary = learn(cfg)
    with pytest.raises(KeyboardInterrupt):
        learn(cfg, Interrupted(tmp_path))
    again, summary_again = learn(dataclasses.replace(cfg, resume=True))
    assert summary == summary_again and summary["steps"] == 9
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


# --- scores for PPO ---


class Letters:
    """a is 1, b is 2, ...; 9 ends a text."""

    eos, pad = 9, PAD

    def decode(self, tokens):
        return "".join(chr(ord("a") - 1 + t) for t in tokens if t not in (self.eos, self.pad))


def test_a_function_of_texts_sees_the_prompt_and_the_response_without_its_end():
    seen = []

    def count(pairs):
        seen.extend(pairs)
        return [len(response) for _, response in pairs]

    rows = [([1, 2, 3, 4, 9], 2), ([5, 6], 1), ([7, 9], 1), ([1, 2, 3, 4, 5], 4)]
    scores = by_text(count, Letters())(*collate(rows, PAD))
    assert seen == [("ab", "cd"), ("e", "f"), ("g", ""), ("abcd", "e")]
    assert scores.tolist() == [2.0, 1.0, 0.0, 1.0] and scores.dtype == torch.float32


PAIRS = [("Hello?", "Hi."), ("Bye?", "No.")]


@pytest.mark.parametrize(
    "returned", [[1.0], [1.0, 2.0, 3.0], None, 1.0, "ok", ["good", "bad"], torch.ones(2, 2)]
)
def test_a_function_that_returns_something_else_is_told_what_was_expected(returned):
    with pytest.raises(UserError, match="must return 2 finite numbers.* it returned "):
        user_code.call(lambda pairs: returned, PAIRS)


@pytest.mark.parametrize("returned", [[1.0, math.nan], torch.tensor([0, -math.inf])])
def test_a_function_that_has_no_number_for_a_response_is_told_which(returned):
    with pytest.raises(UserError, match=r"returned (nan|-inf) for 'No.', said to 'Bye\?'"):
        user_code.call(lambda pairs: returned, PAIRS)


def test_numbers_of_every_kind_are_scores():
    returned = [1, True, torch.tensor(0.5)]
    assert user_code.call(lambda pairs: returned, [("", "")] * 3) == [1.0, 1.0, 0.5]


def test_a_function_that_raises_shows_its_own_traceback_and_then_a_sentence(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(pairs):\n    return pairs[0] / 0  # oh\n")
    function = user_code.load(f"{tmp_path}/mine.py:score")
    with pytest.raises(UserError, match="the reward function raised TypeError, see above: unsup"):
        by_text(function, Letters())(*collate([([1, 2], 1)], PAD))
    shown = capsys.readouterr().err
    assert "return pairs[0] / 0  # oh" in shown and "nanorlhf" not in shown


def test_a_file_that_cannot_be_imported_shows_its_own_traceback_and_then_a_sentence(
    tmp_path, capsys
):
    (tmp_path / "mine.py").write_text("import no_such_module  # oh\n")
    with pytest.raises(UserError, match="mine.py raised ModuleNotFoundError, see above: No mod"):
        user_code.load(f"{tmp_path}/mine.py:score")
    assert "import no_such_module  # oh" in capsys.readouterr().err


def test_a_function_of_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def score(pairs):\n    return [1.5] * len(pairs)\n\nx = 3\n")
    assert user_code.load(f"{tmp_path}/mine.py:score")([("p", "r")]) == [1.5]
    for name in "missing", "x":
        with pytest.raises(UserError, match=f"mine.py has no function '{name}'"):
            user_code.load(f"{tmp_path}/mine.py:{name}")


@pytest.mark.parametrize("name", ["gold", "nowhere.py:score", ":score"])
def test_a_reward_that_is_nowhere(name):
    with pytest.raises(UserError, match=f"expected rm, env or FILE.py:FUNCTION, got {name}"):
        user_code.load(name)
