"""Did it help? Counting wins, reading people's choices, and what a response is like."""

import dataclasses
import json
import math

import pytest
import torch

from nanorlhf import environment, evaluate, generate, tokenizer
from nanorlhf.evaluate import (
    EvaluateConfig,
    compare,
    describe,
    held_out_prompts,
)
from nanorlhf.generate import generate_rows, generate_texts
from nanorlhf.logprobs import response_logprobs
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.reward import true_reward
from nanorlhf.support import UserError, data
from nanorlhf.support.data import choices, score_rows
from nanorlhf.support.stats import distinct, win_rate

CFG = EvaluateConfig(device="cpu", dtype="float32", max_new_tokens=12)


@pytest.fixture(scope="module")
def tok():
    return tokenizer.learn(environment.prompts(50), 300)


def make_model(tok, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(tok.vocab_size, n_positions=96, n_layer=1, n_head=2, n_embd=16)).eval()


# --- who wins ---


def test_a_tie_is_half_a_win():
    rate, low, high = win_rate([1, 2, 3, 4], [1, 1, 4, 0])  # a tie, a win, a loss, a win
    assert rate == 2.5 / 4 and low < rate < high


def test_a_model_against_itself_wins_half():
    assert win_rate([1.0, 2.0], [1.0, 2.0])[0] == 0.5


def test_more_prompts_say_it_more_surely():
    widths = [high - low for _, low, high in (win_rate([1, 0] * n, [0, 1] * n) for n in (10, 1000))]
    assert widths[0] > 0.35 and widths[1] < 0.05


def test_scores_of_different_prompts_cannot_be_compared():
    with pytest.raises(ValueError):
        win_rate([1, 2, 3], [1, 2])


# --- what people chose ---


def write_choices(path, *words):
    path.write_text("".join(json.dumps(dict(prompt="p", first="a", second="b", choice=w)) + "\n"
                            for w in words))  # fmt: skip
    return path


def test_choices_of_people_are_wins_ties_and_losses(tmp_path):
    path = write_choices(tmp_path / "c.jsonl", "first", "tie", "second", "first")
    first, second, whose = choices(path)
    assert whose == "the first against the second"
    assert [a - b for a, b in zip(first, second, strict=True)] == [1, 0, -1, 1]
    assert win_rate(first, second)[0] == 2.5 / 4


def test_a_choice_of_neither_kind_is_named_by_line(tmp_path):
    path = write_choices(tmp_path / "c.jsonl", "first", "left")
    with pytest.raises(UserError, match=r"c.jsonl:2: .*second, tie or both bad, came 'left'"):
        choices(path)
    for line, came in ('{"prompt": "p"}', "None"), ('{"choice": ["tie"]}', r"\['tie'\]"):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=f"c.jsonl:1: .*came {came}$"):
            choices(path)


# --- what a response is like ---


def test_distinct_by_hand():
    texts = ["the fox the fox", "a fox"]
    assert distinct(texts, 1) == 3 / 6  # the, fox, a
    assert distinct(texts, 2) == 3 / 4  # the fox, fox the, a fox
    assert distinct(["same"] * 10, 1) == 0.1
    assert distinct(["", "one"], 2) == 0


def test_a_model_is_no_nats_away_from_itself(tok):
    model, other = make_model(tok), make_model(tok, seed=1)
    rows = generate_rows(model, [[1, 2], [3], [4, 5, 6]], 12, tok.eos, tok.pad)
    assert describe(model, model, rows, tok, CFG)["kl"] == 0
    found = describe(model, other, rows, tok, CFG)
    tokens, prompt_len, mask = data.collate(rows, tok.pad)
    with torch.no_grad():
        said, other_said = (
            response_logprobs(m, tokens, prompt_len, mask.shape[1]) for m in (model, other)
        )
    assert found["kl"] == pytest.approx(((said - other_said) * mask).sum().item() / 3, rel=1e-4)
    assert found["response_len"] == sum(len(tokens) - n for tokens, n in rows) / 3


def test_perplexity_of_a_reference_that_knows_nothing_is_the_size_of_the_vocabulary(tok):
    model, ignorant = make_model(tok), make_model(tok)
    ignorant.transformer.wte.weight.data.zero_()
    rows = generate_rows(model, [[1, 2], [3]], 12, tok.eos, tok.pad)
    found = describe(model, ignorant, rows, tok, CFG)
    assert found["perplexity"] == pytest.approx(tok.vocab_size, rel=1e-4)


def test_padding_is_no_part_of_what_a_response_is_like(tok):
    model, other = make_model(tok), make_model(tok, seed=1)
    rows = [([1, 2, 3, 4, 5, tok.eos], 2), ([6, tok.eos], 1)]

    def sums(rows):
        found = describe(model, other, rows, tok, CFG)
        surprise = math.log(found["perplexity"]) * found["response_len"]
        return torch.tensor([found["kl"], found["response_len"], surprise]) * len(rows)

    assert torch.allclose(sums(rows), sums(rows[:1]) + sums(rows[1:]), atol=1e-5)


# --- responding ---


def test_many_batches_keep_the_order(tok):
    model = make_model(tok)
    prompts = [tok.encode(p) for p in environment.prompts(7)]

    def greedy(prompts, batch_size=0):
        return generate_rows(model, prompts, 8, tok.eos, tok.pad, 0, batch_size=batch_size)

    rows = greedy(prompts, batch_size=3)
    assert rows == [greedy([p])[0] for p in prompts]
    length = lambda tokens, prompt_len, mask: prompt_len.float()  # noqa: E731
    for batch_size in 3, 64:
        found = score_rows(length, rows, tok.pad, model.device, "float32", batch_size)
        assert found.tolist() == [len(p) for p in prompts]


def test_before_and_after_throw_the_same_dice_and_leave_the_runs_alone(tok):
    model, texts = make_model(tok), environment.prompts(3)
    prompts = [tok.encode(text) for text in texts]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = generate_texts(model, tok, prompts, 12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(10)
    assert generate_texts(model, tok, prompts, 12, seed=1) == before
    assert generate_texts(model, tok, prompts, 12, seed=2) != before
    assert [prompt for prompt, _ in before] == texts


# --- the whole comparison ---


def test_compare_says_who_is_preferred_and_what_each_is_like(tok):
    model, other = make_model(tok), make_model(tok, seed=1)
    longest = lambda tokens, prompt_len, mask: mask.sum(1).float()  # noqa: E731
    found = compare(model, other, tok, environment.prompts(20), longest, CFG)
    assert 0 <= found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"] <= 1
    assert found["score_policy"] == pytest.approx(found["response_len_policy"])
    assert found["kl_against"] == 0 and math.isfinite(found["perplexity_policy"])


def test_compare_takes_the_true_reward_apart(tok):
    """In the built-in world only: elsewhere there is none."""
    models, prompts = (make_model(tok), make_model(tok, seed=1)), environment.prompts(20)
    found = compare(*models, tok, prompts, true_reward(tok), CFG)
    names = environment.parts(prompts[0], "")
    for side in "policy", "against":
        parts = [found[f"{name}_{side}"] for name in names]
        assert sum(parts) == pytest.approx(found[f"score_{side}"], abs=1e-5)
    nothing = lambda tokens, prompt_len, mask: torch.zeros(len(tokens))  # noqa: E731
    elsewhere = dataclasses.replace(CFG, data=["a file"])
    assert "mood_policy" not in compare(*models, tok, ["Hello"] * 3, nothing, elsewhere)


def test_the_same_seed_draws_the_same_responses_whatever_was_drawn_before(tok):
    models, judge = (make_model(tok), make_model(tok, seed=1)), true_reward(tok)
    found = compare(*models, tok, environment.prompts(10), judge, CFG)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert compare(*models, tok, environment.prompts(10), judge, CFG) == found
    assert torch.equal(torch.get_rng_state(), state)  # a run that goes on is left alone
    other = dataclasses.replace(CFG, seed=CFG.seed + 1)
    assert compare(*models, tok, environment.prompts(10), judge, other) != found


@pytest.mark.parametrize("size", [1, 3])
def test_the_micro_batch_size_bounds_what_is_in_memory_and_changes_no_result(
    size, tok, monkeypatch
):
    """How many responses are sampled, scored and measured at once, and what comes of them."""
    models, prompts = (make_model(tok), make_model(tok, seed=1)), environment.prompts(10)
    sampled, scored, measured = [], [], []
    sample, logprobs, truth = generate.generate, evaluate.whole_logprobs, true_reward(tok)

    def judge(tokens, prompt_len, mask):
        scored.append(len(tokens))
        return truth(tokens, prompt_len, mask)

    monkeypatch.setattr(
        generate, "generate", lambda m, some, *a: sampled.append(len(some)) or sample(m, some, *a)
    )
    monkeypatch.setattr(
        evaluate,
        "whole_logprobs",
        lambda m, tokens, *a, **k: measured.append(len(tokens)) or logprobs(m, tokens, *a, **k),
    )
    whole = compare(*models, tok, prompts, judge, CFG)
    assert sampled == scored == [10, 10]
    for sizes in sampled, scored, measured:
        sizes.clear()
    cfg = dataclasses.replace(CFG, micro_batch_size=size)
    assert compare(*models, tok, prompts, judge, cfg) == pytest.approx(whole, rel=1e-5)
    assert max(sampled) == max(scored) == max(measured) == size
    assert sum(sampled) == sum(scored) == 20


def test_a_judge_without_an_opinion_makes_everything_a_tie(tok):
    nothing = lambda tokens, prompt_len, mask: torch.zeros(len(tokens))  # noqa: E731
    found = compare(make_model(tok), make_model(tok, 1), tok, environment.prompts(10), nothing, CFG)
    assert found["win_rate"] == 0.5


def test_the_true_reward_is_the_environments(tok):
    [record] = environment.demonstrations(1)
    prompt, response = tok.encode(record["prompt"]), [*tok.encode(record["response"]), tok.eos]
    batch = data.collate([(prompt + response, len(prompt))], tok.pad)
    said = environment.gold(record["prompt"], record["response"])
    assert true_reward(tok)(*batch).tolist() == [pytest.approx(said)]


# --- prompts that no stage has seen ---


def test_held_out_prompts_of_the_built_in_world():
    assert held_out_prompts([], 20, seed=1) == environment.prompts(20, 1, held_out=True)


def test_held_out_prompts_of_files_are_those_that_training_leaves_aside(tmp_path):
    records = [dict(prompt=f"question {i}", response="r") for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    found = held_out_prompts([path], 10, seed=1)
    trained_on = {r["prompt"] for r in data.split(data.demonstrations([path])[0])[0]}
    assert len(found) == 10 and not set(found) & trained_on
