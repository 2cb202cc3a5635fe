"""What files of text, demonstrations and preferences look like, and how they are read.

A file is JSON Lines, one JSON object on each line, or one JSON array of objects; plain or .gz. An
object, called a record, is known by its keys: see FORMS. Under a key stands a string, or turns: a
list of {"role", "content"} as in TRL, or of {"from", "value"} as in ShareGPT. Turns become text as
in Anthropic's HH. A malformed record stops the run with a UserError that names its place.
"""
import codecs
import difflib
import gzip
import itertools
import json
import os
import re
import zlib
from pathlib import Path

from nanorlhf.support import UserError

# Where the prompt is, and where the answers are. A record has a form if it has all of its keys: of
# several such forms that with most answers, then the first. Other keys, and nulls, do not count.
# One more line here reads one more form.
FORMS = [
    (["prompt"], ["response"]),                   # a demonstration
    (["prompt"], ["completion"]),                 # TRL's; a "label" beside it may call it bad
    (["instruction"], ["output"]),                # Alpaca's; an "input" goes on with the prompt
    ([], ["messages"]),                           # a conversation: the last turn is the answer
    ([], ["conversations"]),                      # ShareGPT's
    ([], ["text"]),                               # plain text: an answer without a prompt
    (["prompt"], ["chosen", "rejected"]),         # a preference; chosen is a demonstration, too
    (["messages"], ["chosen", "rejected"]),
    (["conversations"], ["chosen", "rejected"]),  # ShareGPT's: each answer is one turn
    (["instruction"], ["chosen", "rejected"]),    # Alpaca's
    ([], ["chosen", "rejected"]),                 # both begin with the prompt: HH, TRL
    (["prompt"], []),                             # where no answer is needed
]
ASSISTANT = "\n\nAssistant:"
SPEAKER = {"system": "", "user": "\n\nHuman: ", "assistant": ASSISTANT + " "}
ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "function_call": "tool",
         "observation": "tool"}  # other names of TRL's roles

CONVERT = {  # what is not read -> Python that makes of it what is
    ".csv": "import csv, json; open({new!r}, 'w').writelines(json.dumps(row) + '\\n' for row in "
            "csv.DictReader(open({old!r}, encoding='utf-8-sig', newline='')))",
    ".tsv": "import csv, json; open({new!r}, 'w').writelines(json.dumps(row) + '\\n' for row in "
            "csv.DictReader(open({old!r}, encoding='utf-8-sig', newline=''), delimiter='\\t'))",
    ".parquet": "import pandas; "
                "pandas.read_parquet({old!r}).to_json({new!r}, orient='records', lines=True)",
    ".arrow": "import datasets; datasets.Dataset.from_file({old!r}).to_json({new!r})",
    ".txt": "import json; open({new!r}, 'w').writelines(json.dumps({{'text': t}}) + '\\n' for t in "
            "open({old!r}, encoding='utf-8').read().split('\\n\\n'))",
    "tool call": "turns = [t for t in turns if t.get('role', t.get('from')) in ('system', 'user', "
                 "'assistant', 'human', 'gpt') and not t.get('tool_calls')]",
}


def read_records(path, longest=2**26, largest=2**28):
    """Yield (where, object): where is "path:line", or "path:record 3" in an array.

    A line of over `longest` bytes or an array of over `largest` is refused before its end."""
    number, line, first = 0, b"", True
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            # Lines of bytes end at \n only; lines of text would also end at a U+2028 in a string.
            for number, line in enumerate(iter(lambda: file.readline(longest), b""), 1):
                line = line.removeprefix(codecs.BOM_UTF8)
                if first and line.lstrip().startswith(b"["):
                    yield from read_array(path, line, file, largest)
                    return
                if line.strip():
                    yield f"{path}:{number}", {**json.loads(line.decode().strip())}
                    first = False
    except (ValueError, TypeError, RecursionError) as error:  # not UTF-8, not JSON, or no object
        number += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{number}: {not_json(path, line, error, first)}") from error
    except (OSError, EOFError, zlib.error) as error:  # no such file, or a .gz cut short or damaged
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}:{number + 1}: expected a file to read, came: {why}") from error
    if not number:
        raise UserError(f"{path}:1: expected one JSON object a line, came an empty file")


def read_array(path, line, file, largest):
    """Yield (where, object) for each record of the array that begins with this line."""
    parts = itertools.islice(iter(lambda: file.read(2**16), b""), largest // 2**16)
    content = b"".join([line, *parts])
    if file.read(1):
        raise UserError(f"{path}:1: expected an array of at most {largest:,} bytes, came a longer "
                        "one; JSON Lines may be of any length")
    for number, record in enumerate(json.loads(content.decode()), 1):
        where = f"{path}:record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, came {record!r:.60}")
        yield where, record


def not_json(path, line, error, first):
    """What was expected and what came; for a file of a known other kind, what converts it"""
    kind = ".parquet" if line.startswith(b"PAR1") else Path(path).suffix
    if first and kind in CONVERT:
        code = CONVERT[kind].format(old=str(path), new=f"{Path(path).name}.jsonl")
        return (f"expected JSON Lines or a JSON array, plain or .gz; came a {kind} file, "
                f"which this line of Python converts: {code}")
    return (f"expected JSON in UTF-8, an object; came {line[:60]!r}: {error} "
            "(a file has one JSON object on each line, or is one JSON array)")


def dialogues(fields, answers, where):
    """A record -> its (prompt, answer) pairs: two if two answers are asked for, otherwise one.

    An answer is None if there is none, and False if a label says that it is a bad one."""
    filled = {key for key, value in fields.items() if value is not None}
    form = form_of(filled) or form_of(fields.keys())
    expected = ["a prompt", "an answer", "two answers"][answers]
    if not form or len(form[1]) < answers:
        keys = [key if key in filled else f"{key} (null)" for key in fields]
        raise UserError(f"{where}: expected {expected}; came the keys {keys!r:.300}; the nearest "
                        f"form that is read has the keys {nearest(fields, answers)}")
    pairs = [dialogue(fields, *form, key, where) for key in form[1] or form[0]][: answers or 1]
    if answers and None in [answer for _, answer in pairs]:
        raise UserError(f"{where}: expected {expected}; came turns of which the last is the user's")
    if form[1] == ["completion"] and (label := fields.get("label")) is not None:
        if label not in (True, False):
            raise UserError(f"{where}: expected label to be true or false, came {label!r:.60}")
        return [(prompt, label and answer) for prompt, answer in pairs]
    return pairs


def form_of(keys):
    """-> the form of a record with these keys, or None"""
    forms = [form for form in FORMS if {*form[0], *form[1]} <= keys]
    return max(forms, key=lambda form: len(form[1]), default=None)


def nearest(keys, answers):
    """-> the keys of the form, among those with so many answers, that most of these resemble"""
    forms = [asks + gives for asks, gives in FORMS if len(gives) >= answers]
    known = {key for form in forms for key in form}
    similar = {k for key in keys for k in difflib.get_close_matches(key[:40].lower(), known, 1)}
    return max(forms, key=lambda form: len(similar & {*form}))


def dialogue(fields, asks, gives, key, where):
    """-> prompt, and the answer under this key, or None"""
    if asks == ["instruction"]:
        parts = [k for k in ("instruction", "input") if k in asks or fields.get(k)]
        prompt = "\n".join(string(fields, k, where) for k in parts)
        answer = {"role": "assistant", "content": string(fields, key, where)}
        return conversation({"role": "user", "content": prompt}, answer, where)
    if isinstance(fields[key], list | dict):
        return conversation(fields[asks[0]] if asks and gives else [], fields[key], where)
    text = string(fields, key, where)
    if key in ("text", "prompt"):
        return ("", text) if key == "text" else (text, None)
    return (string(fields, *asks, where), text) if asks else transcript(fields, gives, key, where)


def transcript(fields, gives, key, where):
    """A whole dialogue in one string -> prompt, answer"""
    texts = {k: string(fields, k, where) for k in gives}
    # An answer that goes on to speak for the human (twice in HH) is kept so: a fault to be learnt.
    prompt, mark, answer = texts[key].rpartition(ASSISTANT)
    if mark:
        return prompt + mark, answer
    # TRL does without the mark: the prompt is the words with which both begin.
    shared = re.match(r".+(?=\s)", os.path.commonprefix([*texts.values()]), re.DOTALL)
    if len(texts) < 2 or not shared or ASSISTANT in "".join(texts.values()):
        raise UserError(f"{where}: expected {ASSISTANT!r} in {key}, or chosen and rejected that "
                        f"begin with the same words; came {texts[key][:60]!r}")
    return shared[0], texts[key].removeprefix(shared[0])


def conversation(before, turns, where):
    """Turns of the prompt and of the answer -> prompt, answer; None if the user is last"""
    before, turns = as_turns(before), as_turns(turns)
    # UltraFeedback's answers begin with the prompt, and it stands beside them too, as a string.
    asked = [{"role": "user", "content": t} if isinstance(t, str) else t for t in before[:1]]
    if asked and asked[0] in turns[:2]:
        before = []
    turns = before + turns
    for i, turn in enumerate(turns or [turns], 1):
        roles = [*SPEAKER] if i == 1 else ["user", "assistant"]
        if isinstance(turn, dict) and turn["role"] == "tool":
            raise UserError(f"{where}: expected turns of system, user and assistant, came a tool "
                            f"call in turn {i}; leave it out so: {CONVERT['tool call']}")
        if not isinstance(turn, dict) or turn["role"] not in roles:
            expected = f"turn {i} to have content and a role ({', '.join(roles)})"
            expected += " or to be the text of the turn after it" * isinstance(turn, str)
            raise UserError(f"{where}: expected {expected}, came {turn!r:.60}")
    texts = [SPEAKER[turn["role"]] + string(turn, "content", where) for turn in turns]
    answer = texts.pop().removeprefix(ASSISTANT) if turns[-1]["role"] == "assistant" else None
    return "".join(texts) + ASSISTANT, answer


def as_turns(value):
    """A turn or a list of turns -> a list of them with TRL's names; what is no turn stays"""
    turns = []
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, dict):
            role = "tool" if turn.get("tool_calls") else turn.get("role", turn.get("from"))
            content = turn.get("content", turn.get("value"))
            turn = {"role": ROLES.get(str(role), role), "content": content}
        turns.append(turn)
    return turns


def string(fields, key, where):
    if not isinstance(fields.get(key), str):
        raise UserError(f"{where}: expected {key} to be a string, came {fields.get(key)!r:.60}")
    # JSON can spell half a surrogate pair. UTF-8 cannot, and printing it fails, so it becomes "?".
    return fields[key].encode("utf-8", "replace").decode()
