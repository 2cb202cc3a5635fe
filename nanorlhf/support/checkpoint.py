"""Hugging Face's layout: config.json and model.safetensors; beside them state.pt to resume from.

A safetensors file cannot run code. It is the length of its header in 8 bytes; the header, JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}}; and the numbers without a gap.
"""
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanorlhf.support import UserError

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8,
              BOOL=torch.bool)
MAX_HEADER = 2**18  # bytes, for 2,000 tensors: JSON, once parsed, takes many times its length


def save(folder, config, tensors):
    """config (a dict) -> config.json, tensors ({name: tensor}) -> model.safetensors"""
    os.makedirs(folder, exist_ok=True)
    write_whole(Path(folder) / "config.json", config)
    save_tensors(Path(folder) / "model.safetensors", tensors)


def load(folder):
    """-> config, tensors, as they were saved. Raises UserError where they cannot be read."""
    config = read_json(Path(folder) / "config.json", f"{folder} is no checkpoint of a train_*.py")
    return config, load_tensors(Path(folder) / "model.safetensors")


def read_json(path, wrong):
    """The JSON object in a file -> dict. Raises UserError, which begins with `wrong`."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        came = getattr(error, "strerror", None) or error
        raise UserError(f"{wrong}: expected a JSON object in {path}, came: {came}") from None


def save_state(folder, parts, **numbers):
    """Save models, optimizers, numbers, random state. Raises UserError for weights not finite."""
    for name, part in parts.items():
        weights = part.parameters() if isinstance(part, torch.nn.Module) else ()
        if not all(w.isfinite().all() for w in weights):
            raise UserError(f"weights of the {name} are not finite numbers: lower --learning-rate")
    state = {name: part.state_dict() for name, part in parts.items()}
    rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())
    with replacing(Path(folder) / "state.pt") as file:
        torch.save(dict(state, numbers=numbers, random=rng), file)


def load_state(folder, parts):
    """Put parts and random state back. -> numbers. Raises UserError where no save is of these."""
    path = Path(folder) / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # refuses to run code
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"]["cpu"])
        torch.cuda.set_rng_state_all(state["random"]["cuda"][:torch.cuda.device_count()])
        return state["numbers"]
    except Exception as error:  # OSError, EOFError, RuntimeError, UnpicklingError, ...
        raise UserError(f"{path}: expected the saved state of this run: {error!r:.80}") from None


@contextmanager
def replacing(path):
    """A file to write to, which takes the place of path once it is complete, even in a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose its content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; it is as it was before") from None
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folder
        folder = os.open(path.parent, os.O_DIRECTORY)
        with suppress(OSError):  # not every file system can
            os.fsync(folder)  # else a power cut may bring the old file back
        os.close(folder)


def write_whole(path, content):
    """Write a text, or a dict as JSON. A crash in the middle leaves the old file."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def save_tensors(path, tensors):
    """{name: tensor} -> a safetensors file. The widest types come first: all are aligned."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers looks for this "pt"
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = dict(dtype=codes[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def load_tensors(path):
    """A safetensors file -> {name: tensor}. Raises UserError where it is not as its header says."""
    tensors, end = {}, 0  # end: of the last tensor, counted from the end of the header
    try:
        with open(path, "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            header = dict(json.loads(file.read(min(length, size, MAX_HEADER))))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, begin = DTYPES[entry["dtype"]], entry["shape"], end
                end += math.prod(map(int, shape)) * dtype.itemsize  # int: no 10**15 * "text"
                if entry["data_offsets"] != [begin, end] or end > size:  # before it takes memory
                    raise ValueError(f"expected {name} at {begin} to {end}, came {entry}")
                tensors[name] = torch.empty(shape, dtype=dtype)
                file.readinto(tensors[name].reshape(-1).view(torch.uint8).numpy())
            if 8 + length + end != size:
                raise ValueError(f"a header of {length} bytes, {end} of tensors, in {size}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error!r:.200}") from None
    return tensors
