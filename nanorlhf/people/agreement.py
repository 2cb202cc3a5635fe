"""Do people agree with each other, and each of them with themselves?

    python -m nanorlhf.people.agreement --data anna.jsonl ben.jsonl

Of every two annotators: the share of pairs that both labelled alike, and Cohen's kappa, which is 0
where they agree as often as by chance, and 1 where they always do. Of each annotator: the same of
the pairs that came back. Two ties are alike, and skips do not count. Brackets are 95 % intervals.
"""
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, combinations

from nanorlhf.support import UserError
from nanorlhf.support.config import run
from nanorlhf.support.formats import read_records
from nanorlhf.support.labels import CHOICES, standing
from nanorlhf.support.stats import interval, kappa


@dataclass
class AgreementConfig:
    """Say how far annotators agree with each other, and each with themselves."""
    data: list[str] = field(default_factory=lambda: ["out/labels.jsonl"])  # files of labels


def by_annotator(paths):
    """-> {annotator: {(id of the pair, is it the second time?): the choice}}"""
    labels = {}
    records = chain.from_iterable(map(read_records, paths))
    for where, label in standing(records, Counter(), repeats=True):
        name, pair, choice = (str(label.get(key)) for key in ("annotator", "id", "choice"))
        if choice not in CHOICES or not {"annotator", "id"} <= label.keys():
            raise UserError(f"{where}: expected a label, with id, annotator and choice, came one "
                            f"with {', '.join(label)[:80] or 'nothing'}")
        labels.setdefault(name, {})[pair, bool(label.get("repeat"))] = CHOICES[choice]
    if not labels:
        raise UserError(f"{', '.join(paths)}: expected labels that are no skips, came none")
    return labels


def compare(first, second):
    """Choices of two annotators, or of one at two times, about the same pairs. -> text"""
    if not first:
        return "no pair"
    alike = sum(a == b for a, b in zip(first, second, strict=True))
    share = "{:.2f} [{:.2f}, {:.2f}]".format(alike / len(first), *interval(alike, len(first)))
    return (f"{alike} of {len(first)} pairs alike: {share}; kappa "
            "{:.2f} [{:.2f}, {:.2f}]".format(*kappa(first, second)))


def main(cfg):
    labels, lines = by_annotator(cfg.data), {}
    for a, b in combinations(sorted(labels), 2):
        both = [key for key in labels[a] if key in labels[b] and not key[1]]
        lines[f"{a} and {b}"] = [[labels[name][key] for key in both] for name in (a, b)]
    for name, own in sorted(labels.items()):
        both = [pair for pair, again in own if again and (pair, False) in own]
        lines[f"{name} again"] = [[own[pair, again] for pair in both] for again in (False, True)]
    for name, choices in lines.items():
        print(f"{name:{max(map(len, lines))}}  {compare(*choices)}")


if __name__ == "__main__":
    run(main, AgreementConfig)
