"""Models in the layout of Hugging Face's GPT-2: saved, loaded, checked, and downloaded by name:
once, to ~/.cache/nanorlhf or NANORLHF_CACHE, from huggingface.co or the mirror HF_ENDPOINT."""
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.nn as nn
from tqdm import tqdm

from nanorlhf.support import UserError, checkpoint

# name: [revision, SHA-256 of its model.safetensors, layers, heads, channels]
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_bytes())
TIMEOUT = 30  # seconds of silence
# What model.py computes. Other members of GPT-2's family would load, and compute wrong numbers.
GPT2 = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)


class SavedModel(nn.Module):
    """A network with a GPT-2 trunk. A subclass adds a head, and sets the classes of its settings
    and of its trunk, and the name of its architecture in config.json."""
    settings = {}       # what else config.json says
    compiled = False    # by config.compile_trunks: then each new shape waits for the compiler
    captured = None     # by support/fast.py: how the model samples, in CUDA graphs

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, self.trunk_class(config)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def __str__(self):
        c, size = self.config, sum(p.numel() for p in self.parameters())
        return (f"{c.n_layer} layers x {c.n_embd}, {size / 1e6:.2f} M parameters, "
                f"vocabulary {c.vocab_size:,}")

    def save(self, folder, tok=None, **extra):
        """Write config.json, with extra in it, model.safetensors, and the tokenizer's files."""
        extra = self.settings | (tok.special if tok else {}) | extra
        save(folder, self.architecture, asdict(self.config), self.state_dict(), **extra)
        if tok:
            tok.save(folder)

    @classmethod
    def load(cls, folder, dropout=0.0, fresh_head=True):
        """The model in a folder, or "gpt2", "gpt2-medium" and so on; in eval mode. A scalar head
        that is missing stays new unless fresh_head is False. Raises UserError for other models."""
        config, tensors = load(folder)
        for kind in cls.__subclasses__():                 # a QGPT is a GPT as well
            if config["architectures"] == [vars(kind).get("architecture")]:
                cls, fresh_head = kind, False
        shape = cls.config_class(**sizes(config, len(tensors), folder), dropout=dropout)
        with torch.device("meta"):       # no memory yet: a stranger's config may ask for any size
            expected = cls(shape).state_dict()
        check(tensors, expected, "transformer." if fresh_head else "", folder)
        model = cls(shape)
        model.load_state_dict(tensors, strict=False)
        return model.eval()

    @torch.no_grad()
    def resize_vocab(self, n):
        """Grow the vocabulary to n tokens: published GPT-2 has no pad token. New rows are the mean
        of the old; zeros would have logit 0, where GPT-2's others have about -35. -> self"""
        rows = self.transformer.wte.weight
        if n < len(rows):
            raise UserError(f"expected a tokenizer of at least the model's {len(rows):,} tokens, "
                            f"came one of {n:,}")
        rows = torch.cat([rows, rows.mean(0).expand(n - len(rows), -1)])
        self.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)
        self.config = self.transformer.config = replace(self.config, vocab_size=n)
        return self

    def check_reads(self, writer, same_vocabulary, folder):
        """Raise UserError where this reward model, of the folder, cannot read all of the writer."""
        if not same_vocabulary:
            raise UserError(f"{folder}: expected a reward model with the policy's vocabulary, came "
                            "one with another: they would read each other's tokens as other words")
        ours, theirs = self.config.n_positions, writer.config.n_positions
        if ours < theirs:
            raise UserError(f"{folder}: expected a reward model that reads {theirs} tokens as the "
                            f"policy does, came one of {ours}")


def save(folder, architecture, config, tensors, **extra):
    """config: the fields of GPTConfig; extra goes into config.json as it is."""
    dropout = config.pop("dropout")
    config = dict(architectures=[architecture], model_type="gpt2", **GPT2, **config,
                  n_ctx=config["n_positions"],       # its older name, which llama.cpp reads
                  embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=0.0) | extra
    checkpoint.save(folder, config, {name: transposed(name, w) for name, w in tensors.items()})


def load(folder):
    """A folder, or the name of a published model -> config (a dict), {name: tensor}
    Raises UserError where there is no model, or one that model.py would compute wrongly."""
    folder = fetch(folder) if folder in PUBLISHED else folder
    config, tensors = checkpoint.load(folder)
    for name, value in GPT2.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder}/config.json: expected {name} {value}, came {config[name]}")
    bare = "wte.", "wpe.", "h.", "ln_f."  # so published files call what is in the trunk
    tensors = {f"transformer.{name}" if name.startswith(bare) else name: transposed(name, w)
               for name, w in tensors.items()}
    head, embedding = (tensors.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is not None and embedding is not None and not head.equal(embedding):
        raise UserError(f"{folder}: expected a language head tied to the embedding, came another")
    return {"architectures": None, **config}, tensors


def transposed(name, weight):
    """GPT-2 keeps the weights of its linear layers as (in, out), PyTorch as (out, in)."""
    linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.t() if linear and weight.dim() == 2 else weight


def sizes(config, most, folder):
    """The sizes in config.json. Raises UserError for too large ones; `most` is that of layers."""
    names = "vocab_size", "n_positions", "n_layer", "n_head", "n_embd"
    for name in names:
        n, limit = config.get(name), most if name == "n_layer" else 2**24
        if type(n) is not int or not 1 <= n <= limit:
            raise UserError(f"{folder}/config.json: {name} is {n!r:.60}, expected 1 to {limit}")
    return {name: config[name] for name in names}


def check(tensors, expected, needed, folder):
    """Raise UserError where a tensor has another shape, or one is missing and its name `needed`."""
    if "score.weight" in tensors and "score.weight" not in expected:
        raise UserError(f"{folder}: expected a language model, came one with a scalar head")
    for name, weight in expected.items():
        came = tuple(tensors[name].shape) if name in tensors else "no such weight"
        if came != tuple(weight.shape) and (name in tensors or name.startswith(needed)):
            kind = "a reward model's" if name == "score.weight" else "config.json's"
            raise UserError(f"{folder}: expected {kind} {name}, {tuple(weight.shape)}, came {came}")


def fetch(name):
    """The folder of a published model, downloaded once; a file of the final name is whole."""
    revision, sha256, n_layer, n_head, n_embd = PUBLISHED[name]
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{host}/openai-community/{name}/resolve/{revision}/model.safetensors"
    folder = Path(os.environ.get("NANORLHF_CACHE") or "~/.cache/nanorlhf").expanduser() / name
    weights, part = folder / "model.safetensors", folder / "model.safetensors.part"
    if weights.exists():
        return folder
    config = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", **GPT2, vocab_size=50257,
                  n_positions=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        came = download(url, part)
        if came != sha256:
            part.unlink(missing_ok=True)
            raise ValueError(f"expected a file of SHA-256 {sha256}, came {came}, and it is removed")
        with suppress(FileNotFoundError):  # another process was first
            os.replace(part, weights)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: or HF_ENDPOINT is no URL
        arrived = part.stat().st_size if part.exists() else 0
        raise UserError(f"cannot download {url} to {folder}: {error}; {arrived:,} bytes have "
                        "arrived: try again to go on, or put the file there by hand") from None
    return folder


def download(url, part):
    """Complete the file `part` with what it lacks. -> SHA-256 of the whole"""
    part.touch()  # and never truncated: of two processes, both write the same bytes to one place
    with open(part, "r+b") as file:
        start = file.seek(0, os.SEEK_END)
        request = Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "nanorlhf"})
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status != 206:  # a server that knows no ranges sends it all again
                    file.seek(0)
                with tqdm.wrapattr(answer, "read", answer.length, disable=None) as body:
                    shutil.copyfileobj(body, file)
                if answer.length:  # what was announced and has not come
                    raise OSError(f"the connection broke, {answer.length:,} bytes are missing")
        except HTTPError as error:
            if error.code != 416:  # which says that nothing is missing
                raise
        file.seek(0)
        os.fsync(file.fileno())  # else a power cut may keep the final name and lose the content
        return hashlib.file_digest(file, "sha256").hexdigest()
