"""Encoding loses nothing, no text yields a special token, and transformers agrees on the files."""

import json
import random
import time
from itertools import pairwise

import pytest
import tiktoken
import torch

from nanorlhf.model import GPTConfig, ScalarGPT
from nanorlhf.reward import score
from nanorlhf.support import UserError
from nanorlhf.support.bpe_files import BYTES, apply_merges
from nanorlhf.support.data import collate
from nanorlhf.tokenizer import learn, load, merge_pair

STORY = "the cat sat on the mat, the cat saw the other cat; it's 1999 and the cat isn't there\n" * 3


@pytest.fixture(scope="module")
def tokenizer():
    return learn([STORY], 280)


@pytest.fixture(scope="module")
def gpt2(gpt2_cache):
    return load("gpt2")


def noise(rng, length=60):
    """Text that no corpus prepares for: letters, signs and white space of every kind."""
    return "".join(rng.choices("aabbccthesx    \n\t\u00a0\u2028'!_0²é漢😀", k=length))


def any_character(rng):
    return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))


# --- learning ---


def test_the_first_merge_is_the_most_frequent_pair():
    tokenizer = learn(["ab ab ab cd"], 259)  # one merge: "ab" stands 3 times, " a" twice
    assert [t for t in tokenizer.ranks if len(t) > 1] == [b"ab"]


def test_merges_build_on_merges_and_ties_go_to_the_lowest_ids():
    # (a, b), (b, c), (c, d) all stand once; a is first. Then (ab, c) ties with (c, d), and loses.
    tokenizer = learn(["abcd"], 300)
    assert [t for t in tokenizer.ranks if len(t) > 1] == [b"ab", b"cd", b"abcd"]
    assert tokenizer.vocab_size == 256 + 3 + 2  # the corpus had no more to give


def test_a_merge_is_applied_from_the_left_and_never_overlaps():
    assert merge_pair([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]


def test_learning_does_not_depend_on_the_order_of_the_corpus():
    lines = STORY.split(" ")
    assert learn(lines, 300).ranks == learn(lines[::-1], 300).ranks


def test_no_merge_crosses_from_one_word_into_the_next():
    tokenizer = learn(["to be to be to be"], 400)
    assert tokenizer.pieces(tokenizer.encode("to be")) == ["to", " be"]


def test_vocab_size_counts_bytes_merges_and_specials(tokenizer):
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (278, 279, 280)
    with pytest.raises(UserError, match="at least 258"):
        learn([STORY], 257)


def test_learned_counts_are_those_of_a_recount_from_scratch():
    """Count all pairs anew before every merge: slow, and no count can be out of date."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 9))) for _ in range(80)]
    ids = {token: i for i, token in enumerate(BYTES)}
    corpus = [[ids[bytes([b])] for b in word.encode()] for word in words]
    vocab = list(BYTES)
    for new in range(256, 336):
        pairs = [pair for word in corpus for pair in pairwise(word)]
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair))
        corpus = [merge_pair(word, best, new) for word in corpus]
        vocab.append(vocab[best[0]] + vocab[best[1]])
    assert list(learn(words, 338).ranks) == vocab


# --- encoding and decoding ---


def test_any_text_survives_encoding_and_decoding(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        text = noise(rng) + any_character(rng) + noise(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_tiktoken_and_the_plain_merge_loop_agree():
    rng = random.Random(2)
    tokenizer = learn([noise(rng, 2000).replace(" ", "x") for _ in range(5)], 500)
    for _ in range(300):
        word = "".join(rng.choice("abcthex") for _ in range(30))  # one piece to the split
        parts = apply_merges(word.encode(), tokenizer.ranks, below=float("inf"))
        assert [tokenizer.ranks[part] for part in parts] == tokenizer.encode(word)


def test_text_cannot_spell_a_special_token(tokenizer):
    text = "<|endoftext|> and <|pad|>"
    tokens = tokenizer.encode(text)
    assert not {tokenizer.eos, tokenizer.pad} & set(tokens)
    assert tokenizer.decode(tokens) == text


def test_special_tokens_are_left_out_of_decoded_text(tokenizer):
    tokens = [*tokenizer.encode("the cat"), tokenizer.eos, tokenizer.pad, tokenizer.pad]
    assert tokenizer.decode(tokens) == "the cat"


def test_half_a_character_decodes_to_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # half a surrogate pair


def test_pieces_are_the_tokens_one_by_one(tokenizer):
    tokens = tokenizer.encode("the cat\n") + tokenizer.encode("é")[:1]
    tokens += [tokenizer.eos, tokenizer.pad]
    assert tokenizer.pieces(tokens) == ["the", " cat", "\n", "\ufffd", "<end>", "<pad>"]


@pytest.mark.parametrize("run", [" ", "\n", "a", "7", "!", "\t "])
def test_a_gigantic_run_neither_crashes_nor_hangs(tokenizer, run):
    text = run * (10**6 // len(run)) + "x"
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10


def test_learning_from_one_endless_word_does_not_hang():
    rng = random.Random(3)
    start = time.perf_counter()
    learn(["".join(rng.choice("abcdefgh") for _ in range(300_000))], 1000)
    assert time.perf_counter() - start < 5


# --- on disk ---


def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    again = load(tmp_path / "new" / "folder")
    assert again.ranks == tokenizer.ranks
    assert (again.eos, again.pad, again.vocab_size) == (278, 279, 280)


def test_transformers_opens_the_folder_and_gives_the_same_ids(tmp_path):
    """It merges the pairs of merges.txt, tiktoken any two that spell a token: no text may tell."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(5)
    tokenizer = learn([STORY, *(noise(rng, 500) for _ in range(20))], 500)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos, tokenizer.pad)
    for text in ["it's  12.5\n\n", " lead", "trail  ", *(noise(rng) for _ in range(300))]:
        tokens = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode([*tokens, tokenizer.eos], skip_special_tokens=True) == text


def test_the_special_ids_tell_transformers_where_a_row_ends_and_what_fills_it(tmp_path):
    """Were they swapped, it would read a reward at the padding, or one token early."""
    transformers = pytest.importorskip("transformers")
    tokenizer = learn([STORY], 300)
    torch.manual_seed(0)
    model = ScalarGPT(GPTConfig(tokenizer.vocab_size, 16, n_layer=1, n_head=2, n_embd=16)).eval()
    model.save(tmp_path, **tokenizer.special)
    tokenizer.save(tmp_path)
    config, vocab = (
        json.loads((tmp_path / name).read_text(encoding="utf-8"))
        for name in ("config.json", "vocab.json")
    )
    assert config["bos_token_id"] == config["eos_token_id"] == vocab["<|endoftext|>"]
    assert config["pad_token_id"] == vocab["<|pad|>"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = collate([([1, 2, 3, 4, 5, tokenizer.eos], 2), ([6, tokenizer.eos], 1)], tokenizer.pad)
    with torch.no_grad():
        assert torch.allclose(theirs(batch[0]).logits[:, 0], score(model, *batch), atol=1e-6)


def write(folder, vocab=None, merges=None):
    """A tiny folder by hand, one merge long, with parts of it replaced."""
    learn(["ab ab"], 259).save(folder)
    if vocab is not None:
        original = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        (folder / "vocab.json").write_text(vocab(original), encoding="utf-8")
    if merges is not None:
        (folder / "merges.txt").write_text(merges, encoding="utf-8")


def test_the_files_are_gpt2s_files(tmp_path):
    write(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert (vocab["!"], vocab["Ġ"], vocab["ab"], vocab["<|endoftext|>"], vocab["<|pad|>"]) == (
        0, 220, 256, 257, 258
    )  # fmt: skip
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\na b\n"


def test_a_vocabulary_without_pad_gets_one(tmp_path):
    """GPT-2's own files have none."""
    write(tmp_path, lambda v: json.dumps({t: i for t, i in v.items() if t != "<|pad|>"}))
    assert load(tmp_path).pad == 258


@pytest.mark.parametrize(
    "vocab, merges, message",
    [
        (lambda v: "{", None, r"vocab\.json: expected .* or a folder with this file"),
        (lambda v: "[1, 2]", None, r"vocab\.json: expected .* or a folder with this file"),
        (lambda v: "3", None, r"vocab\.json: expected .* or a folder with this file"),
        (lambda v: json.dumps(v | {"ab": "256"}), None, r"vocab\.json: expected id 256 for 'ab'"),
        (lambda v: json.dumps(v | {"ab": 300}), None, r"vocab\.json: expected id 256 for 'ab'"),
        (lambda v: json.dumps(v | {"more": 259}), None, r"vocab\.json: .*'more'"),
        (None, "#version: 0.2\na b\nab zz\n", r"merges\.txt:3: .*'ab zz'"),
        (None, "#version: 0.2\na b\na b\n", r"merges\.txt:3: expected a new pair .*'a b'"),
        (None, "#version: 0.2\na b c\n", r"merges\.txt:2"),
        (None, "#version: 0.2\na b\nab c\n", r"vocab\.json: .*'abc'"),
    ],
)
def test_a_damaged_folder_is_refused_by_file(tmp_path, vocab, merges, message):
    write(tmp_path, vocab, merges)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'nowhere.merges\.txt: expected "gpt2" or a folder'):
        load(tmp_path / "nowhere")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "vocab.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match=r"vocab\.json: .*'utf-8' codec"):
        load(tmp_path)


# --- GPT-2's own ---


def test_gpt2_by_name_is_gpt2(gpt2):
    assert (gpt2.eos, gpt2.pad, gpt2.vocab_size) == (50256, 50257, 50258)
    assert gpt2.encode("Hello world") == [15496, 995]
    theirs, rng = tiktoken.get_encoding("gpt2"), random.Random(4)
    for _ in range(200):
        text = noise(rng) + any_character(rng) + STORY
        assert gpt2.encode(text) == theirs.encode_ordinary(text)


def test_gpt2s_merges_are_recovered_to_the_letter(gpt2, gpt2_cache, tmp_path):
    gpt2.save(tmp_path)
    originals = [file.read_bytes() for file in gpt2_cache.iterdir()]
    assert (tmp_path / "merges.txt").read_bytes() in originals
    assert load(tmp_path).ranks == gpt2.ranks


def test_without_cache_or_network_gpt2_says_what_to_do(monkeypatch, tmp_path):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load("gpt2")


def test_on_real_text_it_packs_as_tightly_as_the_tokenizers_library(real_data):
    tokenizers = pytest.importorskip("tokenizers")
    text = (real_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    seen, held_out = text[:900_000], text[900_000:]
    ours = learn([seen], 1024)
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([seen], vocab_size=1022, show_progress=False)
    assert len(ours.encode(held_out)) == pytest.approx(len(theirs.encode(held_out)), rel=0.002)
