"""Files as people have them: each form is read, and what is not read is refused in one sentence."""

import gzip
import json
import os
from pathlib import Path

import pytest

from nanorlhf.support import UserError
from nanorlhf.support.data import choices, demonstrations, describe, preferences, prompts
from nanorlhf.support.formats import CONVERT, FORMS, read_records

READERS = [prompts, demonstrations, preferences]  # by how many answers they need


def turn(role, content):
    return {"role": role, "content": content}


def said(speaker, value):
    return {"from": speaker, "value": value}


HI, YES, NO = turn("user", "Hi"), turn("assistant", "Yes."), turn("assistant", "No.")
BE_KIND = turn("system", "Be kind.")
ASK, TELL = said("human", "Hi"), said("gpt", "Yes.")
RENDERED = "\n\nHuman: Hi\n\nAssistant:"
SKY = {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}
LONGER = [HI, YES, turn("user", "Why?")]
LONGER_RENDERED = RENDERED + " Yes.\n\nHuman: Why?\n\nAssistant:"

ROWS = [  # a record, its prompt, its answers
    # TRL's page on dataset formats: language modelling, prompt only, prompt and completion,
    ({"text": "The sky is blue."}, "", ["The sky is blue."]),
    ({"messages": [HI, YES]}, RENDERED, [" Yes."]),
    ({"prompt": "The sky is"}, "The sky is", []),
    ({"prompt": [HI]}, RENDERED, []),
    ({"prompt": "The sky is", "completion": " blue."}, "The sky is", [" blue."]),
    ({"prompt": [HI], "completion": [YES]}, RENDERED, [" Yes."]),
    # preference, with the prompt beside the answers and within them, and unpaired preference.
    (SKY, "The sky is", [" blue.", " black."]),
    ({"prompt": [HI], "chosen": [YES], "rejected": [NO]}, RENDERED, [" Yes.", " No."]),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "The sky is", [" blue.", " black."],
    ),
    ({"chosen": "Q: Hi\nA: Yes", "rejected": "Q: Hi\nA: No"}, "Q: Hi\nA:", [" Yes", " No"]),
    ({"chosen": [HI, YES], "rejected": [HI, NO]}, RENDERED, [" Yes.", " No."]),
    ({"prompt": "a", "completion": "b", "label": True}, "a", ["b"]),
    ({"prompt": [HI], "completion": [YES], "label": 1}, RENDERED, [" Yes."]),
    ({"prompt": "a", "completion": "b", "label": None}, "a", ["b"]),
    # UltraFeedback: the prompt is the first turn as well, and counts once.
    ({"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]}, RENDERED, [" Yes.", " No."]),
    (
        {"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO], "messages": [HI, YES]},
        RENDERED, [" Yes.", " No."],
    ),
    (
        {"prompt": "Hi", "chosen": [BE_KIND, HI, YES], "rejected": [BE_KIND, HI, NO]},
        "Be kind." + RENDERED, [" Yes.", " No."],
    ),
    ({"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]}, RENDERED, [" Yes.", " No."]),
    (
        {"messages": [HI, YES], "chosen": [HI, YES], "rejected": [HI, NO]},
        RENDERED, [" Yes.", " No."],
    ),
    ({"messages": [HI], "chosen": YES, "rejected": NO}, RENDERED, [" Yes.", " No."]),
    ({"prompt": LONGER, "chosen": [NO], "rejected": [YES]}, LONGER_RENDERED, [" No.", " Yes."]),
    # An answer may say again what the user said.
    ({"prompt": [HI], "response": [turn("assistant", "Hi")]}, RENDERED, [" Hi"]),
    # ShareGPT
    ({"conversations": [ASK, TELL]}, RENDERED, [" Yes."]),
    ({"conversations": [said("user", "Hi"), said("assistant", "Yes.")]}, RENDERED, [" Yes."]),
    (
        {"conversations": [said("system", "Be kind."), ASK, TELL], "id": "x_0"},
        "Be kind." + RENDERED, [" Yes."],
    ),
    (
        {"conversations": [ASK], "chosen": TELL, "rejected": said("gpt", "No.")},
        RENDERED, [" Yes.", " No."],
    ),
    # Alpaca
    ({"instruction": "Hi", "input": "", "output": "Yes."}, RENDERED, [" Yes."]),
    ({"instruction": "Hi", "output": "Yes."}, RENDERED, [" Yes."]),
    ({"instruction": "Hi", "input": None, "output": "Yes.", "text": "both"}, RENDERED, [" Yes."]),
    (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        "\n\nHuman: Add\n1, 2\n\nAssistant:", [" 3"],
    ),
    (
        {"instruction": "Hi", "output": "Yes.", "chosen": "Yes.", "rejected": "No."},
        RENDERED, [" Yes.", " No."],
    ),
    # A table with columns for everything writes null where it has nothing.
    ({"prompt": "a", "response": "b", "chosen": None, "rejected": None}, "a", ["b"]),
    ({"prompt": None, "chosen": [HI, YES], "rejected": [HI, NO]}, RENDERED, [" Yes.", " No."]),
    ({"messages": [HI, YES | {"tool_calls": None}], "source": "me"}, RENDERED, [" Yes."]),
]  # fmt: skip


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(params=["lines.jsonl", "lines.json", "array.json", "array.jsonl", "array.json.gz"])
def file(tmp_path, request):
    """Records -> a file of them; its name does not say which kind it is."""

    def make(*records):
        lines = "\n".join(map(json.dumps, records))
        array = "\ufeff\n" + json.dumps(records, indent=1)
        return write(tmp_path / request.param, array if "array" in request.param else lines)

    return make


@pytest.mark.parametrize("record, prompt, answers", ROWS)
def test_every_form_is_read(tmp_path, record, prompt, answers):
    path = write(tmp_path / "a.jsonl", json.dumps(record))
    pair = dict(prompt=prompt) | dict(zip(["chosen", "rejected"], answers))
    expected = [[prompt], [dict(prompt=prompt, response=[*answers, ""][0])], [pair]]
    for needed, read in enumerate(READERS):
        if needed > len(answers):
            with pytest.raises(UserError, match="a.jsonl:1: expected (an|two) answers?; came"):
                read([path])
        elif prompt or needed:  # plain text has an answer and no prompt
            records, counts = read([path])
            assert records == expected[needed] and counts["records"] == 1


def test_every_form_of_the_table_has_a_row_above():
    tried = [{key for key, value in record.items() if value is not None} for record, _, _ in ROWS]
    for asks, gives in FORMS:
        assert any(keys >= {*asks, *gives} for keys in tried), (asks, gives)


def test_an_array_and_lines_are_told_apart_by_what_is_in_them(file):
    path = file(SKY, SKY | {"prompt": "The sea is"})
    assert [r["prompt"] for r in preferences([path])[0]] == ["The sky is", "The sea is"]
    first, second, _ = choices(file({"choice": "tie"}, {"choice": "first"}))
    assert (first, second) == ((0.5, 1.0), (0.5, 0.0))


def test_a_bad_record_of_an_array_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([SKY, SKY, {"prompt": "p"}], indent=1))
    with pytest.raises(UserError, match=r"a\.json:record 3: expected two answers"):
        preferences([path])
    with pytest.raises(UserError, match=r"a\.json:record 2: expected an object, came 7"):
        prompts([write(path, '[{"prompt": "p"}, 7]')])
    with pytest.raises(UserError, match=r"a\.json:3: expected JSON in UTF-8, an object; came"):
        prompts([write(path, '\n[{"prompt": "p"},\n{"prompt" "q"}]')])
    with pytest.raises(UserError, match=r"a\.json: expected a record .*, came no records"):
        prompts([write(path, "[]")])


def test_an_object_over_several_lines_is_told_what_a_file_looks_like(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(SKY, indent=1))
    with pytest.raises(UserError, match=r"a\.json:1: .*one JSON object on each line, or is one"):
        preferences([path])


def test_an_array_has_a_limit_and_its_first_line_may_be_long(tmp_path):
    path = write(tmp_path / "a.json.gz", json.dumps([SKY] * 5000))
    records = list(read_records(path, longest=2**10))
    assert len(records) == 5000 and records[4999] == (f"{path}:record 5000", SKY)
    with pytest.raises(UserError, match="a.json.gz:1: expected an array of at most 131,072 bytes"):
        list(read_records(path, longest=2**10, largest=2**17))


# --- of no use: counted; unknown: told which form is the nearest ---


def test_an_unpaired_answer_is_a_demonstration_if_it_is_a_good_one(tmp_path):
    good, bad = ({"prompt": p, "completion": "c", "label": p == "p"} for p in "pq")
    path = write(tmp_path / "a.json", json.dumps([good, bad, bad]))
    records, counts = demonstrations([path])
    assert records == [{"prompt": "p", "response": "c"}]
    assert describe(counts) == "1 record; left out: 2 rejected answers"
    assert prompts([path])[0] == ["p", "q"]
    write(path, json.dumps([good | {"label": "yes"}]))
    with pytest.raises(UserError, match="record 1: expected label to be true or false, came 'yes'"):
        demonstrations([path])


@pytest.mark.parametrize("read, keys, nearest", [
    (demonstrations, ["question", "answer"], ["prompt", "response"]),
    (demonstrations, ["query", "response"], ["prompt", "response"]),
    (demonstrations, ["Prompt", "Completion"], ["prompt", "completion"]),
    (demonstrations, ["input", "output"], ["instruction", "output"]),
    (demonstrations, ["conversation"], ["conversations"]),
    (demonstrations, ["prompt", "chosen"], ["prompt", "chosen", "rejected"]),
    (demonstrations, ["prompt", "completions", "labels"], ["prompt", "completion"]),  # stepwise
    (preferences, ["instruction", "output"], ["instruction", "chosen", "rejected"]),
    (preferences, ["prompt", "response"], ["prompt", "chosen", "rejected"]),
    (prompts, ["message"], ["messages"]),
])  # fmt: skip
def test_unknown_keys_are_shown_with_the_nearest_form(tmp_path, read, keys, nearest):
    path = write(tmp_path / "a.jsonl", json.dumps(dict.fromkeys(keys, "x")))
    with pytest.raises(UserError) as error:
        read([path])
    assert f"came the keys {keys}; the nearest form that is read has the keys {nearest}" in str(
        error.value
    )


@pytest.mark.parametrize("record, message", [
    ({"prompt": "p", "response": None}, r"came the keys \['prompt', 'response \(null\)'\]"),
    ({"prompt": "Ho", "chosen": [HI, YES], "rejected": [HI, NO]}, "the turn after it, came 'Ho'"),
    ({"instruction": "i", "input": 3, "output": "o"}, "input to be a string, came 3"),
    ({"instruction": "i", "output": ["o"]}, r"output to be a string, came \['o'\]"),
    ({"conversations": [said("alien", "Hi")]}, "turn 1 to have content and a role .*'alien'"),
    ({"conversations": []}, r"turn 1 to have content and a role .*, came \[\]"),
    ({"chosen": "Yes. Hi", "rejected": "No. Hi"}, "begin with the same words; came 'Yes. Hi'"),
    ({"chosen": "a\n\nAssistant: b", "rejected": "a b"}, "'.*Assistant:' in rejected"),
])  # fmt: skip
def test_a_known_form_with_a_fault_is_named(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", json.dumps(record))
    with pytest.raises(UserError, match=rf"a\.jsonl:1: expected .*{message}"):
        demonstrations([path])


# --- not read: one sentence, and Python that helps ---


@pytest.mark.parametrize("call", [
    {"role": "assistant", "tool_calls": [{"type": "function"}]},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function"}]},
    turn("tool", "12 degrees"),
    said("function_call", "{}"),
    said("observation", "12 degrees"),
])  # fmt: skip
def test_tool_calls_are_refused_with_python_that_leaves_them_out(tmp_path, call):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": [HI, call, YES]}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected .*, came a tool call in turn 2"):
        demonstrations([path])
    names = {"turns": [HI, call, YES, ASK]}
    exec(CONVERT["tool call"], names)
    assert names["turns"] == [HI, YES, ASK]


@pytest.mark.parametrize("name, content", [
    ("a.csv", '\ufeffprompt,response\r\nHi,"Yes, ""you""\r\n."\r\n'),
    ("a.tsv", 'prompt\tresponse\nHi\t"Yes, ""you""\r\n."\n'),
])  # fmt: skip
def test_the_python_that_a_table_is_refused_with_converts_it(tmp_path, monkeypatch, name, content):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        demonstrations([path])
    assert str(error.value).startswith(f"{path}:1: expected JSON Lines or a JSON array")
    assert f"came a {path.suffix} file" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).split("converts: ")[1])
    records = [{"prompt": "Hi", "response": 'Yes, "you"\r\n.'}]
    assert demonstrations([f"{name}.jsonl"]) == (records, {"records": 1})


def test_plain_text_becomes_a_record_for_each_paragraph(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "Once\nthere was\n\na cat.\n")
    with pytest.raises(UserError, match="a.txt:1: expected JSON Lines .*came a .txt file") as error:
        demonstrations([path])
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).split("converts: ")[1])
    texts = [record["response"] for record in demonstrations(["a.txt.jsonl"])[0]]
    assert texts == ["Once\nthere was", "a cat.\n"]


@pytest.mark.parametrize("name, content, python", [
    ("a.parquet", b"PAR1\x15\x04\x15", "import pandas; pandas.read_parquet("),
    ("a.jsonl", b"PAR1\x15\x04\x15", "import pandas; pandas.read_parquet("),
    ("a.arrow", b"\xff\xff\xff\xff\x10\0", "import datasets; datasets.Dataset.from_file("),
])  # fmt: skip
def test_columns_are_refused_with_python_that_converts_them(tmp_path, name, content, python):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        preferences([path])
    assert f"{path}:1: expected JSON Lines or a JSON array" in str(error.value)
    assert f"{python}{str(path)!r})" in str(error.value) and f"'{name}.jsonl'" in str(error.value)


def test_records_in_a_file_with_the_name_of_a_table_are_read(tmp_path):
    assert len(preferences([write(tmp_path / "a.csv", json.dumps(SKY))])[0]) == 1


# --- files that others made for this ---


@pytest.mark.parametrize("name, read, first", [
    ("ultrafeedback_mixed.jsonl", preferences,
     dict(prompt="\n\nHuman: q0 what is it\n\nAssistant:", chosen=" yes 0", rejected=" no 0")),
    ("trl_prompt_completion.jsonl", demonstrations, dict(prompt="a 0", response="b c")),
    ("sharegpt_conversations.jsonl", demonstrations,
     dict(prompt="\n\nHuman: hi 0\n\nAssistant:", response=" hello")),
    ("alpaca_array.json", demonstrations,
     dict(prompt="\n\nHuman: Name a colour, number 0\none word\n\nAssistant:", response=" blue")),
    ("sharegpt_preference_array.json", preferences,
     dict(prompt="\n\nHuman: Hi 0\n\nAssistant:", chosen=" Hello.", rejected=" What.")),
])  # fmt: skip
def test_files_as_others_have_them(name, read, first):
    path = Path(os.environ.get("NANORLHF_DATA", os.devnull)).parent / "cases" / name
    if not path.is_file():
        pytest.skip("beside the folder that NANORLHF_DATA names there is no folder cases")
    records, counts = read([path])
    assert records[0] == first and len(records) == 40 and counts == {"records": 40}
