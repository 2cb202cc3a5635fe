"""Two ways to the same number: step by step and at once, alone and in company, compiled and not,
here and in transformers. Attention's two forms are in test_attention.py."""

import random
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from nanorlhf import generate, reward, tokenizer
from nanorlhf.attention import attend_plain, causal_mask
from nanorlhf.logprobs import (
    entropy,
    response_logits,
    response_logprobs,
    response_tokens,
    response_window,
    token_logprobs,
)
from nanorlhf.model import GPT, GPTConfig, KVCache, ScalarGPT
from nanorlhf.support.config import autocast, compile_trunks
from nanorlhf.support.data import collate

EOS, PAD = 9, 10
TINY = GPTConfig(vocab_size=11, n_positions=32, n_layer=2, n_head=2, n_embd=16)
PROMPTS = [[1], [2, 4, 5, 6, 3, 1, 1], [6, 7], [8, 0, 1, 2]]


def scrambled(model, seed=0, by=0.3):
    """Every weight random, biases and LayerNorms too, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            w += by * torch.randn_like(w)
    return model.eval()


# --- step by step and at once ---


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("dtype, gap", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_each_token_was_drawn_from_what_the_scorer_says(monkeypatch, temperature, dtype, gap):
    """The cached, one-token logits that the sampler saw against one pass over the whole. Rows that
    have ended are dropped on the way."""
    torch.manual_seed(1)
    model, steps, real = scrambled(GPT(TINY)).to(dtype), [], generate.sample
    rows, B = [torch.arange(4 * len(PROMPTS))], 4 * len(PROMPTS)

    def spy(logits, temperature, u):
        steps.append((rows[-1], (logits / temperature).log_softmax(-1)))
        return real(logits, temperature, u)

    def keep(cache, alive, real=KVCache.keep):
        rows.append(rows[-1][alive])
        real(cache, alive)

    monkeypatch.setattr(generate, "sample", spy)
    monkeypatch.setattr(KVCache, "keep", keep)
    tokens, prompt_len, mask = generate.generate(model, PROMPTS * 4, 20, temperature, EOS, PAD)
    R = mask.shape[1]
    seen = torch.zeros(B, R, TINY.vocab_size, dtype=dtype)
    for r, (of, logp) in enumerate(steps[:R]):
        seen[of, r] = logp
    chosen = response_tokens(tokens, prompt_len, R)
    with torch.no_grad():
        said = response_logprobs(model, tokens, prompt_len, R, temperature)
        everything = response_logits(model, tokens, prompt_len, R)
    drawn = seen.gather(-1, chosen[..., None]).squeeze(-1)
    assert (drawn - said)[mask].abs().max() < gap
    assert (seen - (everything / temperature).log_softmax(-1))[mask].abs().max() < gap
    assert mask.sum(1).min() < 6 and mask.sum(1).max() > 12  # rows that end and rows that go on
    assert len(rows) > 1


# --- alone and in company ---

ROWS = [
    ([1, 2, 3, EOS], 2),
    ([4, 5, 6, 7, 8, 1, 2, 3, 4, 5, EOS], 7),
    ([2, 2], 1),
    ([0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8], 3),
]


@torch.no_grad()
def said_of(policy, critic, rows, pad, wider=0, dtype="float32"):
    """Log-probs, entropies, values and the score. -> one tensor a row, its padding left out"""
    tokens, prompt_len, mask = collate(rows, pad)
    tokens, R = F.pad(tokens, (0, wider), value=pad), mask.shape[1]
    with autocast(policy.device, dtype):
        logits = response_logits(policy, tokens, prompt_len, R)
        everywhere = torch.stack(
            [
                token_logprobs(logits, response_tokens(tokens, prompt_len, R), 0.7),
                entropy(logits, 0.7),
                response_window(critic(tokens), prompt_len, R),
            ]
        )
        scores = reward.score(critic, tokens, prompt_len, mask)
    return [
        torch.cat([everywhere[:, b, :n].flatten(), scores[b : b + 1]])
        for b, n in enumerate(mask.sum(1).tolist())
    ]


def every_company(policy, critic, dtype="float32"):
    """Yield (row alone, the same row elsewhere) for many a batch and padding."""
    alone = [said_of(policy, critic, [row], PAD, dtype=dtype)[0] for row in ROWS]
    for pad in PAD, EOS, 0:
        for wider in 0, 1, 18:
            together = said_of(policy, critic, ROWS, pad, wider, dtype)
            yield from zip(alone, together, strict=True)
            for i, row in enumerate(ROWS):
                yield alone[i], said_of(policy, critic, [row], pad, wider, dtype)[0]
                # The same row thrice, so that its place in the batch is seen to be indifferent.
                crowd = [row, ROWS[(i + 1) % 4], row, ROWS[(i + 3) % 4], row]
                for at in 0, 2, 4:
                    yield alone[i], said_of(policy, critic, crowd, pad, wider, dtype)[at]


def test_nothing_said_of_a_row_depends_on_padding_or_on_who_shares_the_batch():
    policy, critic = scrambled(GPT(TINY)), scrambled(ScalarGPT(TINY), seed=1)
    pairs = list(every_company(policy, critic))
    assert len(pairs) == 9 * (4 + 4 * 4)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-5


def test_in_bfloat16_company_costs_no_more_than_bfloat16_itself():
    """Another batch size may sum in another order, and then a number rounds to its neighbour. So
    the same bits are not promised: only that company adds no error of a larger kind."""
    policy, critic = scrambled(GPT(TINY), seed=2), scrambled(ScalarGPT(TINY), seed=12)
    exact = [said_of(policy, critic, [row], PAD)[0] for row in ROWS]
    rounded = [said_of(policy, critic, [row], PAD, dtype="bfloat16")[0] for row in ROWS]
    own = max((a - b).abs().max() for a, b in zip(exact, rounded, strict=True))
    pairs = every_company(policy, critic, "bfloat16")
    assert 1e-3 < own < 0.2  # bfloat16 was at work
    assert max((a - b).abs().max() for a, b in pairs) <= own


def test_logprobs_and_values_cannot_look_ahead():
    """A token changes its own log-prob and those after it; the values after it, and not its own:
    the critic speaks before the token. The score, read at the end, knows the prompt as well."""
    policy, critic = scrambled(GPT(TINY), by=0.1), scrambled(ScalarGPT(TINY), seed=1, by=0.1)
    tokens, prompt_len = ROWS[1]
    R = len(tokens) - prompt_len
    before = said_of(policy, critic, [ROWS[1]], PAD)[0]
    for changed in range(len(tokens)):
        other = tokens[:changed] + [(tokens[changed] + 1) % 9] + tokens[changed + 1 :]
        moved = (said_of(policy, critic, [(other, prompt_len)], PAD)[0] - before).abs() > 1e-5
        itself = [prompt_len + r >= changed for r in range(R)]
        behind = [prompt_len + r > changed for r in range(R)]
        # Log-probs, entropies, values, and the score.
        assert moved.tolist() == itself + behind + behind + [True]


# --- compiled and eager ---


def can_compile():
    header = Path(sysconfig.get_path("include"), "Python.h")
    return header.is_file() and any(map(shutil.which, ("g++", "clang++")))


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no Python.h")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_model_says_and_learns_the_same():
    """Half a minute where it is compiled for the first time, a few seconds after that."""
    model, tokens = scrambled(GPT(GPTConfig(11, 16, 1, 2, 16))), torch.randint(11, (3, 10))
    q, k, v = torch.randn(3, 2, 2, 10, 8)

    def learn(forward):
        model.zero_grad()
        logits = forward(tokens)
        logits.log_softmax(-1)[..., 3].mean().backward()
        return [logits.detach(), *(w.grad.clone() for w in model.parameters())]

    with torch._inductor.config.patch(compile_threads=1):
        compiled = learn(torch.compile(model, dynamic=False))
        attended = torch.compile(attend_plain, dynamic=False)(q, k, v, causal_mask(10, "cpu"))
    torch._dynamo.reset()
    for ours, theirs in zip(learn(model), compiled, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4) and ours.abs().max() > 1e-3
    assert torch.allclose(attended, attend_plain(q, k, v, causal_mask(10, "cpu")), atol=1e-5)


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no Python.h")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_writes_the_same():
    model = scrambled(GPT(GPTConfig(11, 64, 1, 2, 16)))
    plain = generate.generate(model, PROMPTS, 12, 0, EOS, PAD)
    with torch._inductor.config.patch(compile_threads=1):
        compile_trunks(True, model)
        assert model.compiled
        compiled = generate.generate(model, PROMPTS, 12, 0, EOS, PAD)
    torch._dynamo.reset()
    for ours, theirs in zip(plain, compiled, strict=True):
        assert torch.equal(ours, theirs)


# --- here and in transformers: logits ---

SHAPES = [
    GPTConfig(vocab_size=7, n_positions=10, n_layer=1, n_head=1, n_embd=8),
    GPTConfig(vocab_size=300, n_positions=10, n_layer=2, n_head=4, n_embd=32),
    GPTConfig(vocab_size=50, n_positions=64, n_layer=3, n_head=2, n_embd=12),
    GPTConfig(vocab_size=3, n_positions=33, n_layer=1, n_head=4, n_embd=4),
]


def named(config):
    return f"{config.n_layer}x{config.n_embd}/{config.n_head}, {config.vocab_size} tokens"


@torch.no_grad()
def assert_same_logits(ours, theirs, config):
    """In float64, where a tanh too few or a wrong epsilon is a million times too much."""
    torch.manual_seed(3)
    tokens = torch.randint(config.vocab_size, (3, config.n_positions))
    found, wanted = ours.double()(tokens), theirs.double()(tokens).logits
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max()
    assert wanted.std() > 0.1


@pytest.mark.parametrize("config", SHAPES, ids=named)
def test_a_gpt2_of_any_shape_saved_there_says_the_same_here(config, tmp_path):
    shape = {k: v for k, v in vars(config).items() if k != "dropout"}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=0))
    scrambled(theirs).save_pretrained(tmp_path)
    ours = GPT.load(tmp_path)
    assert ours.config == config
    assert_same_logits(ours, theirs, config)


@pytest.mark.parametrize("config", SHAPES, ids=named)
def test_a_gpt_of_any_shape_saved_here_says_the_same_there(config, tmp_path):
    ours = scrambled(GPT(config))
    ours.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs, config)


# --- here and in transformers: scores ---


@torch.no_grad()
def test_a_normalised_reward_model_scores_the_same_there(tmp_path):
    """transformers reads the last token that is no pad, so it has to be told which one that is."""
    model, rng = scrambled(ScalarGPT(TINY)), random.Random(0)
    rows = [([rng.randrange(10) for _ in range(rng.randint(2, 30))], 1) for _ in range(40)]
    before = reward.score_rows(reward.by_model(model), rows, PAD, model.device, "float32")
    reward.normalise(model, rows, PAD, "float32")
    after = reward.score_rows(reward.by_model(model), rows, PAD, model.device, "float32")
    model.save(tmp_path, pad_token_id=PAD)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokens, _, _ = collate(rows, PAD)
    assert (theirs(tokens).logits[:, 0] - after).abs().max() < 1e-5
    assert after.mean().abs() < 1e-5 and after.std().item() == pytest.approx(1, abs=1e-5)
    assert (before - after).abs().max() > 0.1


# --- here and in transformers: the likeliest continuation ---


@pytest.mark.parametrize("eos", [None, 3])
def test_the_likeliest_continuation_is_the_same_there(eos, tmp_path):
    """Theirs needs left padding, a mask and shifted positions for prompts of mixed length."""
    torch.manual_seed(0)
    model = scrambled(GPT(TINY), seed=4)
    model.save(tmp_path, pad_token_id=PAD)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, prompt_len, mask = generate.generate(model, PROMPTS, 20, 0, eos, PAD)
    ends = prompt_len + mask.sum(1)
    ours = [row[n:end].tolist() for row, n, end in zip(tokens, prompt_len, ends, strict=True)]

    P = max(map(len, PROMPTS))
    padded = torch.tensor([[PAD] * (P - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in PROMPTS])
    out = theirs.generate(
        padded, attention_mask=seen, do_sample=False, max_new_tokens=20, eos_token_id=eos,
        pad_token_id=PAD,
    )  # fmt: skip
    found = [row[P:].tolist() for row in out]
    found = [row[: row.index(eos) + 1] if eos in row else row for row in found]
    assert found == ours
    lengths = set(map(len, ours))
    assert len({tuple(row) for row in ours}) == 4 and (lengths == {20}) == (eos is None)


@torch.no_grad()
def test_the_pipeline_opens_a_folder_and_writes_the_same_greedy_tokens(tmp_path):
    """Everything comes from the folder: weights, tokenizer, and which token ends a response."""
    tok = tokenizer.learn(["a penguin and a drum"], 266)
    torch.manual_seed(4)
    model = scrambled(GPT(GPTConfig(tok.vocab_size, 40, 2, 2, 16)))
    model.transformer.wte.weight[tok.eos] *= 2  # so that some of the responses end
    model.save(tmp_path, tok)

    texts = ["a", "a drum", " and a penguin", "é"]
    prompts = [tok.encode(text) for text in texts]
    tokens, prompt_len, mask = generate.generate(model, prompts, 20, 0, tok.eos, tok.pad)
    assert mask.sum(1).tolist() == [20, 2, 15, 1]
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    for text, row, start, n in zip(texts, tokens.tolist(), prompt_len, mask.sum(1), strict=True):
        settings = dict(do_sample=False, max_new_tokens=20)
        [ids] = pipe(text, return_tensors=True, **settings)
        [words] = pipe(text, return_full_text=False, **settings)
        assert ids["generated_token_ids"] == row[: start + n]
        assert words["generated_text"] == tok.decode(row[start : start + n])


# --- here and in transformers: tokens ---


def awkward_texts(rng, n):
    """Texts of the kinds that tokenizers disagree about, pure and mixed."""
    space = " \t\n\r\v\f\x1c\x85\u00a0\u1680\u180e\u2003\u200b\u2028\u2029\u3000\ufeff"
    contractions = ["'s", "'S", "'t", "'T", "'re", "'RE", "'ll", "'Ll", "'d", "'m", "'ve", "’s"]
    words = ["word", "Word", "naïve", "ẞßſ", "漢字", "한국어", "ไทย", "a_b", "İi", "ﬁ"]

    def some(letters, least, most):
        return "".join(rng.choices(letters, k=rng.randint(least, most)))

    kinds = [
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: chr(rng.randrange(0x20)) + chr(rng.randrange(0x7F, 0xA1)),  # control characters
        lambda: rng.choice(space) * rng.choice([1, 2, 9]),
        lambda: some(["\r\n", "\n", " ", "\t"], 2, 6),
        lambda: "\u200d".join(some("👩👨👧💻🚀❤🏳🌈🏽", 1, 2) for _ in range(3)) + "\ufe0f",
        lambda: "e" + some([chr(mark) for mark in range(0x300, 0x370)], 1, 4),
        lambda: some("שלום عربي١٢٣ \u200f\u202b", 2, 8),  # right to left
        lambda: some("0123456789²½Ⅷ٣४.,-", 1, 12),
        lambda: rng.choice(["it", "I", "WE", "é", "1", "!", ""]) + rng.choice(contractions),
        lambda: rng.choice(words) + " ",
        lambda: some("!?#$%&()*+,-./:;<=>@[]^_`{|}~", 1, 7),
        lambda: some("abcdeXYZ", 50, 400),  # words that never end
    ]
    for _ in range(n):
        yield "".join(make() for make in rng.choices(kinds, k=rng.randint(1, 9)))


@pytest.mark.parametrize("which", ["gpt2", "learned"])
def test_the_tokens_of_awkward_texts_are_the_same_there(which, request, tmp_path):
    rng = random.Random(6)
    if which == "gpt2":
        request.getfixturevalue("gpt2_cache")
        ours = tokenizer.load("gpt2")
    else:
        ours = tokenizer.learn(list(awkward_texts(rng, 300)), 1000)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in awkward_texts(rng, 3000):
        tokens = ours.encode(text)
        assert theirs(text)["input_ids"] == tokens
        assert ours.decode(tokens) == text == theirs.decode(tokens)
