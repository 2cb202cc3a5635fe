"""Comparisons, one group a prompt: each response is read once, however often it was compared.

A group is (rows, pairs): the rows (tokens, prompt_len) of one prompt, and pairs of indices into
them, the chosen row first. All pairs of a prompt share a batch (Ouyang et al. 2022, section 3.5).
"""
import torch

from nanorlhf.support import UserError, data
from nanorlhf.support.config import autocast


def from_files(paths, tok, block_size):
    """Comparisons that people made, of files. -> groups to learn from, held-out groups"""
    records, counts = data.preferences(paths)
    sides = [by_prompt(data.encode_pairs(side, tok, block_size, counts))
             for side in data.split(records)]
    print(f"data      {data.describe(counts)}")
    return sides


def by_prompt(pairs):
    """Pairs of rows (chosen, rejected) -> groups, each response once"""
    groups = {}
    for pair in pairs:
        tokens, prompt_len = pair[0]
        rows, compared = groups.setdefault(tuple(tokens[:prompt_len]), ({}, []))
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


def response_len(rows):
    """Tokens of all responses, end tokens included."""
    return sum(len(tokens) - prompt_len for tokens, prompt_len in rows)


def choices(path):
    """A file of human choices. -> scores of the first and of the second, one each a comparison"""
    scores, pairs = dict(first=(1.0, 0.0), second=(0.0, 1.0), tie=(0.5, 0.5)), []
    for where, record in data.read_json_lines(path):
        if (choice := record.get("choice")) not in [*scores]:
            raise UserError(f"{where}: expected choice to be first, second or tie, came {choice!r}")
        pairs.append(scores[choice])
    return tuple(zip(*pairs))


@torch.no_grad()
def score_rows(score, rows, pad, device, dtype, batch_size=64):
    """score: a function (tokens, prompt_len, mask) -> (B,). -> the scores of all rows"""
    scores = []
    for part in data.in_parts(rows, batch_size):
        with autocast(device, dtype):
            scores.append(score(*data.collate(part, pad, device)))
    return torch.cat(scores)
