"""Hugging Face's layout: a folder with config.json and model.safetensors; beside them state.pt.

In: a dict of settings and a dict of tensors. Out: two files that transformers opens as well, each
replaced whole or not at all, and a third with what else resuming needs.

A safetensors file is 8 bytes that say how long the header is (little-endian); the header, JSON
padded with spaces, {name: {"dtype", "shape", "data_offsets": [begin, end]}}; and the numbers,
tensor after tensor without a gap. Unlike a pickle it cannot run code: it may come from a stranger.
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
MAX_HEADER = 2**22  # bytes, for some 40,000 tensors: JSON, once parsed, takes many times its length


def save(folder, config, tensors):
    """config (a dict) -> config.json, tensors ({name: tensor}) -> model.safetensors"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", config)
    save_tensors(folder / "model.safetensors", tensors)


def load(folder):
    """-> config, tensors, as they were saved. Raises UserError where they cannot be read."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{folder} is no checkpoint: expected {path}, which train_sft.py and "
                        f"train_rm.py write ({error.strerror})") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no model's settings: expected a JSON object")
    return config, load_tensors(path.with_name("model.safetensors"))


def save_state(folder, parts, **numbers):
    """Write what resuming needs: parts ({name: model or optimizer}), numbers, the random state.
    Raises UserError, and the save before stays, where a weight is not a finite number."""
    for name, part in parts.items():
        weights = part.parameters() if isinstance(part, torch.nn.Module) else ()
        if not all(w.isfinite().all() for w in weights):
            raise UserError(f"the {name} has weights that are not finite numbers, so {folder} keeps"
                            " the save before: a lower --learning-rate is the usual remedy")
    state = {name: part.state_dict() for name, part in parts.items()}
    rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())
    with replacing(Path(folder) / "state.pt") as file:
        torch.save(dict(state, numbers=numbers, random=rng), file)


def load_state(folder, parts):
    """Put the parts and the random state back where save_state found them. -> its numbers
    Raises UserError where there is no save of these parts."""
    path = Path(folder) / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # refuses to run code
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"]["cpu"])
        for gpu, rng in zip(range(torch.cuda.device_count()), state["random"]["cuda"]):
            torch.cuda.set_rng_state(rng, gpu)  # there may have been more, or fewer
        return state["numbers"]
    except Exception as error:  # OSError, EOFError, RuntimeError, UnpicklingError, ...
        raise UserError(f"{path}: expected the saved state of this run, got a "
                        f"{type(error).__name__}") from None


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
        with suppress(OSError):  # Windows opens no folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # else a power cut may bring the old file back
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; it is as it was before") from None
    finally:
        temporary.unlink(missing_ok=True)


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
            file.write(as_bytes(t.detach().cpu().contiguous()))


def load_tensors(path):
    """A safetensors file -> {name: tensor}. Its header is checked before any memory is taken.
    Raises UserError where the file cannot be read, or is not as its header says."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            for name, dtype, shape in read_header(file):
                tensors[name] = torch.empty(shape, dtype=dtype)
                file.readinto(as_bytes(tensors[name]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {str(error)[:200]}") from None
    return tensors


def as_bytes(tensor):
    """The tensor's own memory, to write from or read into, whatever its shape and type."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_header(file):
    """(name, dtype, shape) of each tensor, in the order of the file, which they fill exactly."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    start, position = 8 + length, 0  # where the numbers start, and where the next tensor does
    expect(start <= size, f"a header of {length} bytes in a file of {size}")
    expect(length <= MAX_HEADER, f"a header of {length} bytes, more than {MAX_HEADER}")
    header, entries = json.loads(file.read(length)), []
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        expect(entry["dtype"] in DTYPES, f"{name} has the unknown type {entry['dtype']}")
        dtype = DTYPES[entry["dtype"]]
        whole = all(type(n) is int for n in (*shape, begin, end))  # 10**9 * "text" is long, too
        expect(whole, f"{name} has shape {shape} and offsets {begin}, {end}")
        expect(begin == position, f"{name} begins at byte {begin}, expected {position}")
        needed, position = math.prod(shape) * dtype.itemsize, end
        expect(needed == end - begin, f"{name} needs {needed} bytes, and has {end - begin}")
        entries.append((name, dtype, shape))
    expect(start + position == size, f"{position} bytes of tensors, {size - start} in the file")
    return entries


def expect(is_so, otherwise):
    if not is_so:
        raise ValueError(otherwise)
