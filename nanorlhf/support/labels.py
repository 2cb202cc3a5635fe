"""A file of labels, which people/label.py writes: on each line a choice between two answers.

    showing     names who was shown which pair, and whether for the second time
    id          of the pair: a hash of its prompt and answers
    prompt, first, second      the answers are of two models, or both of one
    choice      first, second, tie, both bad or skip; undo takes the label of this showing back
    chosen, rejected           the same answers; not there where none was preferred
    position    which of the answers was shown first, on the left
    repeat      true where the pair was shown again, to see whether its annotator chooses alike
    seconds, time, annotator, policy, against      how long it took, when, who chose between whom
"""
import json
import os
from statistics import median

from nanorlhf.support import UserError

# What a choice is worth to the first answer and to the second.
CHOICES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5), "both bad": (0.5, 0.5)}


def standing(records, counts, repeats=False):
    """Yield, of records ("path:line", object), all but labels that say nothing new: undone, skips,
    and, unless repeats are wanted, those of pairs shown again. A showing has one label, the last.
    """
    labels = {}
    for where, fields in records:
        if "showing" not in fields:
            yield where, fields
        elif fields.get("choice") != "undo":
            labels[str(fields["showing"])] = where, fields
        elif labels.pop(str(fields["showing"]), None):
            counts["undone labels"] += 1
    for where, fields in labels.values():
        if fields.get("choice") == "skip":
            counts["skips"] += 1
        elif fields.get("repeat") and not repeats:
            counts["repeated labels"] += 1
        else:
            yield where, fields


def summary(labels):
    """Of one annotator: self-agreement on pairs that were shown twice, and the time a choice takes.
    Two ties are alike, whether of good answers or of bad ones. -> list of texts"""
    decided = [label for label in labels if label["choice"] in CHOICES]
    first = {label["id"]: CHOICES[label["choice"]] for label in decided if not label["repeat"]}
    alike = [CHOICES[label["choice"]] == first[label["id"]] for label in decided
             if label["repeat"] and label["id"] in first]
    seconds = [label["seconds"] for label in decided]
    texts = [f"self-agreement {sum(alike)} of {len(alike)}"] if alike else []
    texts += [f"{median(seconds):.1f} s a label"] if seconds else []
    quick = sum(s < 1 for s in seconds)
    return texts + [f"{quick} in under a second"] if quick else texts


def ready(path):
    """Make a file ready to append to, or raise UserError where it is none of labels. A last line
    that a crash has cut in two goes: nobody was told that it is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            content = file.read()
            if not b'{"showing": '.startswith(content[:12]):
                raise UserError(f"--out: expected a file of labels, and {path} is another one")
            file.truncate(content.rfind(b"\n") + 1)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None


def append(path, record):
    """Add a line. On return it is on the disk; where that fails, the file is as it was."""
    size = os.path.getsize(path)
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        os.truncate(path, size)       # half a line would spoil the next one, too
        raise UserError(f"this choice is not kept: cannot write {path}: {error.strerror}") from None
