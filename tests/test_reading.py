"""The head that reads the request: its formula, its start, its scale; and comparisons and a probe
that show whether a reward model cares about what was asked."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from nanorlhf import environment, ppo, reward, tokenizer
from nanorlhf.advantages import gae
from nanorlhf.environment import Request, near_miss, prompts
from nanorlhf.logprobs import response_window
from nanorlhf.model import GPT, GPTConfig, ReadingGPT, ScalarGPT
from nanorlhf.ppo import PPOConfig
from nanorlhf.reward import ComparisonConfig, RMConfig, compare_samples
from nanorlhf.support.data import collate
from nanorlhf.support.runlog import RunLog
from train_rm import reads_request

TINY = GPTConfig(vocab_size=12, n_positions=16, n_layer=1, n_head=2, n_embd=16)
PAD = 11
ROWS = [([1, 2, 3, 4, 5, 6, 7, 9], 2), ([3, 1, 4, 1, 5], 3), ([2, 7, 9], 1)]
SLOTS = "mood", "hero", "thing", "place"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(ReadingGPT, "few", 4)  # one of the ROWS is longer
    torch.manual_seed(0)
    model = ReadingGPT(TINY).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return model


# --- the formula ---


def mean_log_fit(model, words, start):
    """The mean of log P(it fits) + bias over the words from `start` on, but over four at least."""
    hidden = model.transformer(torch.tensor([words]))[0]
    logs = []
    for t in range(start, len(words)):
        word = model.transformer.wte.weight[words[t]]
        match = (word @ (model.match.weight @ hidden[t - 1]) + model.offset).item()
        logs.append(-math.log(1 + math.exp(-match)) + model.bias.item())
    return sum(logs) / max(4, len(logs))


def test_the_head_takes_the_mean_of_how_well_every_word_of_the_response_fits(model):
    tokens, prompt_len, mask = collate(ROWS, PAD)
    found, scores = model(tokens, prompt_len), reward.score(model, tokens, prompt_len, mask)
    for row, (words, start) in enumerate(ROWS):
        hidden = model.transformer(torch.tensor([words]))[0]
        for n in range(1, len(words) + 1):
            expected = model.score.weight[0] @ hidden[n - 1]
            expected = expected + model.scale * mean_log_fit(model, words[:n], start)
            assert found[row, n - 1].item() == pytest.approx(expected.item())
        assert scores[row].item() == pytest.approx(expected.item())


def test_no_word_earns_more_by_being_repeated(model):
    """The head's number has an upper limit, however well words fit: so there is a best score."""
    nn.init.zeros_(model.score.weight)
    nn.init.eye_(model.match.weight)
    model.match.weight.data *= 100  # a word that fits at all now fits as well as can be
    for word in range(12):
        values = model(torch.tensor([[1] + [word] * 15]))[0]
        assert values.max() <= model.scale * model.bias + 1e-9


def test_without_a_prompt_every_word_but_the_first_counts(model):
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert torch.allclose(model(tokens), model(tokens, torch.tensor([1])))
    assert not torch.allclose(model(tokens), model(tokens, torch.tensor([2])))


def test_it_starts_from_the_scalar_head_and_the_language_models_logits(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(TINY).eval()
    gpt.save(tmp_path)
    new, scalar = ReadingGPT.load(tmp_path), ScalarGPT.load(tmp_path)
    assert new.score.weight.std() > 0
    scalar.score.weight.data = new.score.weight.data
    for words, start in ROWS:
        tokens, prompt_len = torch.tensor([words]), torch.tensor([start])
        logits = gpt(tokens)[0]
        fits = [F.logsigmoid(0.06 * logits[t - 1, words[t]]) for t in range(start, len(words))]
        expected = scalar(tokens)[0, -1] + 50 * (sum(fits) + len(fits) * math.log(2)) / 32
        assert new(tokens, prompt_len)[0, -1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_it_comes_back_to_the_bit_and_is_no_gpt2_elsewhere(model, tmp_path):
    model.float().save(tmp_path)
    tokens, prompt_len, _ = collate(ROWS, PAD)
    again = reward.load(tmp_path)
    assert isinstance(again, ReadingGPT)
    assert torch.equal(again(tokens, prompt_len), model(tokens, prompt_len))
    with pytest.raises(ValueError, match="readinggpt"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [ReadingGPT, ScalarGPT])
def test_rescaling_shifts_and_scales_every_number(kind, monkeypatch):
    monkeypatch.setattr(ReadingGPT, "few", 4)
    torch.manual_seed(1)
    model = kind(TINY).double().eval()
    if kind is ReadingGPT:
        nn.init.normal_(model.match.weight)
    tokens, prompt_len = torch.randint(12, (3, 14)), torch.tensor([1, 2, 4])
    with torch.no_grad():
        before = model(tokens, prompt_len)
        model.rescale(0.7, 2.5)
        after = model(tokens, prompt_len)
    for row, start in enumerate(prompt_len.tolist()):
        whole = slice(start + 3, None)  # from the fourth word of the response on
        assert torch.allclose(after[row, whole], (before[row, whole] - 0.7) / 2.5)


def test_short_answers_score_0_on_average_too():
    """Of six words each: every word carries its share of the shift."""
    torch.manual_seed(2)
    rows = [(torch.randint(11, (8,)).tolist(), 2) for _ in range(40)]
    model = ReadingGPT(TINY).eval()
    nn.init.normal_(model.match.weight)
    mean, _ = reward.normalise(model, rows, PAD, "float32")
    scores = reward.score_rows(reward.by_model(model), rows, PAD, model.device, "float32")
    assert abs(mean) > 0.5 and scores.mean().abs() < 1e-4
    assert scores.std().item() == pytest.approx(1, abs=1e-4)


def test_a_critic_that_starts_from_it_knows_what_each_word_changed(model):
    """Its values are the means so far; a word's one-step advantage is by how much it changed it."""
    nn.init.zeros_(model.score.weight)
    tokens, prompt_len, mask = collate(ROWS, PAD)
    R = mask.shape[1]
    values = response_window(model(tokens, prompt_len), prompt_len, R)
    rewards = torch.zeros_like(values)
    rewards[range(3), mask.sum(1) - 1] = reward.score(model, tokens, prompt_len, mask)
    advantages = gae(rewards, values, mask, lam=0.0)
    for row, (words, start) in enumerate(ROWS):
        means = [mean_log_fit(model, words[:n], start) for n in range(start, len(words) + 1)]
        for r in range(len(words) - start):
            expected = model.scale * (means[r + 1] - means[r])
            assert advantages[row, r].item() == pytest.approx(expected.item())


def test_ppo_tells_the_critic_where_the_response_starts(model):
    """In the rollout and in the update, or the value of a prompt's words would be in all values."""
    policy = GPT(TINY).double().eval()
    cfg = PPOConfig(device="cpu", dtype="float32", batch_size=4, max_new_tokens=6, minibatches=1)
    told = []

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, prompt_len):
            told.append(prompt_len)
            return self.model(tokens, prompt_len)

    def score(tokens, prompt_len, mask):
        return torch.zeros(len(tokens), dtype=torch.float64)

    critic, prompt_list = Critic(), [[1, 2], [3], [4, 5, 6], [7, 8]]
    optimizers = ppo.make_optimizers(policy, critic, cfg)
    rollout = ppo.collect(policy, policy, critic, score, prompt_list, cfg, 0.1, 9, PAD)
    ppo.update(policy, critic, optimizers, rollout, cfg)
    assert [sorted(x.tolist()) for x in told] == 2 * [[1, 2, 2, 3]]


def test_the_head_learns_with_the_trunks_rate_and_the_scalar_part_with_a_higher_one(monkeypatch):
    groups = [(ROWS[:2], [(0, 1)])] * 4
    made, real = [], reward.loop.adamw
    monkeypatch.setattr(reward.loop, "adamw", lambda *a, **k: made.append(real(*a, **k)) or made[0])
    model = ReadingGPT(TINY)
    reward.train(model, groups, PAD, RMConfig(device="cpu", dtype="float32"), RunLog())
    rates = {
        id(p): g["initial_lr"] / RMConfig.learning_rate
        for g in made[0].param_groups
        for p in g["params"]
    }
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        name: pytest.approx(10 if name == "score.weight" else 1)
        for name, _ in model.named_parameters()
    }


# --- near misses ---


def test_a_near_miss_differs_in_one_word_and_is_held_out_only_if_the_prompt_is():
    rng = random.Random(0)
    for held_out in False, True:
        changed = set()
        for prompt in prompts(400, seed=5, held_out=held_out):
            request, other = Request.parse(prompt), Request.parse(near_miss(prompt, rng))
            differs = [slot for slot in SLOTS if getattr(request, slot) != getattr(other, slot)]
            assert len(differs) == 1 or (other == request and not held_out)
            assert held_out or not other.held_out
            changed |= set(differs)
        assert changed == {*SLOTS}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_near_miss_can_be_had_in_a_certain_word(slot):
    rng = random.Random(0)
    for prompt in prompts(100, held_out=True):
        request, other = Request.parse(prompt), Request.parse(near_miss(prompt, rng, slot))
        assert other == dataclasses.replace(request, **{slot: getattr(other, slot)}) != request


@pytest.fixture(scope="module")
def small():
    tok = tokenizer.learn(prompts(50), 400)
    torch.manual_seed(0)
    return GPT(GPTConfig(tok.vocab_size, 160, n_layer=1, n_head=2, n_embd=16)).eval(), tok


CFG = ComparisonConfig(device="cpu", dtype="float32", annotator_temperature=0.0, max_new_tokens=12)


def careful_authors(model, prompts, length, eos, pad, G, **settings):
    """In the place of a model: good stories, so that each suits its own request best."""
    rng, rows = random.Random(0), []
    for prompt in prompts:
        for _ in range(G):
            story = environment.write(Request.parse(model.decode(prompt)), rng, care=1)
            rows.append((prompt + model.encode(story) + [eos], len(prompt)))
    return rows


def test_near_misses_share_their_answers_and_are_judged_each_by_its_own_request(
    small, monkeypatch
):
    _, tok = small
    monkeypatch.setattr(reward, "generate_rows", careful_authors)
    groups, _ = compare_samples(tok, tok, 12, 4, CFG, held_out=False)
    asked = [tok.decode(rows[0][0][: rows[0][1]]) for rows, _ in groups]
    assert len(asked) == 12 and asked[::2] == prompts(12, CFG.seed)[::2]
    for i in range(0, 12, 2):
        answers = [[tokens[n:] for tokens, n in rows] for rows, _ in groups[i : i + 2]]
        assert answers[0] == answers[1] and len(answers[0]) == 4
        one, other = map(Request.parse, asked[i : i + 2])
        assert sum(getattr(one, slot) != getattr(other, slot) for slot in SLOTS) == 1
        for prompt, (rows, pairs) in zip(asked[i : i + 2], groups[i : i + 2], strict=True):
            assert {tok.decode(tokens[:n]) for tokens, n in rows} == {prompt}
            gold = [environment.gold(prompt, tok.decode(tokens[n:-1])) for tokens, n in rows]
            assert len(pairs) == 6 and all(gold[i] >= gold[j] for i, j in pairs)


def test_half_of_the_shared_answers_are_written_for_either_prompt(small, monkeypatch):
    sft, tok = small
    asked, real = [], reward.generate_rows

    def generate_rows(model, prompts, *others, G, **settings):
        asked.append((prompts, G))
        return real(model, prompts, *others, G=G, **settings)

    monkeypatch.setattr(reward, "generate_rows", generate_rows)
    groups, _ = compare_samples(sft, tok, 4, 4, CFG, held_out=False)
    [(written_for, G)] = asked
    assert G == 2 and [p for p in written_for] == [rows[0][0][: rows[0][1]] for rows, _ in groups]


def test_held_out_comparisons_have_no_near_misses(small):
    sft, tok = small
    groups, _ = compare_samples(sft, tok, 5, 2, CFG, held_out=True)
    asked = [tok.decode(rows[0][0][: rows[0][1]]) for rows, _ in groups]
    assert asked == prompts(5, CFG.seed, held_out=True)
    assert [len(rows) for rows, _ in groups] == [2] * 5


# --- the probe ---


class Judge(nn.Module):
    """A reward model that gives a function of the texts."""

    def __init__(self, tok, judge):
        super().__init__()
        self.tok, self.judge, self.device = tok, judge, torch.device("cpu")
        self.config = GPTConfig(tok.vocab_size, 400, n_layer=1, n_head=1, n_embd=1)

    def forward(self, tokens, prompt_len):
        texts = [
            (self.tok.decode(row[:n]), self.tok.decode([t for t in row[n:] if t != self.tok.pad]))
            for row, n in zip(tokens.tolist(), prompt_len.tolist(), strict=True)
        ]
        scores = torch.tensor([float(self.judge(p, r)) for p, r in texts])
        return scores[:, None].expand(tokens.shape)


def test_the_true_reward_reads_the_request_and_a_blind_judge_does_not(small):
    _, tok = small
    gold = reads_request(Judge(tok, environment.gold), tok, 50, 1)
    assert all(gold[f"reads_{slot}"] == 1 for slot in SLOTS)
    assert all(0.9 < gold[f"reads_{slot}_low"] < 1 for slot in SLOTS)
    blind = reads_request(Judge(tok, lambda prompt, story: len(story)), tok, 50, 1)
    assert all(blind[f"reads_{slot}"] == 0.5 for slot in SLOTS)  # a tie is half right


@pytest.mark.parametrize("read", SLOTS)
def test_a_judge_who_reads_one_word_of_the_request_is_told_from_the_others(small, read):
    _, tok = small

    def judge(prompt, story):
        return environment.parts(prompt, story)[read]

    found = reads_request(Judge(tok, judge), tok, 50, 1)
    assert {slot: found[f"reads_{slot}"] for slot in SLOTS} == {
        slot: 1.0 if slot == read else 0.5 for slot in SLOTS
    }


def test_the_probe_asks_for_held_out_requests(small, monkeypatch):
    _, tok = small
    seen = []
    judge = Judge(tok, lambda prompt, story: seen.append(prompt) or 0.0)
    reads_request(judge, tok, 20, 1)
    assert set(seen[:20]) == {*prompts(20, 1, held_out=True)} and len(seen) == 100
