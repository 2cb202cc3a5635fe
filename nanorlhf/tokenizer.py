"""Byte-level BPE: text in, token ids out, and back without loss.

    tokenizer = learn(texts, vocab_size)      our own vocabulary, from a corpus
    tokenizer = load("gpt2" or a folder)      GPT-2's, or one that was saved
    tokenizer.decode(tokenizer.encode(text)) == text

Ids run in GPT-2's order: the 256 bytes, the merges as they were learned, then two specials: end,
which closes a text, and pad, which fills a batch. tiktoken never hears of the specials, so no text
can produce them, not even "<|endoftext|>" (there alone transformers differs on the same files).
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken brings it along; Python's own re has no \p{L}
import tiktoken

from nanorlhf import UserError
from nanorlhf.support.checkpoint import replacing

END, PAD = "<|endoftext|>", "<|pad|>"
GPT2 = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"  # one vocabulary for all

# GPT-2's split: contractions, words, numbers and signs, each with one space before it; no merge
# crosses from one piece to the next. The ++ forbid backtracking: faster, and the same pieces.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken panics on a run of a million spaces, so it gets long ones in parts.
LONG_RUN = re.compile(r"(\s{1000})(?=\s)")

# How files spell a byte: a printable one as itself, the others as letters from U+0100 on. The ids
# of the single bytes follow the same order.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTES = [bytes([b]) for b in PRINTABLE + HIDDEN]


def learn(texts, vocab_size):
    """Merge the most frequent pair of neighbours, again and again. -> Tokenizer

    vocab_size counts bytes, merges and specials; it stays smaller if the corpus runs out of pairs.
    """
    if vocab_size < 258:
        raise UserError(f"expected a vocab_size of at least 258, came {vocab_size}")
    words, counts = count_words(texts)
    pair_count, where = count_pairs(words, counts)
    # The count of a known pair can only fall, so what the heap says is true or too high: each entry
    # is checked on its way out, and put back if stale. Ties go to the pair with the lowest ids.
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)

    vocab = list(BYTES)
    while heap and len(vocab) < vocab_size - 2:
        count, pair = heapq.heappop(heap)
        if -count == pair_count[pair]:
            vocab.append(vocab[pair[0]] + vocab[pair[1]])
            changed = merge_everywhere(pair, len(vocab) - 1, words, counts, pair_count, where)
        else:
            changed = {pair} if pair_count[pair] else ()
        for pair in changed:
            heapq.heappush(heap, (-pair_count[pair], pair))
    return Tokenizer({token: i for i, token in enumerate(vocab)})


def count_words(texts):
    """texts -> each distinct word as a list of ids, and how often it occurs."""
    # A page of base64 is one word to the pattern; beyond 256 letters nothing is worth a token.
    tally = Counter(word[:256] for text in texts for word in regex.findall(SPLIT, text))
    ids = {token[0]: i for i, token in enumerate(BYTES)}
    words = [[ids[b] for b in word.encode("utf-8", "replace")] for word in tally]
    return words, list(tally.values())


def count_pairs(words, counts):
    """How often each pair of neighbours occurs in the corpus, and in which words."""
    pair_count, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += counts[i]
            where[pair].add(i)
    return pair_count, where


def merge_everywhere(pair, new, words, counts, pair_count, where):
    """Merge the pair in every word that holds it; keep the counts true. -> the pairs it creates"""
    born = set()
    for i in where.pop(pair):
        for old in pairwise(words[i]):
            pair_count[old] -= counts[i]
        words[i] = merge_pair(words[i], pair, new)
        for now in pairwise(words[i]):
            pair_count[now] += counts[i]
            if new in now:
                where[now].add(i)
                born.add(now)
    return born


def merge_pair(word, pair, new):
    """[5, 6, 5, 6, 7] with pair (5, 6) -> [new, new, 7], from the left."""
    merged, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return merged


class Tokenizer:
    """ranks: bytes -> id from 0 without holes, for every token but the two specials."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.eos = len(ranks)
        self.pad = len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        # By these names a model's config.json tells other libraries where a text ends.
        self.special = dict(bos_token_id=self.eos, eos_token_id=self.eos, pad_token_id=self.pad)
        self._bpe = tiktoken.Encoding(
            "bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text):
        """str -> list of ids. Half a surrogate pair, which UTF-8 cannot write, becomes U+FFFD."""
        return [token for part in LONG_RUN.split(text) for token in self._bpe.encode_ordinary(part)]

    def decode(self, tokens):
        """List of ids -> str, specials left out. A character cut in two becomes U+FFFD."""
        return self._bpe.decode([token for token in tokens if token not in (self.eos, self.pad)])

    def pieces(self, tokens):
        """List of ids -> one printable string each, for plots."""
        special = {self.eos: "<end>", self.pad: "<pad>"}
        return [special.get(t) or printable(self._bpe.decode_single_token_bytes(t)) for t in tokens]

    def save(self, folder):
        """Write the three files by which transformers' AutoTokenizer knows a GPT-2 tokenizer."""
        vocab = spell_vocab(self.ranks)
        # Which two tokens a merge joined is not stored: earlier merges lead to exactly those two.
        merged = [apply_merges(token, self.ranks, below=i) for token, i in self.ranks.items()]
        merges = [" ".join(map(spell, parts)) for parts in merged if len(parts) == 2]
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "clean_up_tokenization_spaces": False,
            "bos_token": END, "eos_token": END, "unk_token": END, "pad_token": PAD,
        }
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges]),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with replacing(Path(folder) / name) as file:
                file.write((text + "\n").encode())


def printable(token):
    r"""b" the" -> " the", b"\n" -> "\\n", and half a character -> "\\xe2"."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def apply_merges(piece, ranks, below):
    """What tiktoken does to a piece, written out: join the neighbours of lowest rank, repeat.

    Only ranks under `below` count. b"hello" -> [b"he", b"llo"]
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        if joined[i] >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spell(token):
    """b" the" -> "Ġthe", as vocab.json and merges.txt write it."""
    return "".join(SPELLING[b] for b in token)


def spell_vocab(ranks):
    """What vocab.json holds: every token, the specials included."""
    return {spell(t): i for t, i in ranks.items()} | {END: len(ranks), PAD: len(ranks) + 1}


def load(name_or_folder):
    """One of GPT-2's names, or a folder with vocab.json and merges.txt. -> Tokenizer"""
    if name_or_folder in GPT2:
        return Tokenizer(gpt2_ranks())
    ranks = read_merges(Path(name_or_folder) / "merges.txt")
    check_vocab(Path(name_or_folder) / "vocab.json", spell_vocab(ranks))
    return Tokenizer(ranks)


def gpt2_ranks():
    """GPT-2's 50,256 tokens from tiktoken's cache, which fills itself where there is a network."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(
            "expected GPT-2's vocabulary in tiktoken's cache or on the network, found neither; "
            "let TIKTOKEN_CACHE_DIR name a folder that holds it, or go online once"
        ) from error
    return {gpt2.decode_single_token_bytes(i): i for i in range(gpt2.eot_token)}


def read_merges(path):
    """merges.txt -> ranks: the 256 bytes, then one merge a line."""
    known = {spell(token): token for token in BYTES}
    for number, line in enumerate(read(path).rstrip("\n").split("\n"), 1):
        if number == 1 and line.startswith("#version"):
            continue
        a, _, b = line.partition(" ")
        if a not in known or b not in known or a + b in known:
            expected = "expected two known tokens that make a new one"
            raise UserError(f"{path}:{number}: {expected}, came {line[:60]!r}")
        known[a + b] = known[a] + known[b]
    return {token: i for i, token in enumerate(known.values())}


def check_vocab(path, expected):
    """The merges already say which ids there must be; vocab.json has to agree."""
    try:
        vocab = dict(json.loads(read(path)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object of token: id, came {error}") from error
    vocab.setdefault(PAD, expected[PAD])  # GPT-2's own files have no pad
    for token in expected | vocab:
        ours, came = expected.get(token), vocab.get(token)
        if ours != came:
            raise UserError(f"{path}: expected id {ours} for {token!r} by merges.txt, came {came}")


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "bytes that are not UTF-8"
        raise UserError(f'{path}: expected "gpt2" or a folder with this file, {why}') from error
