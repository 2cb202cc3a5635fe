"""Readers of files that strangers may have made: whatever is in them, a result or one sentence.

Each file begins as a good one and is then damaged, or is made of the right pieces put together
wrong. Nothing else may be raised, no other file opened, and no memory taken beyond a small multiple
of the file.
"""

import gzip
import json
import os
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanorlhf import evaluate, reward, tokenizer
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support import UserError, checkpoint, data, runlog

MULTIPLE, FLOOR = 60, 2**20  # JSON: an empty list is 3 bytes in a file and 64 in memory

fuzz = settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def read_or_refuse(read, size):
    """-> what was read, or None where it was refused in a sentence."""
    tracemalloc.start()
    try:
        result = read()
    except UserError as error:
        assert 0 < len(str(error)) < 2000
        result = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MULTIPLE * size + FLOOR, f"{peak:,} bytes for a file of {size:,}"
    return result


@st.composite
def damaged(draw, *good):
    """Bytes of a good file with some cut, changed, doubled or put in between."""
    content = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([0, 1, 1, 2, 8, 1000])))
        words = [b"", b"0", b"-1", b"99999999999999999999", b"null", b"[]", b"{}", b'"', b"\\ud800",
                 b"[" * 2000, b"NaN", b"1e999", b"\xff", b"\x00", b"\n",
                 bytes(content[at:end]) * 2]  # fmt: skip
        content[at:end] = draw(st.sampled_from(words) | st.binary(max_size=8))
    return bytes(content)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def dumps(fields):
    return json.dumps(fields).encode()


# --- data ---

RECORDS = [
    {"text": "a b"},
    {"prompt": "p", "response": "r"},
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "p"},
    {"prompt": "p", "first": "a", "second": "b", "choice": "tie"},
    {"prompt": "p", "completion": "c", "label": True},
    {"instruction": "i", "input": "x", "output": "o"},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
     "rejected": {"from": "gpt", "value": "c"}},
    {"showing": "1", "choice": "first", "prompt": "p", "chosen": "a", "rejected": "b"},
    {"showing": "2", "choice": "undo"},
]
LINES = [dumps(record) + b"\n" for record in RECORDS]
ARRAY = b"[" + b",".join(LINES) + b"]"
READERS = [data.demonstrations, data.preferences, data.prompts]


@st.composite
def records(draw):
    """The right keys, with anything under them."""
    keys = ["text", "prompt", "response", "chosen", "rejected", "messages", "role", "content",
            "completion", "label", "instruction", "input", "output", "conversations",
            "showing", "choice", "repeat"]  # fmt: skip
    words = ["role", "content", "from", "value", "tool_calls"]
    turn = st.dictionaries(st.sampled_from(words), anything | st.sampled_from(["user", "gpt"]))
    values = anything | turn | st.lists(turn, max_size=3)
    lines = draw(st.lists(st.dictionaries(st.sampled_from(keys), values, max_size=4), max_size=4))
    return draw(st.sampled_from([dumps(lines), b"".join(dumps(line) + b"\n" for line in lines)]))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
@given(content=damaged(b"".join(LINES), ARRAY, *LINES) | records(), cut=st.integers(0, 400))
@fuzz
def test_a_file_of_records(ending, content, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        if ending.endswith("gz"):
            content = gzip.compress(content, mtime=0)
            content = content[: len(content) - cut] if cut < 40 else content
        path.write_bytes(content)
        size = max(len(content), 4096)
        for read in (*READERS, lambda paths: evaluate.choices(paths[0])):
            found = read_or_refuse(lambda: read([path]), size)  # noqa: B023
            if found is not None and read in READERS:
                assert found[0]


def test_a_small_file_cannot_unfold_into_a_line_without_end(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(LINES[0] + b'{"text": "' + b"a" * 10**7, 1))
    tracemalloc.start()
    lines = data.read_records(path, longest=10_000)
    assert next(lines)[1] == RECORDS[0]
    with pytest.raises(UserError, match="bomb.jsonl.gz:2: expected JSON"):
        next(lines)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# --- models and tokenizers ---

TINY = GPTConfig(vocab_size=259, n_positions=4, n_layer=1, n_head=1, n_embd=2)


def files_of_a_model():
    """{name: bytes} of everything that a run's folder holds."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.learn(["aa"], 259).save(folder)
        ScalarGPT(TINY).save(folder)
        checkpoint.save_state(folder, dict(model=GPT(TINY)), step=3)
        runlog.write_whole(Path(folder) / "settings.json", dict(steps=4, data=["x"]))
        log = runlog.RunLog(folder)
        log.write(0, loss=1.0)
        log.write(1, loss=0.5)
        ScalarGPT.load(folder)  # PyTorch imports 60 MB of code when a first model is loaded
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


FILES = files_of_a_model()  # and what loading imports is there


def write(folder, **changed):
    for name, content in (FILES | changed).items():
        (Path(folder) / name).write_bytes(content)


@st.composite
def safetensors(draw):
    """A header of the right form, whose numbers lie."""
    size = st.integers(-4, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
    entry = st.fixed_dictionaries(
        dict(dtype=st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4"]) | anything,
             shape=st.lists(size, max_size=4) | anything,
             data_offsets=st.lists(size, min_size=2, max_size=2) | anything))  # fmt: skip
    names = st.sampled_from(["a", "b", "../../a", "score.weight", "__metadata__", ""])
    header = dumps(draw(st.dictionaries(names, entry | anything, max_size=3)))
    length = draw(st.sampled_from([len(header)] * 6 + [0, 7, 2**22, 2**62, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + bytes(draw(st.integers(0, 40)))


@given(content=damaged(FILES["model.safetensors"]) | safetensors())
@fuzz
def test_a_safetensors_file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        tensors = read_or_refuse(lambda: checkpoint.load_tensors(path), len(content))
        if tensors is not None:
            assert sum(w.nbytes for w in tensors.values()) <= len(content)


@st.composite
def settings_of_a_model(draw):
    config = json.loads(FILES["config.json"])
    values = anything | st.sampled_from([0, 1, 2, 3, 4, 2**24, 2**31, True, 2.0, "2"])
    return dumps(config | draw(st.dictionaries(st.sampled_from(sorted(config)), values)))


@pytest.mark.parametrize("load", [reward.load, ScalarGPT.load, GPT.load])
@given(
    config=damaged(FILES["config.json"]) | settings_of_a_model(),
    weights=st.just(FILES["model.safetensors"]) | damaged(FILES["model.safetensors"]),
)
@fuzz
def test_a_folder_with_a_model(load, config, weights):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **{"config.json": config, "model.safetensors": weights})
        size = len(config) + len(weights)
        model = read_or_refuse(lambda: load(folder), size + 16384)
        if model is not None:
            assert sum(w.nbytes for w in model.parameters()) <= 2 * size


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@given(draw=st.data())
@fuzz
def test_a_tokenizers_files(name, draw):
    content = draw.draw(damaged(FILES[name]))
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **{name: content})
        size = len(FILES["vocab.json"]) + len(content)
        tok = read_or_refuse(lambda: tokenizer.load(folder), size + 4096)
        if tok is not None:
            assert tok.decode(tok.encode("aa b")) == "aa b"


# --- a run's own files ---


@given(content=damaged(FILES["log.jsonl"], FILES["settings.json"]) | records())
@fuzz
def test_a_log_and_settings(content):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **{"log.jsonl": content, "settings.json": content})
        read_or_refuse(lambda: runlog.read(folder), len(content) + 4096)
        read_or_refuse(lambda: list(runlog.RunLog(folder).steps(1, 2)), len(content) + 4096)
        settings = Path(folder) / "settings.json"
        read_or_refuse(lambda: checkpoint.read_json(settings, "no run"), len(content) + 4096)


@given(content=damaged(FILES["state.pt"]))
@settings(parent=fuzz, max_examples=60)
def test_a_saved_state(content):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **{"state.pt": content})
        read_or_refuse(lambda: checkpoint.load_state(folder, dict(model=GPT(TINY))), 2**20)


# --- no path in a file leads out of its folder ---


def test_whatever_a_folder_says_nothing_outside_of_it_is_opened(tmp_path):
    secret, opened = tmp_path / "secret.json", []
    secret.write_text("{}")
    inside = tmp_path / "model"
    inside.mkdir()
    paths = {
        key: "../secret.json"
        for key in "_name_or_path auto_map vocab_file merges_file weight_map base_model".split()
    }
    write(
        inside,
        **{
            "config.json": dumps(json.loads(FILES["config.json"]) | paths),
            "tokenizer_config.json": dumps(paths),
            "settings.json": dumps(dict(steps=4, data=["../secret.json"], sft="../secret.json")),
            "model.safetensors.index.json": dumps(dict(weight_map=dict(a="../secret.json"))),
        },
    )
    header = {"../../a": dict(dtype="F32", shape=[1], data_offsets=[0, 4])}
    (inside / "other").write_bytes(
        len(dumps(header)).to_bytes(8, "little") + dumps(header) + bytes(4)
    )

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(Path(os.fsdecode(arguments[0])).resolve())

    sys.addaudithook(note)
    reward.load(inside)
    tokenizer.load(inside)
    checkpoint.load_tensors(inside / "other")
    checkpoint.load_state(inside, dict(model=GPT(TINY)))
    checkpoint.read_json(inside / "settings.json", "no run")
    runlog.read(inside)
    mine = [path for path in opened if path.is_relative_to(tmp_path)]
    assert len(mine) >= 7 and all(path.parent == inside for path in mine)
    assert secret not in opened
