"""The small language model that four of the notebooks start from.

    from notebooks.models import imitator     with the repository's root on sys.path
"""
import inspect
import zlib
from collections import Counter
from pathlib import Path

import torch

from nanorlhf import environment, sft, tokenizer
from nanorlhf import model as networks
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.support import data
from nanorlhf.support.runlog import RunLog


def imitator():
    """A model that has learned to write stories from demonstrations. The first notebook that
    needs it trains it, in about a minute, and keeps it for the others. -> model, tokenizer, folder
    """
    sources = "".join(map(inspect.getsource, (environment, tokenizer, networks, sft)))
    folder = Path(__file__).parents[1] / f"out/notebooks/{zlib.crc32(sources.encode()):08x}"
    if not (folder / "vocab.json").exists():
        torch.manual_seed(0)
        demos = environment.demonstrations(6000)
        tok = tokenizer.learn((text for record in demos for text in record.values()), 1024)
        model = GPT(GPTConfig(tok.vocab_size, n_positions=160, n_layer=2, n_head=2, n_embd=128))
        rows, held_out = (data.encode(x, tok, 160, Counter()) for x in (demos[:-100], demos[-100:]))
        cfg = sft.SFTConfig(out=str(folder), steps=500, save_every=10**6, dtype="float32")
        sft.train(model, rows, held_out, tok.pad, cfg, RunLog(every=100, columns=["loss"]))
        model.save(folder, tok)
    return GPT.load(folder).eval(), tokenizer.load(folder), str(folder)
