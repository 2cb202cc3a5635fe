"""A dataclass becomes a command line, and the comments beside its fields become the help.

Seed, device and number format are chosen here, once.
"""
import argparse
import difflib
import errno
import inspect
import random
import re
import sys
from dataclasses import dataclass, field, is_dataclass
from math import inf
from typing import Literal, get_args, get_origin, get_type_hints

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


@dataclass
class SampleConfig(TrainConfig):
    """What the stages that learn from samples of a policy have in common."""
    sft: str = "out/sft"              # the model to start from
    data: list[str] = field(default_factory=list)  # files; none: the built-in world
    prompts: int = 4000               # prompts to sample responses to (built-in world)
    responses: int = 4                # to each prompt
    max_new_tokens: int = 80          # longest sampled response
    steps: int = 0                    # updates; 0: one pass over the data


# The least and the greatest value of a field of that name. A class may have RANGES of its own.
RANGES = {name: limits for limits, names in {
    (0, 2**32 - 1): "seed",           # what NumPy takes
    (0, 10**9): "steps warmup micro_batch_size learning_rate critic_learning_rate weight_decay "
        "kl_coef kl_target no_end_penalty annotator_temperature seeds cql",
    (1, 10**9): "batch_size save_every epochs minibatches responses prompts eval_prompts demos "
        "held_out_prompts max_new_tokens n_layer n_head n_embd iters batch prompt response vocab "
        "time_limit",
    (2, 10**9): "block_size",
    (258, 10**9): "vocab_size",
    (0, 1): "gamma lam tau polyak",
    (0, 0.99): "dropout",
    (-10**9, 10**9): "likes_length",
    (1e-9, 10**9): "temperature beta",
    (1e-9, inf): "clip value_clip grad_clip",
}.items() for name in names.split()}  # fmt: skip
DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO
OUT_OF_MEMORY = "MemoryError|out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"


def run(main, cls):
    """Call main with what the command line says. A user's mistake ends in one line and status 2."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII shows "?"
    status = 2
    try:
        return main(parse(cls))
    except UserError as error:
        reason = " ".join(str(error).split())
    except KeyboardInterrupt:
        reason, status = "interrupted", 130
    except OSError as error:
        if error.errno not in DISK:
            raise
        reason = f"cannot use {error.filename or 'a file'}: {error.strerror}"
    except (RuntimeError, MemoryError) as error:
        words = f"{type(error).__name__}: {error} {error.__context__}"  # a CPU has only words, and
        if not re.search(OUT_OF_MEMORY, words):  # a CUDA graph fails with words of its own after it
            raise
        reason = "out of memory: try a smaller model, or fewer or shorter responses"
        if hasattr(cls, "micro_batch_size"):  # which bounds sampling as well as the update
            reason = "out of memory: try a smaller --micro-batch-size (0, the default, is no limit)"
    # Out here the traceback is gone, and with it the frame that held a progress bar on this line.
    if parallel.may_speak():
        print(reason, file=sys.stderr)
    sys.exit(status)


def parse(cls, argv=None):
    """An instance of the dataclass cls, from argv. Raises UserError for what does not fit."""
    parser, words = make_parser(cls), sys.argv[1:] if argv is None else argv
    # --batch_size=my_file -> --batch-size=my_file
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    try:
        values, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from None
    if unknown:
        flag, flags = unknown[0].partition("=")[0], re.findall("--[a-z-]+", parser.format_usage())
        nearest = difflib.get_close_matches(flag, flags, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise UserError(f"{flag} is not a flag of {parser.prog}: {remedy}")
    ranges = RANGES | getattr(cls, "RANGES", {})
    for name, value in vars(values).items():
        low, high = ranges.get(name, (-inf, inf))
        if isinstance(value, int | float) and not low <= value <= high:  # NaN is in no range
            limits = f"{low} or more" if high in (10**9, inf) else f"{low} to {high}"
            limits = "a number above 0" if low == 1e-9 else limits
            raise UserError(f"--{name.replace('_', '-')}: expected {limits}, came {value}")
    return cls(**vars(values))


def make_parser(cls):
    """One flag for each field, those of cls itself first; a field's comment is its help."""
    parser = argparse.ArgumentParser(description=cls.__doc__.strip().splitlines()[0],
                                     allow_abbrev=False, exit_on_error=False)
    hints, defaults = get_type_hints(cls), vars(cls())
    source = "".join(inspect.getsource(base) for base in filter(is_dataclass, cls.__mro__))
    for name, comment in re.findall(r"^ +(\w+): .*?  # (.*)", source, re.MULTILINE):
        hint = hints.pop(name, None)
        if hint is None:  # no field, or one of a base class that cls has described in its own words
            continue
        if hint is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif hint == list[str]:
            kind = dict(nargs="*")
        elif get_origin(hint) is Literal:
            kind = dict(choices=get_args(hint))
        else:
            kind = dict(type=hint)
        flag = "--" + name.replace("_", "-")
        if name == getattr(cls, "POSITIONAL", None):  # may be given without its name
            flag, kind = name, dict(kind, nargs="?")
        flag = parser.add_argument(flag, default=defaults[name], **kind)
        shown = "none" if defaults[name] in ("", []) else defaults[name]
        flag.help = f"{comment} (default: {shown})".replace("%", "%%")
    return parser


def setup(cfg):
    """Seed all random numbers, meet other processes -> the device, or UserError if not there."""
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
    """dtype by its name, or for "auto": bfloat16 where the hardware multiplies it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # private names: without them it is float32, never wrong
        checks = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        fast = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in checks)
    return torch.bfloat16 if fast else torch.float32


def named(device, dtype):
    """For the first lines of a run: cuda (NVIDIA H100) in bfloat16, elsewhere in TF32"""
    text = f"{device} in {precision(device, dtype)}".replace("torch.", "")
    if device.type != "cuda":
        return text
    text += ", elsewhere in TF32" if torch.cuda.get_device_capability(device) >= (8, 0) else ""
    return text.replace("cuda", f"cuda ({torch.cuda.get_device_name(device)})", 1)


def autocast(device, dtype):
    """The context in which matrix products run in the format that precision() makes of dtype."""
    dtype = precision(device, dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_trunks(wanted, *models):
    """Compile the trunks of models with torch.compile, if that is wanted and possible here."""
    if not wanted:
        return
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=models[0].device))
    except Exception as error:  # of many kinds: no compiler, no Triton, ...
        print(f"compile   not possible here ({type(error).__name__}): continues without it")
        return
    # One for each kind of call (with or without gradients, frozen, cached, of changing shape), for
    # all models together. Past its own limit of 8, PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for model in models:
        model.transformer.compile()
        model.compiled = True
    print("compile   on: the first step of each new shape takes long")
