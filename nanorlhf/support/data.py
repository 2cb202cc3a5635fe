"""Reads demonstrations, preferences and prompts from files, and makes padded batches of them.

formats.py says what a file may look like. A record of no use (a tie, an empty answer) is left out
and counted. In a file of labels (labels.py) only those that stand are read.
A row is (tokens, prompt_len): tokens of prompt and response, and how many of them are the prompt's.
"""
import itertools
import random
import zlib
from collections import Counter

import torch

from nanorlhf.support import UserError
from nanorlhf.support.config import autocast
from nanorlhf.support.formats import dialogues, read_records
from nanorlhf.support.labels import CHOICES, standing


def demonstrations(paths):
    """-> list of {"prompt", "response"}, counts of what was kept and, by reason, left out"""
    kept, counts = collect(paths, 1)
    return [{"prompt": prompt, "response": answer} for [(prompt, answer)] in kept], counts


def preferences(paths, annotator=""):
    """-> list of {"prompt", "chosen", "rejected"}, counts. annotator: only this person's labels"""
    kept, counts = collect(paths, 2, annotator)
    return [{"prompt": p, "chosen": c, "rejected": r} for (p, c), (_, r) in kept], counts


def prompts(paths):
    """-> distinct prompts, in the order of the files, and counts"""
    kept, counts = collect(paths, 0)
    distinct = list(dict.fromkeys(prompt for [(prompt, _)] in kept))
    counts["records"] = len(distinct)
    counts["repeats"] = len(kept) - len(distinct)
    return distinct, counts


def collect(paths, answers, annotator=""):
    """Records that must have 0, 1 or 2 answers -> list of their (prompt, answer) pairs, counts"""
    kept, counts = [], Counter()
    for path in paths:
        for where, fields in standing(read_records(path), counts):
            if annotator and fields.get("annotator") != annotator:
                counts["others' labels"] += 1
                continue
            if answers and fields.get("choice") in ("tie", "both bad"):
                counts["ties"] += 1
                continue
            pairs = dialogues(fields, answers, where)
            texts = [answer if answers else prompt for prompt, answer in pairs]
            if len({prompt for prompt, _ in pairs}) > 1:
                counts["forks"] += 1  # answers to different prompts cannot be compared
            elif len(texts) > len(set(texts)):
                counts["ties"] += 1
            elif False in texts:
                counts["rejected answers"] += 1
            elif not all(map(str.strip, texts)):
                counts["empty answers" if answers else "empty prompts"] += 1
            else:
                kept.append(pairs)
    counts["records"] = len(kept)
    if not kept:
        names = ", ".join(map(str, paths))
        what = "a record" + f" of {annotator}" * bool(annotator)
        raise UserError(f"{names}: expected {what} that is of use, came {describe(counts)}")
    return kept, counts


def describe(counts):
    """One line, such as: 6,240 records; left out: 34 ties, 1 fork; truncated: 411"""
    texts = {name: f"{n:,} {name[:-1] if n == 1 else name}" for name, n in counts.items() if n}
    line, truncated = texts.pop("records", "no records"), texts.pop("truncated", None)
    if texts:
        line += "; left out: " + ", ".join(texts.values())
    return line + f"; truncated: {counts['truncated']:,}" if truncated else line


def split(records):
    """-> train, held_out: about a tenth of the prompts, the same in every file, order and stage"""
    # The hash of a prompt decides. Plain text has no prompt: there that of the text does.
    keys = [r["prompt"] or r.get("response") or r["chosen"] for r in records]
    hashes = [zlib.crc32(key.encode("utf-8", "replace")) for key in keys]
    if len(set(hashes)) < 2:
        raise UserError("expected two different prompts at least, one to hold out; came one")
    limit = max(2**32 / 10, min(hashes) + 1)  # one is held out, however few there are
    train = [record for record, number in zip(records, hashes) if number >= limit]
    return train, [record for record, number in zip(records, hashes) if number < limit]


def encode(records, tokenizer, block_size, counts):
    """Demonstrations -> rows. Plain text has the end token for a prompt, and any number of rows."""
    rows = []
    for record in records:
        if record["prompt"]:
            rows += fit(record, ["response"], tokenizer, block_size, counts)
        else:  # a row begins with the last token of the row before: each token is predicted once
            tokens = [tokenizer.eos, *tokenizer.encode(record["response"]), tokenizer.eos]
            starts = range(0, len(tokens) - 1, block_size - 1)
            rows += [(tokens[start : start + block_size], 1) for start in starts]
    return rows


def encode_pairs(records, tokenizer, block_size, counts):
    """Preferences -> list of [chosen row, rejected row], both with the same prompt tokens"""
    return [fit(r, ["chosen", "rejected"], tokenizer, block_size, counts) for r in records]


def fit(record, keys, tokenizer, block_size, counts):
    """A row for each answer, of at most block_size tokens. The prompt is cut first, on its left."""
    prompt = tokenizer.encode(record["prompt"]) or [tokenizer.eos]
    responses = [[*tokenizer.encode(record[key]), tokenizer.eos] for key in keys]
    # A response too long by itself is cut on its right, its end token too: it has not ended.
    kept = [response[: block_size - 1] for response in responses]
    room = block_size - max(map(len, kept))
    counts["truncated"] += kept != responses or len(prompt) > room
    return [(prompt[-room:] + response, min(room, len(prompt))) for response in kept]


def encode_prompts(prompts, tokenizer, longest, counts):
    """-> tokens of each prompt. A long one is cut on its left, as the question is at its end."""
    if longest < 1:
        raise UserError(f"expected room for a prompt of one token at least, came {longest}")
    rows = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
    counts["truncated"] += sum(len(row) > longest for row in rows)
    return [row[-longest:] for row in rows]


# A group is (rows, pairs): the rows of a prompt, and pairs of indices into them, the chosen first.
# So all pairs of a prompt share a batch (Ouyang et al. 2022, section 3.5).

def from_files(paths, tok, block_size, annotator=""):
    """Comparisons that people made, of files. -> groups to learn from, held-out groups"""
    records, counts = preferences(paths, annotator)
    sides = [by_prompt(encode_pairs(side, tok, block_size, counts))
             for side in split(records)]
    print(f"data      {describe(counts)}")
    return sides


def by_prompt(pairs, most=8):
    """Pairs of rows (chosen, rejected) -> groups of at most so many pairs, each response once.
    Where all pairs have the same prompt, they would otherwise all be in one batch."""
    groups, seen = {}, Counter()
    for pair in pairs:
        tokens, prompt_len = pair[0]
        prompt = tuple(tokens[:prompt_len])
        rows, compared = groups.setdefault((prompt, seen[prompt] // most), ({}, []))
        seen[prompt] += 1
        compared.append(tuple(rows.setdefault((tuple(t), n), len(rows)) for t, n in pair))
    return [([(list(t), n) for t, n in rows], compared) for rows, compared in groups.values()]


def flatten(groups):
    """Groups -> all their rows, and where among them the chosen and the rejected stand"""
    rows, chosen, rejected = [], [], []
    for group, pairs in groups:
        chosen += [len(rows) + i for i, _ in pairs]
        rejected += [len(rows) + j for _, j in pairs]
        rows += group
    return rows, chosen, rejected


def pairs_in(groups):
    return sum(len(pairs) for _, pairs in groups)


def rows_of(group):
    return group[0]


def prompts_of(groups, longest):
    """The prompt of each group, without its beginning where it is too long. -> token lists"""
    return [tokens[:n][-longest:] for [(tokens, n), *_], _ in groups]


def choices(path):
    """A file of choices -> scores of the first and of the second, one each a comparison; whose"""
    scores, whose = [], set()
    for where, record in standing(read_records(path), Counter()):
        if (choice := record.get("choice")) not in [*CHOICES]:
            expected = "choice to be first, second, tie or both bad"
            raise UserError(f"{where}: expected {expected}, came {choice!r}")
        scores.append(CHOICES[choice])
        names = record.get("policy", "the first"), record.get("against", "the second")
        whose.add("{} against {}".format(*names))
    if len(whose) != 1:
        came = " and ".join(sorted(whose)) or "none"
        raise UserError(f"{path}: expected choices between the same two models, came {came}")
    return *zip(*scores), *whose


def endless(rows, batch_size, seed, start=0, length=lambda row: len(row[0])):
    """Yield batches of rows, epoch after epoch, from step `start` on; a seed gives one order. Rows
    of similar length share a batch; only 32 batches are sorted at once, so that epochs differ."""
    if not rows or batch_size < 1:
        came = f"{len(rows)} rows and a batch size of {batch_size}"
        raise UserError(f"expected rows, and a batch size of at least 1; came {came}")
    for epoch in itertools.count():
        rng, batches = random.Random(f"{seed} {epoch}"), []
        for window in in_parts(rng.sample(rows, len(rows)), 32 * batch_size):
            batches += in_parts(sorted(window, key=length), batch_size)
        rng.shuffle(batches)
        yield from batches[start:]
        start = max(0, start - len(batches))


def in_parts(rows, size):
    """Yield `size` rows of a list or tensor at a time, or all of them if size is 0."""
    size = size or max(1, len(rows))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def collate(rows, pad, device="cpu"):
    """Rows -> tokens (B, T), prompt_len (B,), mask (B, R), which is True for response tokens."""
    T = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [pad] * (T - len(tokens)) for tokens, _ in rows])
    prompt_len = torch.tensor([prompt_len for _, prompt_len in rows])
    response_len = torch.tensor([len(tokens) for tokens, _ in rows]) - prompt_len
    mask = torch.arange(response_len.max()) < response_len[:, None]
    if torch.device(device).type == "cuda":  # copied while it goes on with what it has to do
        batch = tokens, prompt_len, mask
        return tuple(x.pin_memory().to(device, non_blocking=True) for x in batch)
    return tokens.to(device), prompt_len.to(device), mask.to(device)


def response_len(rows):
    """Tokens of all responses, end tokens included."""
    return sum(len(tokens) - prompt_len for tokens, prompt_len in rows)


@torch.no_grad()
def score_rows(score, rows, pad, device, dtype, batch_size=64):
    """score: a function (tokens, prompt_len, mask) -> (B,). -> the scores of all rows, in order"""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))   # so there is less padding
    scores = []
    for part in in_parts(by_length, batch_size):
        with autocast(device, dtype):
            scores.append(score(*collate([rows[i] for i in part], pad, device)))
    scores = torch.cat(scores)
    return scores[torch.tensor(by_length, device=scores.device).argsort()]
