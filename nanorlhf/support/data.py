r"""Files of text, demonstrations and preferences in; checked, padded batches out.

    records, counts = preferences(paths)              dicts; and what was left out, and why
    train, held_out = split(records)                  no prompt stands on both sides
    rows = encode_pairs(train, tokenizer, block_size, counts)
    batches = endless(rows, batch_size, seed)         which rows go together
    tokens, prompt_len, mask = collate(next(batches), pad)

Files are JSON Lines, plain or .gz, one record a line, recognised by its keys:

    {"text"}                            plain text, a response to nothing
    {"prompt", "response"}              a demonstration
    {"prompt", "chosen", "rejected"}    a preference; chosen also serves as a demonstration
    {"chosen", "rejected"}              the same as whole transcripts (Anthropic HH), of which the
                                        prompt is everything up to the last "\n\nAssistant:"
    {"messages"}                        a conversation; the last turn is the response
    {"prompt"}                          for prompts() only

Each but text may be a list of {"role", "content"}, TRL's conversational form. A malformed line
stops the run and is named; a record that is well formed and of no use is left out and counted.
"""

import gzip
import itertools
import json
import random
import zlib
from collections import Counter
from pathlib import Path

import torch

from nanorlhf import UserError

ASSISTANT = "\n\nAssistant:"
SPEAKER = {"system": "", "user": "\n\nHuman: ", "assistant": ASSISTANT + " "}


def demonstrations(paths):
    """-> list of {"prompt", "response"}, counts"""
    return collect(paths, demonstration)


def preferences(paths):
    """-> list of {"prompt", "chosen", "rejected"}, counts"""
    return collect(paths, preference)


def prompts(paths):
    """-> list of distinct prompts, in the order of their first appearance, and counts"""
    found, counts = collect(paths, prompt_alone)
    distinct = list(dict.fromkeys(found))
    counts["records"] = len(distinct)
    counts["repeats"] = len(found) - len(distinct)
    return distinct, counts


def collect(paths, convert):
    """Convert every line of every file; keep what is good, count what is not."""
    kept, counts = [], Counter()
    for path in paths:
        for where, fields in read_json_lines(path):
            record, flaw = convert(fields, where)
            if flaw:
                counts[flaw] += 1
            else:
                kept.append(record)
    counts["records"] = len(kept)
    if not kept:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: expected a record that is of use, came {describe(counts)}")
    return kept, counts


def describe(counts):
    """One line, such as: 6,240 records; left out: 34 ties, 1 fork; truncated: 411"""
    said = {name: f"{n:,} {name[:-1] if n == 1 else name}" for name, n in counts.items() if n}
    parts = [said.pop("records", "no records")]
    truncated = [f"truncated: {counts['truncated']:,}"] if said.pop("truncated", None) else []
    left_out = ["left out: " + ", ".join(said.values())] if said else []
    return "; ".join(parts + left_out + truncated)


def read_json_lines(path, longest=2**26):
    """Yield ("path:line", dict) a line. Never the whole file at once, nor a line without end."""
    number = 0
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as lines:
            # Bytes end a line at \n alone; text would, too, at a U+2028 inside a JSON string.
            for number, line in enumerate(iter(lambda: lines.readline(longest), b""), 1):
                if line.strip():
                    yield f"{path}:{number}", parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:  # no such file; a gzip that is cut or damaged
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


def demonstration(fields, where):
    """A line -> {"prompt", "response"} and its flaw. Of a preference, the chosen answer."""
    prompt, response = dialogues(fields, where)[0]
    if response is None:
        raise unlike(fields, where, "an answer: text, messages, response, or chosen and rejected")
    return {"prompt": prompt, "response": response}, None if response.strip() else "empty answers"


def preference(fields, where):
    """A line -> {"prompt", "chosen", "rejected"} and its flaw."""
    pair = dialogues(fields, where)
    if len(pair) < 2 or None in (pair[0][1], pair[1][1]):
        raise unlike(fields, where, "two answers: chosen and rejected, with or without a prompt")
    (prompt, chosen), (other_prompt, rejected) = pair
    flaw = None
    if prompt != other_prompt:
        flaw = "forks"  # answers to different questions cannot be compared
    elif chosen == rejected:
        flaw = "ties"
    elif not chosen.strip() or not rejected.strip():
        flaw = "empty answers"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, flaw


def prompt_alone(fields, where):
    """A line -> its prompt and its flaw."""
    prompt = dialogues(fields, where)[0][0]
    return prompt, None if prompt.strip() else "empty prompts"


def unlike(fields, where, expected):
    return UserError(f"{where}: expected {expected}; came the keys {', '.join(fields) or '(none)'}")


def dialogues(fields, where):
    """A line -> (prompt, answer) pairs: one, or for a preference two, chosen first."""
    if fields.keys() >= {"chosen", "rejected"}:
        answers = ["chosen", "rejected"]
    elif fields.keys() >= {"prompt", "response"}:
        answers = ["response"]
    else:
        answers = [key for key in ("messages", "text", "prompt") if key in fields][:1]
    if not answers:
        raise unlike(fields, where, "text, messages, prompt and response, or chosen and rejected")
    return [dialogue(fields, key, where) for key in answers]


def dialogue(fields, key, where):
    """The prompt, and the answer under `key`; None where there is a prompt and nothing else."""
    if isinstance(fields[key], list):
        before = turns(fields, "prompt", where) if "prompt" in fields and key != "prompt" else []
        return conversation(before + turns(fields, key, where))
    text = string(fields, key, where)
    if key == "prompt":
        return text, None
    if key == "text":
        return "", text
    if "prompt" in fields:
        return string(fields, "prompt", where), text
    # An answer may go on to speak for the human ("\n\nHuman:", twice in HH). That is a fault worth
    # learning to reject, so it stays.
    prompt, mark, answer = text.rpartition(ASSISTANT)
    if not mark:
        raise UserError(f"{where}: expected {ASSISTANT!r} in {key}, came {text[:60]!r}")
    return prompt + mark, answer


def conversation(messages):
    """Turns -> prompt, and the last turn as the answer; None if it is not the assistant's."""
    if messages[-1]["role"] != "assistant":
        return render(messages), None
    return render(messages[:-1]), " " + messages[-1]["content"]


def render(messages):
    """Turns in HH's form, up to where the assistant speaks next. A system message leads."""
    return "".join(SPEAKER[turn["role"]] + turn["content"] for turn in messages) + ASSISTANT


def turns(fields, key, where):
    """The list under `key`, each turn checked."""
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
    # JSON can spell half a surrogate pair; UTF-8 cannot, and printing it crashes. It becomes "?".
    return text.encode("utf-8", "replace").decode()


def split(records, fraction=0.1):
    """-> train, held_out

    A prompt's own hash decides, so it falls on the same side in every file, order and stage.
    """
    # Plain text has no prompt: there the text decides.
    keys = [r["prompt"] or r.get("response") or r["chosen"] for r in records]
    hashes = [zlib.crc32(key.encode("utf-8", "replace")) for key in keys]
    if len(set(hashes)) < 2:
        raise UserError("expected two different prompts at least, one to hold out; came one")
    limit = max(fraction * 2**32, min(hashes) + 1)  # however few there are, one is held out
    sides = [], []
    for record, number in zip(records, hashes, strict=True):
        sides[number < limit].append(record)
    return sides


def encode(records, tokenizer, block_size, counts):
    """Demonstrations -> rows (tokens, prompt_len). The response ends with the end token.

    Plain text has the end token for a prompt, as in GPT-2, and becomes as many rows as it takes.
    """
    rows = []
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        response = [*tokenizer.encode(record["response"]), tokenizer.eos]
        if prompt:
            rows += fit(prompt, [response], block_size, counts)
        else:
            # Rows overlap by one token: each token of the text is predicted once, and only once.
            tokens, starts = [tokenizer.eos, *response], range(0, len(response), block_size - 1)
            rows += [(tokens[start : start + block_size], 1) for start in starts]
    return rows


def encode_pairs(records, tokenizer, block_size, counts):
    """Preferences -> (chosen_row, rejected_row) pairs with the same prompt, token for token."""
    pairs = []
    for record in records:
        prompt = tokenizer.encode(record["prompt"]) or [tokenizer.eos]
        answers = [[*tokenizer.encode(record[k]), tokenizer.eos] for k in ("chosen", "rejected")]
        pairs.append(tuple(fit(prompt, answers, block_size, counts)))
    return pairs


def encode_prompts(prompts, tokenizer, max_prompt_len, counts):
    """-> list of token lists. A long one loses its beginning: the question stands at the end."""
    if max_prompt_len < 1:
        raise UserError(f"expected room for a prompt of one token at least, came {max_prompt_len}")
    rows = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
    counts["truncated"] += sum(len(row) > max_prompt_len for row in rows)
    return [row[-max_prompt_len:] for row in rows]


def fit(prompt, responses, block_size, counts):
    """One row a response, all with the same prompt tokens, none longer than block_size.

    The prompt gives way first, from its left. A response too long by itself loses its right, and
    with it the end token: what is left of it has not ended.
    """
    kept = [response[: block_size - 1] for response in responses]
    room = block_size - max(map(len, kept))
    counts["truncated"] += kept != responses or len(prompt) > room
    prompt = prompt[-room:]
    return [(prompt + response, len(prompt)) for response in kept]


def by_length(rows, batch_size, rng, length):
    """Shuffled batches of indices, each row once, similar lengths together to save on padding.

    Sorted as a whole, the batches would be the same in every epoch; sorted 32 batches at a time,
    they are left to chance. rng is a random.Random, length a function of a row.
    """
    order = rng.sample(range(len(rows)), len(rows))
    batches = []
    for start in range(0, len(order), 32 * batch_size):
        window = sorted(order[start : start + 32 * batch_size], key=lambda i: length(rows[i]))
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def endless(rows, batch_size, seed, start=0, length=lambda row: len(row[0])):
    """Batches of rows, epoch after epoch; those before step `start` are passed over.

    An epoch's order depends on the seed and its number alone, so a resumed run goes on as it was.
    """
    if not rows or batch_size < 1:
        raise UserError(f"expected rows, and a batch size of at least 1; "
                        f"came {len(rows)} rows and a batch size of {batch_size}")
    for epoch in itertools.count():
        batches = by_length(rows, batch_size, random.Random(f"{seed} {epoch}"), length)
        for batch in batches[start:]:
            yield [rows[i] for i in batch]
        start = max(0, start - len(batches))


def in_parts(rows, size):
    """Rows, `size` at a time; all at once if size is 0."""
    size = size or max(1, len(rows))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def collate(rows, pad, device="cpu"):
    """Rows (tokens, prompt_len) -> tokens (B, T), prompt_len (B,), mask (B, R)"""
    T = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [pad] * (T - len(tokens)) for tokens, _ in rows])
    prompt_len = torch.tensor([prompt_len for _, prompt_len in rows])
    response_len = torch.tensor([len(tokens) for tokens, _ in rows]) - prompt_len
    mask = torch.arange(response_len.max()) < response_len[:, None]
    return tokens.to(device), prompt_len.to(device), mask.to(device)
