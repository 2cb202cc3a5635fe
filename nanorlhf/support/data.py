r"""Reads files of text, demonstrations and preferences, and makes padded batches of them.

    records, counts = preferences(paths)              counts: how many were left out, and why
    train, held_out = split(records)                  no prompt is on both sides
    rows = encode_pairs(train, tokenizer, block_size, counts)
    batches = endless(rows, batch_size, seed)         epoch after epoch
    tokens, prompt_len, mask = collate(rows, pad)     tensors

Files are JSON Lines, plain or .gz: one JSON object, called a record, on each line. The keys tell
what it is:

    {"text"}                            plain text: a response without a prompt
    {"prompt", "response"}              a demonstration
    {"prompt", "chosen", "rejected"}    a preference; chosen also serves as a demonstration
    {"chosen", "rejected"}              the same as whole transcripts (Anthropic HH), of which the
                                        prompt is everything up to the last "\n\nAssistant:"
    {"messages"}                        a conversation; the last turn is the response
    {"prompt"}                          for prompts() only

Each but text may be a list of {"role", "content"}, TRL's conversational form. A malformed line
stops the run with an error that names it. A record that is well formed but of no use (a tie, an
empty answer) is left out and counted.
"""
import gzip
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanorlhf.support import UserError

ASSISTANT = "\n\nAssistant:"
SPEAKER = {"system": "", "user": "\n\nHuman: ", "assistant": ASSISTANT + " "}
Paths = Iterable[str | Path]
Row = tuple[list[int], int]  # the tokens of prompt and response, and the length of the prompt
Pair = tuple[Row, Row]  # chosen, rejected


def demonstrations(paths: Paths) -> tuple[list[dict], Counter]:
    """-> list of {"prompt", "response"}, counts. Raises UserError for a malformed line."""
    kept, counts = collect(paths, 1, "an answer: text, messages, response, or chosen and rejected")
    return [{"prompt": prompt, "response": answer} for [(prompt, answer)] in kept], counts


def preferences(paths: Paths) -> tuple[list[dict], Counter]:
    """-> list of {"prompt", "chosen", "rejected"}, counts. Raises UserError likewise."""
    kept, counts = collect(paths, 2, "two answers: chosen and rejected, with or without a prompt")
    return [{"prompt": p, "chosen": c, "rejected": r} for (p, c), (_, r) in kept], counts


def prompts(paths: Paths) -> tuple[list[str], Counter]:
    """-> distinct prompts, in the order of the files, and counts. Raises UserError likewise."""
    kept, counts = collect(paths, 0, "a prompt, messages, or chosen and rejected")
    distinct = list(dict.fromkeys(prompt for [(prompt, _)] in kept))
    counts["records"] = len(distinct)
    counts["repeats"] = len(kept) - len(distinct)
    return distinct, counts


def collect(paths, answers, expected):
    """Records that must have 0, 1 or 2 answers -> the (prompt, answer) pairs of each, counts."""
    kept, counts = [], Counter()
    for path in paths:
        for where, fields in read_json_lines(path):
            pairs = dialogues(fields, where)[: max(1, answers)]
            missing = answers and None in [answer for _, answer in pairs]
            if missing or len(pairs) < max(1, answers):
                keys = ", ".join(fields) or "(none)"
                raise UserError(f"{where}: expected {expected}; came the keys {keys}")
            if problem := flaw(pairs, answers):
                counts[problem] += 1
            else:
                kept.append(pairs)
    counts["records"] = len(kept)
    if not kept:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: expected a record that is of use, came {describe(counts)}")
    return kept, counts


def flaw(pairs, answers):
    """What makes a record useless, or None."""
    (prompt, first), (last_prompt, last) = pairs[0], pairs[-1]
    if prompt != last_prompt:
        return "forks"  # answers to different prompts cannot be compared
    if len(pairs) == 2 and first == last:
        return "ties"
    if answers:
        return None if first.strip() and last.strip() else "empty answers"
    return None if prompt.strip() else "empty prompts"


def describe(counts: Counter) -> str:
    """One line, such as: 6,240 records; left out: 34 ties, 1 fork; truncated: 411"""
    texts = {name: f"{n:,} {name[:-1] if n == 1 else name}" for name, n in counts.items() if n}
    line = texts.pop("records", "no records")
    truncated = texts.pop("truncated", None)
    if texts:
        line += "; left out: " + ", ".join(texts.values())
    return line + f"; truncated: {counts['truncated']:,}" if truncated else line


def read_json_lines(path: str | Path, longest: int = 2**26) -> Iterator[tuple[str, dict]]:
    """Yield ("path:line", object) for each line. The file is never in memory as a whole.

    Raises UserError where the file cannot be read, or a line is no JSON object or is longer than
    `longest` bytes.
    """
    number = 0
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as lines:
            # Lines of bytes end at \n only; lines of text would also end at a U+2028 in a string.
            for number, line in enumerate(iter(lambda: lines.readline(longest), b""), 1):
                if line.strip():
                    yield f"{path}:{number}", parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:  # no such file, or a .gz cut short or damaged
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}:{number + 1}: expected a file to read, came: {why}") from error
    if not number:
        raise UserError(f"{path}:1: expected one JSON object a line, came an empty file")


def parse(line, where):
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 are a ValueError, too
        raise UserError(f"{where}: expected JSON in UTF-8, came {line[:60]!r}: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a JSON object, came {type(fields).__name__}")
    return fields


def dialogues(fields, where):
    """One line's object -> list of (prompt, answer): two for a preference, chosen first, else one.

    The answer is None where there is only a prompt. The list is empty if no key is known.
    """
    if fields.keys() >= {"chosen", "rejected"}:
        keys = ["chosen", "rejected"]
    elif fields.keys() >= {"prompt", "response"}:
        keys = ["response"]
    else:
        keys = [key for key in ("messages", "text", "prompt") if key in fields][:1]
    return [dialogue(fields, key, where) for key in keys]


def dialogue(fields, key, where):
    """(prompt, answer), where the answer, or the whole conversation, is under this key."""
    if isinstance(fields[key], list):
        before = turns(fields, "prompt", where) if "prompt" in fields and key != "prompt" else []
        messages = before + turns(fields, key, where)
        if messages[-1]["role"] != "assistant":
            return render(messages), None
        return render(messages[:-1]), " " + messages[-1]["content"]
    text = string(fields, key, where)
    if key == "prompt":
        return text, None
    if key == "text":
        return "", text
    if "prompt" in fields:
        return string(fields, "prompt", where), text
    # An answer may go on to speak for the human ("\n\nHuman:", twice in HH). It is kept so: this is
    # a fault that a reward model should learn to reject.
    prompt, mark, answer = text.rpartition(ASSISTANT)
    if not mark:
        raise UserError(f"{where}: expected {ASSISTANT!r} in {key}, came {text[:60]!r}")
    return prompt + mark, answer


def turns(fields, key, where):
    """The list of turns under this key, each of them checked."""
    if not isinstance(fields[key], list) or not fields[key]:
        raise UserError(f"{where}: expected {key} to be a list of turns, came {fields[key]!r:.60}")
    for i, turn in enumerate(fields[key]):
        roles = ("user", "assistant") if i else ("user", "assistant", "system")
        if not isinstance(turn, dict) or turn.get("role") not in roles or "content" not in turn:
            expected = f"content and a role ({', '.join(roles)}) in turn {i + 1} of {key}"
            raise UserError(f"{where}: expected {expected}, came {turn!r:.60}")
    return [turn | {"content": string(turn, "content", where)} for turn in fields[key]]


def string(fields, key, where):
    text = fields[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: expected {key} to be a string, came {type(text).__name__}")
    # JSON can spell half a surrogate pair. UTF-8 cannot, and printing it fails, so it becomes "?".
    return text.encode("utf-8", "replace").decode()


def render(messages):
    """Turns in the form of HH, up to the point where the assistant speaks next."""
    return "".join(SPEAKER[turn["role"]] + turn["content"] for turn in messages) + ASSISTANT


def split(records: list[dict], fraction: float = 0.1) -> tuple[list[dict], list[dict]]:
    """-> train, held_out: about this fraction of the prompts is held out.

    The hash of a prompt decides, so it is on the same side in every file, order and stage. Raises
    UserError where all prompts are the same.
    """
    # Plain text has no prompt: there the text decides.
    keys = [r["prompt"] or r.get("response") or r["chosen"] for r in records]
    hashes = [zlib.crc32(key.encode("utf-8", "replace")) for key in keys]
    if len(set(hashes)) < 2:
        raise UserError("expected two different prompts at least, one to hold out; came one")
    limit = max(fraction * 2**32, min(hashes) + 1)  # one is held out, however few there are
    train = [record for record, number in zip(records, hashes) if number >= limit]
    return train, [record for record, number in zip(records, hashes) if number < limit]


def encode(records: list[dict], tokenizer, block_size: int, counts: Counter) -> list[Row]:
    """Demonstrations -> rows of at most block_size tokens. The response ends with the end token.

    Plain text has the end token for a prompt, as in GPT-2, and becomes as many rows as it needs.
    """
    rows = []
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        response = [*tokenizer.encode(record["response"]), tokenizer.eos]
        if prompt:
            rows += fit(prompt, [response], block_size, counts)
        else:
            # A row begins with the last token of the row before: each token is predicted once.
            tokens, starts = [tokenizer.eos, *response], range(0, len(response), block_size - 1)
            rows += [(tokens[start : start + block_size], 1) for start in starts]
    return rows


def encode_pairs(records: list[dict], tokenizer, block_size: int, counts: Counter) -> list[Pair]:
    """Preferences -> (chosen, rejected) pairs of rows, both with the same prompt tokens."""
    pairs = []
    for record in records:
        prompt = tokenizer.encode(record["prompt"]) or [tokenizer.eos]
        answers = [[*tokenizer.encode(record[k]), tokenizer.eos] for k in ("chosen", "rejected")]
        pairs.append(tuple(fit(prompt, answers, block_size, counts)))
    return pairs


def fit(prompt, responses, block_size, counts):
    """One row for each response, all with the same prompt tokens, none longer than block_size.

    The prompt is cut first, on its left. A response that is too long by itself is cut on its right
    and so loses its end token: what is left of it has not ended.
    """
    kept = [response[: block_size - 1] for response in responses]
    room = block_size - max(map(len, kept))
    counts["truncated"] += kept != responses or len(prompt) > room
    prompt = prompt[-room:]
    return [(prompt + response, len(prompt)) for response in kept]


def encode_prompts(prompts: list[str], tokenizer, longest: int, counts: Counter) -> list[list[int]]:
    """-> tokens of each prompt. A long one is cut on its left, as the question is at its end.

    Raises UserError where longest is below 1.
    """
    if longest < 1:
        raise UserError(f"expected room for a prompt of one token at least, came {longest}")
    rows = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
    counts["truncated"] += sum(len(row) > longest for row in rows)
    return [row[-longest:] for row in rows]


def endless(rows: list, batch_size: int, seed: int, start: int = 0,
            length: Callable = lambda row: len(row[0])) -> Iterator[list]:
    """Yield batches of rows, epoch after epoch, without those before step `start`.

    The order of an epoch depends only on the seed and its number, so a resumed run goes on as if it
    had not stopped. Raises UserError where there are no rows, or batch_size is below 1.
    """
    if not rows or batch_size < 1:
        raise UserError(f"expected rows, and a batch size of at least 1; "
                        f"came {len(rows)} rows and a batch size of {batch_size}")
    for epoch in itertools.count():
        batches = by_length(rows, batch_size, random.Random(f"{seed} {epoch}"), length)
        for batch in batches[start:]:
            yield [rows[i] for i in batch]
        start = max(0, start - len(batches))


def by_length(rows, batch_size, rng, length):
    """Shuffled batches of indices. Rows of similar length are together, to save on padding.

    If all rows were sorted at once, every epoch would have the same batches, so only 32 batches are
    sorted at a time. rng is a random.Random, length a function of a row.
    """
    order = rng.sample(range(len(rows)), len(rows))
    batches = []
    for start in range(0, len(order), 32 * batch_size):
        window = sorted(order[start : start + 32 * batch_size], key=lambda i: length(rows[i]))
        batches += in_parts(window, batch_size)
    rng.shuffle(batches)
    return batches


def in_parts(rows, size: int) -> Iterator:
    """Yield `size` rows at a time, or all of them if size is 0. rows: a list or a tensor"""
    size = size or max(1, len(rows))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def collate(rows: list[Row], pad: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> tokens (B, T), prompt_len (B,), mask (B, R), which is True for response tokens."""
    T = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [pad] * (T - len(tokens)) for tokens, _ in rows])
    prompt_len = torch.tensor([prompt_len for _, prompt_len in rows])
    response_len = torch.tensor([len(tokens) for tokens, _ in rows]) - prompt_len
    mask = torch.arange(response_len.max()) < response_len[:, None]
    return tokens.to(device), prompt_len.to(device), mask.to(device)
