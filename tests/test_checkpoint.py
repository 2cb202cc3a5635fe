"""Hugging Face's files: written for others to read, read as if strangers wrote them."""

import json
import os
import tracemalloc

import pytest
import safetensors.torch
import torch

from nanorlhf.support import UserError, checkpoint
from nanorlhf.support.checkpoint import (
    load,
    load_state,
    load_tensors,
    save,
    save_state,
    save_tensors,
)

AWKWARD = {
    "matrix": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "slice": torch.arange(10)[::3],
    "scalar": torch.tensor(-2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -0.0, float("inf")]).half(),
    "bfloat16": torch.tensor([[1.5], [3e38]]).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "naïve ☃": torch.tensor([1, 255], dtype=torch.uint8),
    **{f"i{bits}": torch.tensor([-1], dtype=getattr(torch, f"int{bits}")) for bits in (8, 16, 32)},
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].equal(b[name])
        for name in a
    )


def test_tensors_come_back_as_they_were(tmp_path):
    save_tensors(tmp_path / "a", AWKWARD)
    assert same(load_tensors(tmp_path / "a"), AWKWARD)


def test_the_official_package_reads_what_we_write(tmp_path):
    save_tensors(tmp_path / "a", AWKWARD)
    assert same(safetensors.torch.load_file(tmp_path / "a"), AWKWARD)
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_we_read_what_the_official_package_writes(tmp_path):
    safetensors.torch.save_file(
        {name: tensor.detach().contiguous() for name, tensor in AWKWARD.items()}, tmp_path / "a"
    )
    assert same(load_tensors(tmp_path / "a"), AWKWARD)


def test_every_tensor_is_aligned_for_programs_that_map_the_file(tmp_path):
    for name_length in range(8):
        tensors = {**AWKWARD, "x" * name_length: torch.zeros(1)}
        save_tensors(tmp_path / "a", tensors)
        data = (tmp_path / "a").read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        for name, tensor in tensors.items():
            begin, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
            assert begin % tensor.element_size() == 0


def test_loaded_tensors_can_be_changed_without_changing_each_other(tmp_path):
    save_tensors(tmp_path / "a", {"a": torch.zeros(2), "b": torch.zeros(2)})
    loaded = load_tensors(tmp_path / "a")
    loaded["a"] += 1
    assert loaded["b"].tolist() == [0, 0]


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, shape, dtype="F32", **more):
    return dict(dtype=dtype, shape=shape, data_offsets=[begin, end], **more)


HOSTILE = {
    "no bytes at all": b"",
    "half a length": b"\x10\x00\x00",
    "a header longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": raw(b"{'a'"),
    "a header that is no text": raw(b"\xff\xfe\xfd"),
    "a header that is no object": raw([1, 2]),
    "a header too deep to parse": raw(b"[" * 100_000),
    "a tensor that is no object": raw({"a": 3}),
    "a tensor without a shape": raw({"a": dict(dtype="F32", data_offsets=[0, 0])}),
    "three offsets": raw({"a": dict(dtype="F32", shape=[0], data_offsets=[0, 0, 0])}),
    "a type that is not known": raw({"a": entry(0, 1, [2], "F4")}, bytes(1)),
    "a type that is no word": raw({"a": entry(0, 4, [1], ["F32"])}, bytes(4)),
    "a shape of text": raw({"a": entry(0, 4, "1")}, bytes(4)),
    "a shape that multiplies text": raw({"a": entry(0, 4, [10**15, "a"])}, bytes(4)),
    "a fractional shape": raw({"a": entry(0, 4, [1.0])}, bytes(4)),
    "a negative shape": raw({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "a huge shape": raw({"a": entry(0, 4, [2**62])}, bytes(4)),
    "a huge shape that wraps to its byte count": raw({"a": entry(0, 4, [2**62, 4, 4])}, bytes(4)),
    "a huge shape with nothing in it": raw({"a": entry(0, 0, [0, 2**62, 2**62, 2**62])}),
    "a shape beyond any integer": raw({"a": entry(0, 0, [0, 10**30])}),
    "negative offsets": raw({"a": entry(-4, 0, [1])}, bytes(4)),
    "offsets in reverse": raw({"a": entry(4, 0, [1])}, bytes(4)),
    "tensors that overlap": raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "tensors with a hole between": raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "a hole before the first": raw({"a": entry(4, 8, [1])}, bytes(8)),
    "bytes after the last": raw({"a": entry(0, 4, [1])}, bytes(5)),
    "bytes missing from the last": raw({"a": entry(0, 4, [1])}, bytes(3)),
    "a name that floods the screen": raw({"a" * 100_000: entry(0, 4, [2])}, bytes(4)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_with(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file") as no:
        load_tensors(path)
    assert len(str(no.value)) < 500


@pytest.mark.parametrize(
    "what, sentence",
    {
        "a header longer than the file": f"a header of {2**63} bytes, 0 of tensors, in 10",
        "a type that is not known": "KeyError.'F4'",
        "a huge shape": f"expected a at 0 to {2**64}, came {{.*{2**62}.*0, 4",
        "tensors that overlap": "expected b at 8 to 16, came {.*4, 12",
        "bytes missing from the last": "4 of tensors, in [0-9]+",
    }.items(),
)
def test_the_sentence_says_what_is_wrong(what, sentence, tmp_path):
    (tmp_path / "a").write_bytes(HOSTILE[what])
    with pytest.raises(UserError, match=sentence):
        load_tensors(tmp_path / "a")


def test_the_header_may_name_tensors_in_any_order(tmp_path):
    header = {"b": entry(4, 8, [1]), "a": entry(0, 4, [1])}
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "a").write_bytes(raw(header, data))
    assert {name: x.item() for name, x in load_tensors(tmp_path / "a").items()} == {"a": 1, "b": 2}


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a"
    save_tensors(path, {"a": torch.arange(4), "b": torch.ones(2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_tensors(path)


def test_no_header_makes_us_take_much_memory(tmp_path):
    many = {str(i): entry(0, 2**40, [2**38]) for i in range(1000)}
    for data in (raw(many), raw(b"[" + b"[]," * 2_000_000 + b"[]]")):
        (tmp_path / "a").write_bytes(data)
        tracemalloc.start()
        with pytest.raises(UserError):
            load_tensors(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * len(data) and peak < 10e6


def test_a_checkpoint_is_a_config_and_tensors(tmp_path):
    save(tmp_path / "out" / "sft", {"n_layer": 2}, AWKWARD)
    config, tensors = load(tmp_path / "out" / "sft")
    assert config == {"n_layer": 2} and same(tensors, AWKWARD)
    assert sorted(os.listdir(tmp_path / "out" / "sft")) == ["config.json", "model.safetensors"]


def test_a_missing_part_of_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="sft is no checkpoint of .*: expected .*config.json"):
        load(tmp_path / "sft")
    save(tmp_path / "sft", {}, {})
    (tmp_path / "sft" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is not a whole safe.*No such file"):
        load(tmp_path / "sft")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    save(tmp_path, {}, {})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="expected a JSON object in .*config.json"):
        load(tmp_path)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, {"step": 1}, {"a": torch.zeros(1)})
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    monkeypatch.undo()
    assert load(tmp_path)[1]["a"].item() == 0
    assert len(os.listdir(tmp_path)) == 2  # and no litter


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*config.json: No space left"):
        save(tmp_path, {}, {})


def trained(seed):
    """A model and its optimizer, one step old."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return dict(model=model, optimizer=optimizer)


def test_everything_goes_on_where_it_was(tmp_path):
    parts = trained(seed=0)
    save_state(tmp_path, parts, step=7, kl_coef=0.05)
    expected = torch.rand(3)

    others = trained(seed=1)  # of the same shape, with other weights and another rate
    assert load_state(tmp_path, others) == dict(step=7, kl_coef=0.05)
    assert torch.rand(3).equal(expected)  # what would have been drawn next
    assert same(others["model"].state_dict(), parts["model"].state_dict())
    assert others["optimizer"].param_groups[0]["lr"] == 0.1
    for w, old in zip(others["model"].parameters(), parts["model"].parameters(), strict=True):
        moments, old_moments = others["optimizer"].state[w], parts["optimizer"].state[old]
        assert same(moments, old_moments) and moments["exp_avg"].abs().max() > 0


def test_a_crash_while_saving_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path, trained(0), step=1)
    monkeypatch.setattr(checkpoint.torch, "save", lambda state, file: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        save_state(tmp_path, trained(1), step=2)
    assert load_state(tmp_path, trained(1)) == dict(step=1)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_state_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "state.pt")
    with pytest.raises(UserError, match="state.pt"):
        load_state(tmp_path, trained(0))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_a_state_that_cannot_be_read_is_said_in_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match="state.pt: expected the saved state of this run"):
        load_state(tmp_path, trained(0))


def test_the_state_of_another_run_is_refused(tmp_path):
    save_state(tmp_path, dict(model=torch.nn.Linear(3, 5)), step=7)
    for parts in dict(model=torch.nn.Linear(3, 2)), dict(critic=torch.nn.Linear(3, 5)):
        with pytest.raises(UserError, match="expected the saved state of this run"):
            load_state(tmp_path, parts)
