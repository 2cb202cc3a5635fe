"""A function that the user wrote, in a file of the user's: --reward FILE.py:FUNCTION."""
import importlib.util
import math
import traceback
from pathlib import Path

import torch

from nanorlhf.support import UserError


def load(name):
    """FILE.py:FUNCTION -> the function. Raises UserError where there is none."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--reward: expected rm, env or FILE.py:FUNCTION, got {name}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    guarded(path, spec.loader.exec_module, module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward: {path} has no function {function!r}")
    return getattr(module, function)


def by_text(function, tok):
    """A function of (prompt, response) texts as one of (tokens (B, T), prompt_len, mask) -> (B,)"""
    def scores(tokens, prompt_len, mask):
        ends = (prompt_len + mask.sum(1)).tolist()
        pairs = [(tok.decode(row[:start]), tok.decode(row[start:end]))
                 for row, start, end in zip(tokens.tolist(), prompt_len.tolist(), ends)]
        return torch.tensor(call(function, pairs), device=tokens.device)
    return scores


def call(function, pairs):
    """function(pairs), if it is a finite number for each (prompt, response). -> list of floats"""
    result = guarded("the reward function", function, pairs)
    try:
        scores = [float(x) for x in result]
    except (TypeError, ValueError, RuntimeError):
        scores = []
    expected = f"the reward function must return {len(pairs)} finite numbers, one a response; it "
    if len(scores) != len(pairs):
        raise UserError(f"{expected}returned {result!r:.60}")
    for x, (prompt, response) in zip(scores, pairs):
        if not math.isfinite(x):
            raise UserError(f"{expected}returned {x} for {response!r:.200}, "
                            f"said to {prompt!r:.200}")
    return scores


def guarded(what, function, *args):
    """Call the user's code. If it fails, its traceback is shown, without our part of it."""
    try:
        return function(*args)
    except Exception as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        raise UserError(f"{what} raised {type(error).__name__}, see above: {error}") from None
