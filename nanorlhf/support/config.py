"""A dataclass becomes a command line; seed, device and number format are chosen once.

In: a dataclass whose fields each have a default and a comment beside it, and the words of the
command line. Out: an instance of it, and the device and number format that the run computes with.

    @dataclass
    class Config(TrainConfig):
        '''Teach a model to imitate.'''
        steps: int = 200              # updates to make
        data: list[str] = field(default_factory=list)  # files to read instead of our own

    run(main, Config)                 # calls main(Config(steps=..., ...))

Left out on purpose: configuration files, nested groups, "None" as a value.
"""
import argparse
import ast
import dataclasses
import difflib
import errno
import inspect
import io
import random
import re
import sys
import textwrap
import tokenize
import typing
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch

from nanorlhf.support import UserError, parallel


@dataclass
class ComputeConfig:
    """Where a program computes, and from which seed."""
    seed: int = 1                     # of everything that is drawn at random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    overwrite: bool = False           # replace a run of other settings


@dataclass
class TrainConfig(ComputeConfig):
    """The settings that all five stages share."""
    micro_batch_size: int = 0         # rows in memory at once, same result; 0: no limit
    warmup: int = 20                  # steps over which the learning rate rises from zero
    grad_clip: float = 1.0            # a longer gradient is shortened to this length
    compile: bool = False             # use torch.compile: a slow start, faster steps
    save_every: int = 200             # steps between saves that --resume continues from
    resume: bool = False              # continue from the last save


# The least and the greatest value that make sense in a field of that name, in any dataclass. A
# class with narrower limits says so in a RANGES of its own.
ABOVE_0 = sys.float_info.min
RANGES = {name: limits for limits, names in {
    (0, inf): "steps warmup micro_batch_size learning_rate critic_learning_rate weight_decay "
              "kl_coef kl_target no_end_penalty annotator_temperature seeds cql",
    (1, inf): "batch_size save_every epochs minibatches responses prompts eval_prompts "
              "held_out_prompts demos max_new_tokens n_layer n_head n_embd iters batch prompt "
              "response vocab",
    (2, inf): "block_size",
    (258, inf): "vocab_size",
    (0, 1): "gamma lam tau polyak",
    (0, 0.99): "dropout",
    (-inf, inf): "likes_length",
    (ABOVE_0, inf): "temperature beta clip value_clip grad_clip",
}.items() for name in names.split()}  # fmt: skip
DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO
MAY_BE_INFINITE = "clip", "value_clip", "grad_clip"  # no limit


def run(main, cls):
    """Call main with what the command line says. A user's mistake ends in one line and status 2."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII shows "?"
    try:
        return main(parse(cls))
    except UserError as error:
        message, status = " ".join(str(error).split()), 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except OSError as error:
        if error.errno not in DISK:
            raise
        message, status = f"cannot use {error.filename or 'a file'}: {error.strerror}", 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message, status = f"out of memory: {less_memory(cls)}", 2
    # Out here the traceback is gone, and with it the frame that held a progress bar on this line.
    if parallel.may_speak():
        print(message, file=sys.stderr)
    sys.exit(status)


def out_of_memory(error):
    """PyTorch has a type for it on a GPU, and on a CPU only words (of Unix, of Windows)."""
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or re.search("can't allocate memory|not enough memory", str(error)))


def less_memory(cls):
    """What to try. The setting bounds sampling as well as the update."""
    if not hasattr(cls, "micro_batch_size"):
        return "a smaller model, or fewer or shorter responses at once, need less"
    return ("try a smaller --micro-batch-size (0, the default, is no limit): half as many rows at "
            "once need about half the memory, and the result is the same")


def parse(cls, argv=None):
    """An instance of the dataclass cls, filled from argv (the process's own words if None).
    Raises UserError where a word is no flag, or a value is none that its field can have."""
    parser, words = make_parser(cls), sys.argv[1:] if argv is None else argv
    # --batch_size=my_file -> --batch-size=my_file
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        nearest = difflib.get_close_matches(flag, known, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise UserError(f"{flag} is not a flag of {parser.prog}: {remedy}")
    for name, value in vars(values).items():
        check_range(name, value, RANGES | getattr(cls, "RANGES", {}))
    return cls(**vars(values))


def check_range(name, value, ranges):
    (low, high), expected = ranges.get(name, (-inf, inf)), None
    if type(value) in (int, float) and not (low <= value <= high):  # NaN is in no range
        expected = f"{low} to {high}" if high < inf else f"{low} or more"
        expected = "a number above 0" if low == ABOVE_0 else expected
    elif value == inf and name not in MAY_BE_INFINITE:
        expected = "a finite number"
    if expected:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, came {value}")


class Parser(argparse.ArgumentParser):
    """Argparse prints its usage and exits on a mistake; here run() says it in one line."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def make_parser(cls):
    """One flag for each field. No abbreviations: a new field would change what --s means."""
    parser = Parser(description=inspect.getdoc(cls).splitlines()[0], allow_abbrev=False)
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    for name, comment in comments_beside_fields(cls).items():
        hint, default = hints[name], fields[name].default
        if hint is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif hint == list[str]:
            kind, default = dict(nargs="*"), fields[name].default_factory()
        elif typing.get_origin(hint) is Literal:
            kind = dict(choices=typing.get_args(hint))
        else:
            kind = dict(type=hint)
        flag = parser.add_argument("--" + name.replace("_", "-"), default=default, **kind)
        shown = "none" if default in ("", []) else default
        flag.help = f"{comment} (default: {shown})".replace("%", "%%")
    return parser


def comments_beside_fields(cls):
    """{field: the comment beside it}, from the source: so --help and the source cannot disagree.
    The fields of the class itself come first, then those of its base classes."""
    found = {}
    for base in filter(dataclasses.is_dataclass, cls.__mro__):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                found.setdefault(node.target.id, comments[node.end_lineno])
    return found


def setup(cfg):
    """Seed all that draws random numbers -> the device that cfg.device names, if it is there.
    Several processes of torchrun meet here. Raises UserError where seed or device is no good."""
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"--seed: expected a number from 0 to 2**32 - 1, got {cfg.seed}")
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(cfg.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA: a 10-bit mantissa, and much faster
    device = find_device(cfg.device)
    parallel.start(device)
    return device


def find_device(name):
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    found = [device for device in there if there[device]]  # the best comes first
    if name not in ("auto", *found):
        raise UserError(f"--device: PyTorch sees {' and '.join(found)} on this machine, not {name}")
    return torch.device(found[0] if name == "auto" else name)


def precision(device, dtype):
    """The number format to compute in. dtype "auto", "float32" or "bfloat16" -> torch.dtype

    "auto" takes bfloat16 where the hardware multiplies it, and float32 elsewhere: emulated bfloat16
    runs too, but slower than float32.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            or device.type == "cpu" and fast_bfloat16_cpu())
    return torch.bfloat16 if fast else torch.float32


def fast_bfloat16_cpu():
    # Private names, which may go: then the answer is float32, which is never wrong.
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def autocast(device, dtype):
    """The context in which matrix products run in the format that precision() makes of dtype."""
    dtype = precision(device, dtype)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compile_trunks(wanted, *models):
    """Compile the trunks of models with torch.compile, if that is wanted and possible here."""
    if not wanted:
        return
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=models[0].device))
    except Exception as error:  # of many kinds: no compiler, no Triton, ...
        print(f"compile   not possible here ({type(error).__name__}): continues without it")
        return
    for model in models:
        model.transformer.compile()
        model.compiled = True
    print("compile   on: the first step of each new shape takes long")
