"""Byte-level BPE (byte pair encoding): text becomes token ids, and ids become the same text again.

    tokenizer = learn(texts, vocab_size)      a vocabulary of our own, learned from a corpus
    tokenizer = load("gpt2" or a folder)      GPT-2's vocabulary, or one that was saved
    tokenizer.decode(tokenizer.encode(text)) == text

The first 256 tokens are the single bytes. Each further token is a merge: two earlier tokens that
often stand side by side, joined. Two special tokens come last: the end token closes a text, and the
pad token fills up a batch. tiktoken encodes without these two, so no text can produce them, not
even "<|endoftext|>" (only here transformers differs on the same files).
"""
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken; Python's own re has no \p{L}
import tiktoken

from nanorlhf.support import UserError, bpe_files
from nanorlhf.support.bpe_files import BYTES

GPT2 = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"  # all have the same vocabulary

# GPT-2 first splits a text into contractions, words, numbers and signs, each with the space before
# it; no merge crosses from one piece to the next. ++ forbids backtracking, for speed.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# tiktoken crashes on a run of a million spaces, so it gets a long run in parts.
LONG_RUN = re.compile(r"(\s{1000})(?=\s)")


def learn(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Merge the most frequent pair of neighbouring tokens, of several the one with the lowest ids,
    again and again, until bytes, merges and special tokens are vocab_size, or no pair is left.

    Raises UserError where vocab_size is below 258.
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
        self.ranks, self.eos = ranks, len(ranks)
        self.pad = len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        # The names by which a model's config.json tells other libraries the special tokens.
        self.special = dict(bos_token_id=self.eos, eos_token_id=self.eos, pad_token_id=self.pad)
        self._bpe = tiktoken.Encoding("", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Half a surrogate pair, which UTF-8 cannot write, becomes U+FFFD."""
        return [token for part in LONG_RUN.split(text) for token in self._bpe.encode_ordinary(part)]

    def decode(self, tokens: list[int]) -> str:
        """Special tokens are left out, and a character that is cut in two becomes U+FFFD."""
        return self._bpe.decode([token for token in tokens if token not in (self.eos, self.pad)])

    def pieces(self, tokens: list[int]) -> list[str]:
        """One string for each token, as plots show it. Half a character becomes U+FFFD."""
        special = {self.eos: "<end>", self.pad: "<pad>"}
        return [special.get(token) or self._bpe.decode([token]) for token in tokens]

    def save(self, folder: str | Path) -> None:
        """Write the three files that transformers expects."""
        bpe_files.save(folder, self.ranks)


def load(name_or_folder: str | Path) -> Tokenizer:
    """GPT-2's tokenizer, by one of its names, or the one in a folder. Raises UserError where a file
    is missing or damaged."""
    return Tokenizer(bpe_files.gpt2_ranks() if name_or_folder in GPT2
                     else bpe_files.load(name_or_folder))
