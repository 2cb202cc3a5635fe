"""The files of a byte-level BPE: vocab.json, merges.txt, tokenizer_config.json, as transformers
reads and writes them for GPT-2; and GPT-2's own vocabulary.

In and out: ranks, {bytes: id} for every token but the two special ones.
"""
import json
from itertools import pairwise
from pathlib import Path

import tiktoken

from nanorlhf.support import UserError
from nanorlhf.support.checkpoint import replacing

END, PAD = "<|endoftext|>", "<|pad|>"

# How files spell a byte: a printable one as itself, the others as letters from U+0100 on. The ids
# of the single bytes have the same order.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTES = [bytes([b]) for b in PRINTABLE + HIDDEN]


def save(folder, ranks):
    """Write the three files."""
    # Which two tokens a merge joined is not stored: the merges before it lead to these two.
    parts = [apply_merges(token, ranks, below=i) for token, i in ranks.items()]
    merges = [" ".join(map(spell, pair)) for pair in parts if len(pair) == 2]
    config = dict(tokenizer_class="GPT2Tokenizer", clean_up_tokenization_spaces=False,
                  bos_token=END, eos_token=END, unk_token=END, pad_token=PAD)
    files = {"vocab.json": json.dumps(spell_vocab(ranks), ensure_ascii=False),
             "merges.txt": "\n".join(["#version: 0.2", *merges]),
             "tokenizer_config.json": json.dumps(config, indent=2)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with replacing(Path(folder) / name) as file:
            file.write((text + "\n").encode())


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


def load(folder):
    """The ranks in a folder. Raises UserError where its two files do not agree."""
    ranks = read_merges(Path(folder) / "merges.txt")
    path, expected = Path(folder) / "vocab.json", spell_vocab(ranks)
    try:
        vocab = {PAD: expected[PAD]} | json.loads(read(path))  # GPT-2's own files have no pad token
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object of token: id, came {error}") from error
    for token in expected | vocab:
        ours, came = expected.get(token), vocab.get(token)
        if ours != came:
            raise UserError(f"{path}: expected id {ours} for {token!r} by merges.txt, came {came}")
    return ranks


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
