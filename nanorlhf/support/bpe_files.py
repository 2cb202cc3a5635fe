"""The files of a byte-level BPE, as in transformers. ranks: {bytes: id}, without special tokens."""
import json
from itertools import pairwise
from pathlib import Path

import tiktoken

from nanorlhf.support import UserError
from nanorlhf.support.checkpoint import write_whole

END, PAD = "<|endoftext|>", "<|pad|>"
# Files spell a printable byte as itself, others as letters from U+0100 on. Ids have this order.
HIDDEN = [b for b in range(256) if not chr(b).isprintable() or b == ord(" ")]
SPELLING = {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTES = [bytes([b]) for b in sorted(range(256), key=HIDDEN.__contains__)]


def save(folder, ranks):
    """Write three files. What a merge joined is not stored: the merges before it lead to that."""
    parts = [apply_merges(token, ranks, below=i) for token, i in ranks.items()]
    merges = [" ".join(map(spell, pair)) for pair in parts if len(pair) == 2]
    config = dict(tokenizer_class="GPT2Tokenizer", clean_up_tokenization_spaces=False,
                  bos_token=END, eos_token=END, unk_token=END, pad_token=PAD)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "vocab.json", json.dumps(spell_vocab(ranks), ensure_ascii=False) + "\n")
    write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_whole(folder / "tokenizer_config.json", config)


def apply_merges(piece, ranks, below):
    """As tiktoken: join the two neighbours of lowest rank, again and again, if it is < below."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while joined := [ranks.get(a + b, below) for a, b in pairwise(parts)]:
        i = joined.index(min(joined))
        if joined[i] >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spell_vocab(ranks):
    """The content of vocab.json: the id of every token, special ones included."""
    return {spell(t): i for t, i in ranks.items()} | {END: len(ranks), PAD: len(ranks) + 1}


def spell(token):
    """b" the" -> "Ġthe", as vocab.json and merges.txt write it."""
    return token.decode("latin-1").translate(SPELLING)  # latin-1 has a character for each byte


def load(folder):
    """The ranks in a folder. Raises UserError where its two files are damaged or do not agree."""
    path = Path(folder) / "merges.txt"
    try:
        ranks = read_merges(path)
        path, expected = Path(folder) / "vocab.json", spell_vocab(ranks)
        vocab = {PAD: expected[PAD], **json.loads(path.read_bytes())}  # GPT-2's own has no PAD
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: expected "gpt2" or a folder with this file, {error}') from error
    for token in expected | vocab:
        ours, came = expected.get(token), vocab.get(token)
        if ours != came:
            raise UserError(f"{path}: expected id {ours} for {token!r} by merges.txt, came {came}")
    return ranks


def read_merges(path):
    """merges.txt -> ranks. tiktoken's own reader would not see that a file has changed."""
    known = {spell(token): token for token in BYTES}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        a, _, b = line.partition(" ")
        if a in known and b in known and a + b not in known:
            known[a + b] = known[a] + known[b]
        elif number > 1 or not line.startswith("#version"):
            raise UserError(f"{path}:{number}: expected a new pair of tokens, came {line[:60]!r}")
    return {token: i for i, token in enumerate(known.values())}


def gpt2_ranks():
    """GPT-2's 50,256 tokens, from tiktoken's cache or, the first time, from the network."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError("expected GPT-2's vocabulary online, or in the folder that "
                        f"TIKTOKEN_CACHE_DIR names; came {error}") from error
    return {gpt2.decode_single_token_bytes(i): i for i in range(gpt2.eot_token)}
