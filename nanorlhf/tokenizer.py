"""Byte-level BPE (byte pair encoding): text becomes token ids, and ids become the same text again.

    tokenizer = learn(texts, vocab_size)      a vocabulary of our own, learned from a corpus
    tokenizer = load("gpt2" or a folder)      GPT-2's vocabulary, or one that was saved
    tokenizer.decode(tokenizer.encode(text)) == text

The first 256 tokens are the single bytes. Each further token is a merge: two earlier tokens that
often stand side by side, joined. Two special tokens come last: the end token closes a text, and the
pad token fills up a batch. tiktoken, which does the encoding, is not told of these two, so no text
can produce them, not even "<|endoftext|>" (only here transformers differs on the same files).
"""
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken; Python's own re has no \p{L}
import tiktoken

from nanorlhf.support import UserError
from nanorlhf.support.checkpoint import replacing

END, PAD = "<|endoftext|>", "<|pad|>"
GPT2 = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"  # all have the same vocabulary

# GPT-2 first splits a text into contractions, words, numbers and signs, each with the space before
# it. No merge crosses from one piece to the next. ++ forbids backtracking, which makes it faster.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken crashes on a run of a million spaces, so it gets a long run in parts.
LONG_RUN = re.compile(r"(\s{1000})(?=\s)")

# How files spell a byte: a printable one as itself, the others as letters from U+0100 on. The ids
# of the single bytes have the same order.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTES = [bytes([b]) for b in PRINTABLE + HIDDEN]


def learn(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Merge the most frequent pair of neighbouring tokens, again and again.

    Of pairs that are equally frequent, the one with the lowest ids is merged. vocab_size counts
    bytes, merges and the two special tokens; the vocabulary stays smaller where the corpus runs out
    of pairs. Raises UserError where vocab_size is below 258.
    """
    if vocab_size < 258:
        raise UserError(f"expected a vocab_size of at least 258, came {vocab_size}")
    # Each distinct word is merged once, and counts as often as it occurs. It is cut at 256 letters:
    # a page of base64 is one word to the pattern, and no token of that length would be of use.
    word_counts = Counter(word[:256] for text in texts for word in regex.findall(SPLIT, text))
    ids, counts = {token[0]: i for i, token in enumerate(BYTES)}, list(word_counts.values())
    words = [[ids[b] for b in word.encode("utf-8", "replace")] for word in word_counts]
    pair_counts, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)

    vocab = list(BYTES)
    while len(vocab) < vocab_size - 2 and (highest := max(pair_counts.values(), default=0)):
        pair = min(pair for pair, count in pair_counts.items() if count == highest)
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
        for i in words_with.pop(pair):  # only in these words does any count change
            for old in pairwise(words[i]):
                pair_counts[old] -= counts[i]
            words[i] = merge_pair(words[i], pair, len(vocab) - 1)
            for new in pairwise(words[i]):
                pair_counts[new] += counts[i]
                words_with[new].add(i)
    return Tokenizer({token: i for i, token in enumerate(vocab)})


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """[5, 6, 5, 6, 7] with pair (5, 6) -> [new, new, 7], from the left."""
    merged, i = [], 0
    while i < len(word):
        match = tuple(word[i : i + 2]) == pair
        merged.append(new if match else word[i])
        i += 2 if match else 1
    return merged


class Tokenizer:
    """ranks: {bytes: id} for every token but the two special ones, ids from 0 without holes."""

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        self.eos = len(ranks)
        self.pad = len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        # The names by which a model's config.json tells other libraries the special tokens.
        self.special = dict(bos_token_id=self.eos, eos_token_id=self.eos, pad_token_id=self.pad)
        self._bpe = tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks,
                                      special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Half a surrogate pair, which UTF-8 cannot write, becomes U+FFFD."""
        return [token for part in LONG_RUN.split(text) for token in self._bpe.encode_ordinary(part)]

    def decode(self, tokens: list[int]) -> str:
        """Special tokens are left out, and a character that is cut in two becomes U+FFFD."""
        return self._bpe.decode([token for token in tokens if token not in (self.eos, self.pad)])

    def pieces(self, tokens: list[int]) -> list[str]:
        """One printable string for each token, as plots show it."""
        special = {self.eos: "<end>", self.pad: "<pad>"}
        return [special.get(t) or printable(self._bpe.decode_single_token_bytes(t)) for t in tokens]

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers expects them."""
        # Which two tokens a merge joined is not stored: the merges before it lead to these two.
        parts = [apply_merges(token, self.ranks, below=i) for token, i in self.ranks.items()]
        merges = [" ".join(map(spell, pair)) for pair in parts if len(pair) == 2]
        config = dict(tokenizer_class="GPT2Tokenizer", clean_up_tokenization_spaces=False,
                      bos_token=END, eos_token=END, unk_token=END, pad_token=PAD)
        files = {
            "vocab.json": json.dumps(spell_vocab(self.ranks), ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges]),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with replacing(Path(folder) / name) as file:
                file.write((text + "\n").encode())


def printable(token: bytes) -> str:
    r"""b" the" -> " the", b"\n" -> "\\n", and half a character -> "\\xe2"."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def apply_merges(piece: bytes, ranks: dict[bytes, int], below: float) -> list[bytes]:
    """What tiktoken does with a piece: join the two neighbours of lowest rank, again and again.

    Only ranks lower than `below` count. b"hello" -> [b"he", b"llo"]
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        if joined[i] >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spell(token: bytes) -> str:
    """b" the" -> "Ġthe", as vocab.json and merges.txt write it."""
    return "".join(SPELLING[b] for b in token)


def spell_vocab(ranks: dict[bytes, int]) -> dict[str, int]:
    """The content of vocab.json: the id of every token, special ones included."""
    return {spell(t): i for t, i in ranks.items()} | {END: len(ranks), PAD: len(ranks) + 1}


def load(name_or_folder: str | Path) -> Tokenizer:
    """The tokenizer of GPT-2, by one of its names, or of a folder with merges.txt and vocab.json.

    Raises UserError where a file is missing or damaged, or GPT-2's vocabulary cannot be had.
    """
    if name_or_folder in GPT2:
        return Tokenizer(gpt2_ranks())
    ranks = read_merges(Path(name_or_folder) / "merges.txt")
    path, expected = Path(name_or_folder) / "vocab.json", spell_vocab(ranks)
    try:
        vocab = {PAD: expected[PAD]} | json.loads(read(path))  # GPT-2's own files have no pad token
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object of token: id, came {error}") from error
    for token in expected | vocab:
        ours, came = expected.get(token), vocab.get(token)
        if ours != came:
            raise UserError(f"{path}: expected id {ours} for {token!r} by merges.txt, came {came}")
    return Tokenizer(ranks)


def gpt2_ranks():
    """GPT-2's 50,256 tokens, from tiktoken's cache or, the first time, from the network."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(
            "expected GPT-2's vocabulary in tiktoken's cache or on the network, found neither; "
            "let TIKTOKEN_CACHE_DIR name a folder that holds it, or go online once"
        ) from error
    return {gpt2.decode_single_token_bytes(i): i for i in range(gpt2.eot_token)}


def read_merges(path):
    """merges.txt, one merge a line -> {bytes: id}, which begins with the 256 bytes.

    tiktoken's data_gym_to_mergeable_bpe_ranks is no help: it keeps a copy of each file by its path
    and would read that after a new training, and it refuses the pad token.
    """
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


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "bytes that are not UTF-8"
        raise UserError(f'{path}: expected "gpt2" or a folder with this file, {why}') from error
