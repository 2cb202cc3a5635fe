"""Q-learning on logged text: targets by hand, the tilted policy, what is learnt, the command."""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from nanorlhf import environment, evaluate, ilql, tokenizer
from nanorlhf.generate import generate, generate_rows, generate_texts
from nanorlhf.ilql import ILQLConfig, follow, losses, q_targets
from nanorlhf.logprobs import response_logprobs
from nanorlhf.model import GPT, QGPT, GPTConfig, ScalarGPT
from nanorlhf.reward import by_model
from nanorlhf.support import UserError
from nanorlhf.support.data import collate, preferences, score_rows, split
from nanorlhf.support.runlog import RunLog, read
from nanorlhf.support.stats import standardise

TINY = GPTConfig(vocab_size=12, n_positions=16, n_layer=1, n_head=2, n_embd=16)
LIKED, EOS, PAD = 3, 9, 11
ROWS = [([1, 2, 3, 4, 9], 2), ([6, 7], 1), ([8, 5, 10, 1], 1)]
SCORES = torch.tensor([1.5, -0.5, 0.25]).double()
CFG = ILQLConfig(device="cpu", dtype="float32", steps=9, batch_size=8, beta=4.0)


def new_model(**changes):
    """A language model with fresh heads."""
    torch.manual_seed(0)
    return QGPT(dataclasses.replace(TINY, **changes)).eval()


def opinionated(beta=1.5, dtype=torch.float64):
    """A model whose five heads say five things."""
    model = new_model().to(dtype)
    for head in (*model.q, *model.target_q, model.v):
        torch.nn.init.normal_(head[2].weight)
        torch.nn.init.normal_(head[2].bias)
    model.beta.fill_(beta)
    return model


def trunk_alone(model):
    """The language model that a QGPT was made from."""
    sft = GPT(model.config).to(model.beta.dtype).eval()
    sft.transformer.load_state_dict(model.transformer.state_dict())
    return sft


def some_tokens(B=4, T=9):
    return torch.randint(12, (B, T), generator=torch.Generator().manual_seed(2))


# --- what Q should have said ---

# A row of three tokens and a row of two; behind its end stands what must never be read.
VALUES = torch.tensor([[1.0, 2, 3], [4, 6, 1e6]]).double()
MASK = torch.tensor([[True, True, True], [True, True, False]])
ENDS = torch.tensor([8.0, -4.0]).double()


@pytest.mark.parametrize(
    "lam, exact",
    [
        (0.0, [1.0, 1.5, 8.0, 3.0, -4.0]),  # half of the next V; at the end the score
        (1.0, [2.0, 4.0, 8.0, -2.0, -4.0]),  # the score, halved once a token
        # 0.5 (0.75 * 3 + 0.25 * 8) = 2.125, and then 0.5 (0.75 * 2 + 0.25 * 2.125)
        (0.25, [1.015625, 2.125, 8.0, 0.5 * (0.75 * 6 - 0.25 * 4), -4.0]),
    ],
)
def test_targets_by_hand(lam, exact):
    found = q_targets(ENDS, VALUES, MASK, gamma=0.5, lam=lam)
    assert found[MASK].tolist() == pytest.approx(exact, abs=1e-12)


def test_two_tokens_by_hand():
    """The worked example: V says 1 and then 2, and the score is 10."""
    values, mask = torch.tensor([[1.0, 2.0]]).double(), torch.ones(1, 2).bool()
    found = q_targets(torch.tensor([10.0]).double(), values, mask, gamma=0.9, lam=0.5)
    assert found[0].tolist() == pytest.approx([0.9 * (0.5 * 2 + 0.5 * 10), 10.0], abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_nothing_is_expected_after_the_end(lam):
    """A response of one token is worth its score, whatever V says of it or of the padding."""
    values = torch.tensor([[5.0, 1e6, -1e6]]).double()
    mask = torch.tensor([[True, False, False]])
    assert q_targets(torch.tensor([2.0]).double(), values, mask, 0.9, lam)[0, 0].item() == 2.0


# --- the losses ---


def slow_losses(model, rows, scores, cfg):
    """Token by token, each from its own prefix alone. -> metrics"""
    q_loss, v_loss, cql_loss, qs, vs = [], [], [], [], []
    for (tokens, prompt_len), score in zip(rows, scores.tolist(), strict=True):
        steps = []
        for t in range(prompt_len, len(tokens)):
            hidden = model.transformer(torch.tensor([tokens[:t]]))[0, -1]
            said = [[head(hidden) for head in heads] for heads in (model.q, model.target_q)]
            steps.append((tokens[t], *said, model.v(hidden).item()))
        target = score
        for i in reversed(range(len(steps))):
            token, online, lagging, v = steps[i]
            if i + 1 < len(steps):
                target = cfg.gamma * ((1 - cfg.lam) * steps[i + 1][3] + cfg.lam * target)
            gap = min(q[token].item() for q in lagging) - v
            q_loss.append(sum((q[token].item() - target) ** 2 for q in online))
            v_loss.append((cfg.tau if gap > 0 else 1 - cfg.tau) * gap**2)
            cql_loss.append(sum((q.logsumexp(0) - q[token]).item() for q in online))
            qs.append(online[0][token].item())
            vs.append(v)
    found = dict(q_loss=q_loss, v_loss=v_loss, cql_loss=cql_loss, q=qs, v=vs)
    return {name: sum(x) / len(x) for name, x in found.items()}


def test_the_losses_are_those_of_a_slow_loop_over_the_tokens():
    model = opinionated()
    cfg = dataclasses.replace(CFG, gamma=0.9, lam=0.4, tau=0.8, cql=0.3)
    expected = slow_losses(model, ROWS, SCORES, cfg)
    loss, metrics = losses(model, *collate(ROWS, PAD), SCORES, cfg)
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, abs=1e-9)
    total = expected["q_loss"] + expected["v_loss"] + 0.3 * expected["cql_loss"]
    assert loss.item() == pytest.approx(total, abs=1e-9)


def test_what_stands_behind_the_mask_reaches_no_loss_no_gradient_and_no_metric():
    found = []
    for filler, extra in (PAD, 0), (LIKED, 0), (5, 4):
        model = opinionated()
        tokens, prompt_len, mask = collate(ROWS, filler)
        tokens = torch.nn.functional.pad(tokens, (0, extra), value=filler)
        mask = torch.nn.functional.pad(mask, (0, extra))
        loss, metrics = losses(model, tokens, prompt_len, mask, SCORES, CFG)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([*(x.view(1) for x in metrics.values()), *gradients]))
    assert len(found[0]) > 1000
    assert all(torch.allclose(x, found[0], rtol=0, atol=1e-9) for x in found)


def test_where_all_tokens_are_worth_the_same_the_conservative_loss_is_log_v_for_each_head():
    metrics = losses(new_model().double(), *collate(ROWS, PAD), SCORES, CFG)[1]
    assert metrics["cql_loss"].item() == pytest.approx(2 * math.log(12), abs=1e-12)


def test_the_conservative_loss_by_hand():
    """Each head says ln 3 of token 3 and 0 of the eleven others: 3 / 14, then 1 / 14."""
    model = new_model().double()
    for head in model.q:
        head[2].bias.data[3] = math.log(3)
    metrics = losses(model, *collate([([1, 3, 4], 1)], PAD), SCORES[:1], CFG)[1]
    assert metrics["cql_loss"].item() == pytest.approx(-math.log(3 / 14 / 14), abs=1e-12)


def gradients_of(model, cfg=CFG):
    """{name: the gradient, or None} of all weights"""
    losses(model, *collate(ROWS, PAD), SCORES, cfg)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_only_the_learning_heads_have_a_gradient():
    with_gradient = {name for name, g in gradients_of(opinionated()).items() if g is not None}
    model = new_model()
    assert with_gradient == {
        name for name, _ in model.named_parameters() if name.startswith(("q.", "v."))
    }


def test_v_follows_the_target_heads_and_is_not_drawn_to_what_it_is_the_target_of():
    """Here V agrees with the target heads, and Q with nobody: only Q has something to learn."""
    model = new_model().double()
    for head in model.q:
        torch.nn.init.normal_(head[2].weight)
    found = gradients_of(model, dataclasses.replace(CFG, lam=0.5))
    assert found["q.0.2.weight"].abs().max() > 0.1 and found["q.1.2.weight"].abs().max() > 0.1
    v = [gradient for name, gradient in found.items() if name.startswith("v.")]
    assert len(v) == 4 and all(gradient.abs().max() == 0 for gradient in v)


# --- the target heads ---


def test_the_target_heads_go_a_part_of_the_way():
    model = new_model()
    for q in model.q.parameters():
        torch.nn.init.ones_(q)
    for target in model.target_q.parameters():
        torch.nn.init.zeros_(target)
    for exact in 0.25, 0.4375:
        follow(model, 0.25)
        assert all((p == exact).all() for p in model.target_q.parameters())
    assert all((p == 1).all() for p in model.q.parameters())


# --- the policy that comes out ---


def test_at_beta_0_it_is_the_language_model_to_the_bit():
    model = opinionated(beta=0.0, dtype=torch.float32)
    assert torch.equal(model(some_tokens()), trunk_alone(model)(some_tokens()))


def test_fresh_heads_change_nothing_to_the_bit():
    model = new_model()
    model.beta.fill_(8.0)
    assert torch.equal(model(some_tokens()), trunk_alone(model)(some_tokens()))


def test_v_changes_no_probability():
    model, tokens = opinionated(), some_tokens()
    before = model(tokens)
    model.v[2].bias.data += 100
    assert not torch.allclose(model(tokens), before, atol=100)
    assert torch.allclose(model(tokens).log_softmax(-1), before.log_softmax(-1), rtol=0, atol=1e-9)


def test_a_large_beta_takes_what_the_less_hopeful_head_likes_best():
    model, tokens = opinionated(beta=1e9), some_tokens(B=8)
    first, second = (head(model.transformer(tokens)) for head in model.target_q)
    best = torch.minimum(first, second).argmax(-1)
    assert torch.equal(model(tokens).argmax(-1), best)
    for other in first, second, first + second, torch.maximum(first, second):
        assert not torch.equal(other.argmax(-1), best)  # they disagree, or this would show little


def tilted_by_hand(model, prefix):
    """Log-probs of the next token: pi exp(beta Q) over its sum, Q the lesser of both targets."""
    hidden = model.transformer(torch.tensor([prefix]))[0, -1]
    weights = trunk_alone(model)(torch.tensor([prefix]))[0, -1].softmax(-1)
    q = [min(pair) for pair in zip(*(head(hidden).tolist() for head in model.target_q))]
    weights = weights * (model.beta * torch.tensor(q, dtype=torch.float64)).exp()
    return (weights / weights.sum()).log()


def test_the_scorer_sees_the_tilted_distribution():
    model, batch = opinionated(), collate(ROWS, PAD)
    found = response_logprobs(model, *batch[:2], batch[2].shape[1])
    for (tokens, prompt_len), row in zip(ROWS, found, strict=True):
        exact = [
            tilted_by_hand(model, tokens[:t])[tokens[t]].item()
            for t in range(prompt_len, len(tokens))
        ]
        assert row[: len(exact)].tolist() == pytest.approx(exact, abs=1e-9)


def test_step_by_step_with_a_cache_it_says_what_it_says_of_the_whole():
    model, said = opinionated(), []
    head = model.head
    model.head = lambda hidden: said.append(head(hidden)) or said[-1]
    tokens, prompt_len, mask = generate(model, [[1], [2, 4, 5], [6, 7]], 6, pad=PAD)
    del model.head
    assert mask.all() and len(said) == 6
    whole = model(tokens)
    for r, logits in enumerate(said):
        at = prompt_len - 1 + r
        assert torch.allclose(logits, whole[torch.arange(3), at], rtol=0, atol=1e-9)


# --- files ---


def test_what_is_loaded_says_what_was_saved_its_beta_included(tmp_path):
    model, tokens = opinionated(beta=7.25, dtype=torch.float32), some_tokens()
    model.save(tmp_path, eos_token_id=EOS)
    for again in GPT.load(tmp_path), QGPT.load(tmp_path):
        assert type(again) is QGPT and not again.training
        assert again.beta.item() == 7.25
        assert torch.equal(again(tokens), model(tokens))
        state = again.state_dict()
        assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert not torch.allclose(trunk_alone(model)(tokens), model(tokens), atol=0.1)


def test_what_is_loaded_goes_on_without_touching_its_target_heads(tmp_path):
    opinionated().float().save(tmp_path)
    model = GPT.load(tmp_path)
    assert {p.requires_grad for p in model.target_q.parameters()} == {False}
    assert {p.requires_grad for p in model.q.parameters()} == {True}


def test_from_a_language_model_it_begins_as_that(tmp_path):
    sft = trunk_alone(new_model())
    sft.save(tmp_path)
    assert type(GPT.load(tmp_path)) is GPT
    assert torch.equal(QGPT.load(tmp_path)(some_tokens()), sft(some_tokens()))


def test_a_reward_model_can_begin_from_its_trunk(tmp_path):
    model = opinionated().float()
    model.save(tmp_path)
    scalar, tokens = ScalarGPT.load(tmp_path), some_tokens()
    assert scalar(tokens).shape == tokens.shape
    assert torch.equal(scalar.transformer(tokens), model.transformer(tokens))


def test_transformers_refuses_it_and_does_not_open_the_trunk_alone(tmp_path):
    opinionated().float().save(tmp_path)
    with pytest.raises(ValueError, match="qgpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    # Under the name of its trunk it would open, and say something else:
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    said = GPT.load(tmp_path)(some_tokens())
    assert not torch.allclose(opened(some_tokens()).logits, said, atol=0.1)


# --- it learns ---


def past(n, rule, max_new_tokens=6):
    """What an untrained model once said, and how a rule scored it. -> rows, scores"""
    rng = random.Random(1)
    prompts = [[rng.randrange(9), rng.randrange(9)] for _ in range(n)]
    sft = trunk_alone(new_model())
    torch.manual_seed(1)
    rows = generate_rows(sft, prompts, max_new_tokens, EOS, PAD)
    return rows, [rule(tokens[n:]) for tokens, n in rows]


def share_of_liked(response):
    return response.count(LIKED) / len(response)


def begins_well(response):
    return float(response[0] == LIKED)


def diary(cfg):
    """A log with a folder if the test has given one; without, nothing is saved."""
    return RunLog(cfg.out if Path(cfg.out).is_absolute() else None)


def learn(cfg, log=None, rule=share_of_liked, n=60, **changes):
    """-> the model, summary. With dropout, which training has to switch off."""
    model = new_model(**(dict(dropout=0.1) | changes)).train()
    rows, scores = past(n, rule)
    scores = standardise(torch.tensor(scores))
    return model, ilql.train(model, rows, scores, PAD, cfg, log or diary(cfg))


@pytest.mark.parametrize("rule", [share_of_liked, begins_well])
def test_it_says_more_of_what_was_liked_though_nobody_asked_it_while_it_learnt(rule):
    """In the second rule the first token decides, and is told so at the end of the response."""
    cfg = dataclasses.replace(CFG, steps=80, batch_size=32)
    model, summary = learn(cfg, rule=rule, n=800)
    assert summary["steps"] == 80 and model.beta == 4
    in_the_log = sum(past(800, rule)[1]) / 800
    shares = []
    for beta in 0, 1, 4:
        model.beta.fill_(beta)
        torch.manual_seed(2)
        rows = generate_rows(model, [[1, 2], [5, 0]] * 150, 6, EOS, PAD)
        shares.append(sum(rule(tokens[n:]) for tokens, n in rows) / 300)
    assert in_the_log < 0.12 and shares[0] < 0.15  # at beta 0 it is what it was
    assert 1.5 * shares[0] < shares[1] < shares[2] and shares[2] > 0.5


def test_the_trunk_stays_bit_for_bit_what_it_was():
    model, _ = learn(CFG)
    before, after = new_model().state_dict(), model.state_dict()
    trunk = [name for name in before if name.startswith("transformer.")]
    assert len(trunk) > 10 and all(torch.equal(before[name], after[name]) for name in trunk)
    assert all(p.grad is None for p in model.transformer.parameters())
    learnt = [name for name in before if name.endswith(".2.weight")]
    assert len(learnt) == 5 and not any(torch.equal(before[n], after[n]) for n in learnt)


def test_the_target_heads_move_by_polyak_and_by_nothing_else():
    still = learn(dataclasses.replace(CFG, polyak=0.0))[0]
    untouched = new_model().target_q.parameters()
    pairs = zip(still.target_q.parameters(), untouched, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.grad is None for p in still.target_q.parameters())
    assert still.q[0][2].weight.abs().max() > 0

    at_once = learn(dataclasses.replace(CFG, polyak=1.0))[0]
    pairs = zip(at_once.target_q.parameters(), at_once.q.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    # After one step they have gone a twentieth of the way from the start, where Q was as well.
    once = learn(dataclasses.replace(CFG, steps=1))[0]
    start = new_model()
    for target, q, begin in zip(*(m.parameters() for m in (once.target_q, once.q, start.q))):
        assert torch.allclose(target, begin + 0.05 * (q - begin), rtol=0, atol=1e-9)


class Notes(RunLog):
    def write(self, step, **metrics):
        self.__dict__.setdefault("rows", []).append({k: float(x) for k, x in metrics.items()})


def test_the_log_of_a_run_begins_with_heads_that_know_nothing_and_its_rate_falls_to_zero():
    log = Notes()
    _, summary = learn(dataclasses.replace(CFG, steps=50), log)
    first = log.rows[0]
    assert (first["v_loss"], first["q"], first["v"]) == (0, 0, 0) and first["q_loss"] > 0
    assert first["cql_loss"] == pytest.approx(2 * math.log(12), abs=1e-5)
    rates = [row["lr"] for row in log.rows]
    assert rates[0] == pytest.approx(CFG.learning_rate / 20) and max(rates[20:]) == rates[20]
    assert rates[-1] == pytest.approx(CFG.learning_rate / 50)
    assert summary["steps"] == 50


def test_without_a_number_of_steps_it_passes_once_over_the_log():
    cfg = dataclasses.replace(CFG, steps=0)
    _, summary = learn(cfg)
    read_once = sum(len(tokens) for tokens, _ in past(60, share_of_liked)[0])
    assert summary == dict(steps=8, tokens=read_once)  # 60 responses, eight an update


def test_a_step_is_as_long_as_its_settings_allow():
    start = new_model()

    def moved(**changes):
        model, _ = learn(dataclasses.replace(CFG, steps=1, **changes))
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert moved() == pytest.approx(CFG.learning_rate / 20, rel=1e-3)  # Adam's first, warm-up
    assert moved(grad_clip=0.0) == 0


def test_dropout_is_off_while_it_learns():
    with_dropout, without = Notes(), Notes()
    assert not learn(CFG, with_dropout, dropout=0.5)[0].training
    learn(CFG, without, dropout=0.0)
    assert with_dropout.rows == without.rows and len(without.rows) == 9


def test_a_log_of_equal_scores_teaches_nothing():
    model, _ = learn(dataclasses.replace(CFG, cql=0.0), rule=lambda response: 7.3)
    assert torch.equal(model(some_tokens()), trunk_alone(model)(some_tokens()))


@pytest.mark.parametrize("size", [1, 3])
def test_how_the_rows_are_split_to_fit_into_memory_changes_nothing(size):
    """Responses differ in length, so that a mean of means would be another number."""
    found = []
    for micro_batch_size in 0, size:
        log = Notes()
        _, summary = learn(dataclasses.replace(CFG, micro_batch_size=micro_batch_size), log)
        found.append((log.rows, summary))
    assert found[0][1] == found[1][1]
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        assert parts == pytest.approx(whole, abs=1e-5)


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path):
    cfg = dataclasses.replace(CFG, save_every=5, out=str(tmp_path))
    model, summary = learn(cfg)
    with pytest.raises(KeyboardInterrupt):
        learn(cfg, Interrupted(tmp_path))
    again, summary_again = learn(dataclasses.replace(cfg, resume=True))
    assert summary == summary_again and summary["steps"] == 9
    state = again.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert state["beta"] == 4


# --- the log of the past ---


def test_scores_by_hand_have_mean_0_and_deviation_1():
    found = standardise(torch.tensor([1.0, 2.0, 3.0, 6.0]))  # mean 3, squares 4, 1, 0, 9
    assert found == pytest.approx([x / 3.5**0.5 for x in (-2, -1, 0, 3)], abs=1e-7)


def test_a_score_is_the_same_whoever_shares_its_batch():
    torch.manual_seed(0)
    score = by_model(ScalarGPT(TINY).double().eval())
    rows, _ = past(50, share_of_liked)
    assert len({len(tokens) for tokens, _ in rows}) > 3
    cpu = torch.device("cpu")
    whole = standardise(score_rows(score, rows, PAD, cpu, "float32"))
    assert max(whole) - min(whole) > 1
    for size in 1, 7:
        found = standardise(score_rows(score, rows, PAD, cpu, "float32", batch_size=size))
        assert found == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_equal_scores_are_0_and_not_noise_made_large(n):
    """The mean of equal float32 numbers misses them by a last digit, and so does the deviation."""
    for score in 7.3, 0.1, -3.3:
        assert standardise(torch.full((n,), score)) == [0.0] * n


# --- the command ---

ROOT = Path(__file__).parents[1]


def settings(folder, name, **changes):
    common = dict(prompts=6, responses=3, max_new_tokens=12, steps=3, batch_size=4, save_every=2)
    folders = {stage: str(folder / "out" / stage) for stage in ("sft", "rm")}
    common |= dict(out=str(folder / "out" / name), device="cpu", dtype="float32", **folders)
    return ILQLConfig(**common | changes)


def told(cfg):
    """Run the stage. -> what it printed"""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ilql.main(cfg)
    return printed.getvalue()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder where ILQL has run after an SFT and a reward model that know nothing; and what it
    printed."""
    folder = tmp_path_factory.mktemp("workshop")
    tok = tokenizer.learn(environment.prompts(50), 400)
    torch.manual_seed(0)
    for stage, kind in ("sft", GPT), ("rm", ScalarGPT):
        model = kind(GPTConfig(tok.vocab_size, 160, n_layer=1, n_head=2, n_embd=16))
        model.save(folder / "out" / stage, **tok.special)
        tok.save(folder / "out" / stage)
    lines = [
        dict(prompt=prompt, chosen="A happy fox ran home.", rejected=f"No {n}.")
        for n, prompt in enumerate(environment.prompts(40))
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, told(settings(folder, "ilql"))


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_command_leaves_a_policy_and_its_diary(workshop):
    folder, printed = workshop
    out = folder / "out" / "ilql"
    names = {path.name for path in out.iterdir()}
    assert names >= {"settings.json", "log.jsonl", "samples.md", "curves.png", "state.pt"}
    tok, model = tokenizer.load(out), GPT.load(out)
    assert type(model) is QGPT and model.beta == ILQLConfig.beta
    assert model.config.vocab_size == tok.vocab_size
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tok.eos, tok.pad)
    page = (out / "samples.md").read_text()
    assert page.count("**after**") == 3
    assert all(prompt in page for prompt in environment.prompts(3, seed=1, held_out=True))
    assert "log       18 responses, scored by rm" in printed
    assert f"next: python -m nanorlhf.evaluate --policy {out} --against" in printed


def test_its_trunk_is_the_sft_model_to_the_bit(workshop):
    sft, policy = (GPT.load(workshop[0] / "out" / stage) for stage in ("sft", "ilql"))
    state = policy.transformer.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in sft.transformer.state_dict().items())
    assert not torch.equal(policy(some_tokens()), sft(some_tokens()))  # but it speaks otherwise


def test_the_summary_holds_every_promised_number(workshop):
    out = workshop[0] / "out" / "ilql"
    found = summary_of(out)
    assert found.keys() >= {"seconds", "steps", "tokens"}
    assert found["steps"] == len(read(out)) == 3 and found["tokens"] > 0
    promised = {"step", "q_loss", "v_loss", "cql_loss", "q", "v", "lr", "grad_norm"}
    assert read(out)[-1].keys() >= promised


def test_before_and_after_are_answered_with_the_same_dice(workshop):
    """So at beta 0 they are one."""
    folder, _ = workshop
    sft, policy = (GPT.load(folder / "out" / stage) for stage in ("sft", "ilql"))
    tok, cfg = tokenizer.load(folder / "out" / "sft"), settings(folder, "none")
    prompts = [tok.encode(p) for p in environment.prompts(3)]
    before = generate_texts(sft, tok, prompts, cfg.max_new_tokens, seed=1)
    policy.beta.fill_(0.0)
    assert generate_texts(policy, tok, prompts, cfg.max_new_tokens, seed=1) == before
    assert [prompt for prompt, _ in before] == environment.prompts(3)


def test_the_same_run_again_or_resumed_gives_the_same(workshop):
    folder, _ = workshop
    out = folder / "out" / "ilql"
    before = summary_of(out) | {"seconds": 0}, (out / "model.safetensors").read_bytes()
    for changes in {}, dict(resume=True):
        told(settings(folder, "ilql", **changes))
        assert (
            summary_of(out) | {"seconds": 0},
            (out / "model.safetensors").read_bytes(),
        ) == before


def test_other_settings_do_not_overwrite_a_run(workshop):
    out = workshop[0] / "out" / "ilql"
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match=r"other settings \(beta 8.0 there, 2.0 here\)"):
        told(settings(workshop[0], "ilql", beta=2.0))
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def logged(cfg, patch):
    """-> the rows that the stage learns from, and the prompts whose answers it shows"""
    seen, train, texts = [], ilql.train, ilql.generate_texts
    with patch.context() as patch:
        patch.setattr(ilql, "train", lambda m, rows, *a: seen.append(rows) or train(m, rows, *a))
        patch.setattr(
            ilql,
            "generate_texts",
            lambda m, tok, prompts, *a, **k: seen.append(prompts) or texts(m, tok, prompts, *a, **k)
        )  # fmt: skip
        told(cfg)
    rows, before, after = seen
    assert before == after
    return rows, before


def test_the_log_of_the_built_in_world_is_what_sft_says_to_its_prompts(workshop, monkeypatch):
    folder, _ = workshop
    tok = tokenizer.load(folder / "out" / "sft")
    rows, shown = logged(settings(folder, "watched"), monkeypatch)
    asked = [tok.decode(tokens[:n]) for tokens, n in rows]
    assert asked == [p for p in environment.prompts(6, seed=1) for _ in range(3)]
    assert all(1 <= len(tokens) - n <= 12 for tokens, n in rows)
    assert len({tuple(tokens) for tokens, _ in rows}) > 6  # three answers, not one three times
    assert [tok.decode(p) for p in shown] == environment.prompts(3, seed=1, held_out=True)


def test_the_log_of_a_file_of_preferences_is_both_sides_of_every_pair(workshop, monkeypatch):
    folder, _ = workshop
    tok = tokenizer.load(folder / "out" / "sft")
    cfg = settings(folder, "watched-too", data=[str(folder / "mine.jsonl")])
    rows, shown = logged(cfg, monkeypatch)
    train, kept_back = split(preferences(cfg.data)[0])
    exact = [(record["prompt"], record[k]) for record in train for k in ("chosen", "rejected")]
    assert [(tok.decode(t[:n]), tok.decode(t[n:-1])) for t, n in rows] == exact
    assert {t[-1] for t, _ in rows} == {tok.eos}
    assert [tok.decode(p) for p in shown] == [record["prompt"] for record in kept_back[:3]]


def test_preferences_can_come_from_a_file(workshop):
    folder, _ = workshop
    cfg = settings(folder, "mine", data=[str(folder / "mine.jsonl")], steps=0)
    printed = told(cfg)
    rows = 2 * len(split(preferences(cfg.data)[0])[0])
    assert "data      40 records" in printed and f"log       {rows} responses" in printed
    assert summary_of(folder / "out" / "mine")["steps"] == math.ceil(rows / 4)


def test_it_can_be_scored_by_the_truth(workshop, monkeypatch):
    folder, _ = workshop
    seen, train = [], ilql.train

    def watched(model, rows, scores, *rest):
        seen.append((rows, scores))
        return train(model, rows, scores, *rest)

    monkeypatch.setattr(ilql, "train", watched)
    assert "scored by env" in told(settings(folder, "truth", reward="env", rm="nowhere"))
    tok, [(rows, scores)] = tokenizer.load(folder / "out" / "sft"), seen
    gold = [environment.gold(tok.decode(t[:n]), tok.decode(t[n:])) for t, n in rows]
    mean, std = sum(gold) / 18, torch.tensor(gold).double().std(correction=0).item()
    assert std > 0.01
    assert scores == pytest.approx([(x - mean) / std for x in gold], abs=1e-5)


def test_evaluate_compares_it_with_sft(workshop, capsys):
    """A large beta, so that three steps of training show in three digits."""
    folder, _ = workshop
    told(cfg := settings(folder, "bold", beta=1000.0))
    evaluate.main(
        evaluate.EvaluateConfig(
            policy=cfg.out,
            against=cfg.sft,
            prompts=6,
            max_new_tokens=12,
            device="cpu",
            dtype="float32",
        )
    )
    out = capsys.readouterr().out
    [[_, ours, theirs]] = [line.split() for line in out.splitlines() if line.startswith("kl ")]
    assert "over 6 held-out prompts, by env" in out
    assert float(ours) != 0 and float(theirs) == 0


def command(folder, words):
    """Run the command in a folder. -> status, standard output, standard error"""
    done = subprocess.run(
        [sys.executable, "-m", "nanorlhf.ilql", *words.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_reward_of_ones_own(workshop):
    folder, _ = workshop
    (folder / "mine.py").write_text(
        "def score(pairs):\n    return [float(len(response)) for prompt, response in pairs]\n"
    )
    words = "--prompts 6 --responses 2 --max-new-tokens 12 --device cpu --dtype float32"
    status, printed, errors = command(
        folder, words + " --steps 2 --beta 3.5 --reward mine.py:score --out out/own"
    )
    assert status == 0, errors
    assert "log       12 responses, scored by mine.py:score" in printed
    assert "next: python -m nanorlhf.evaluate --policy out/own --against out/sft" in printed
    assert GPT.load(folder / "out" / "own").beta == 3.5


def test_a_model_that_is_nowhere_is_one_line_and_leaves_nothing_in_the_way(workshop):
    status, _, errors = command(workshop[0], "--sft nowhere --out out/none")
    assert status == 2 and errors.count("\n") == 1 and "nowhere is no checkpoint" in errors
    assert not (workshop[0] / "out" / "none").exists()
