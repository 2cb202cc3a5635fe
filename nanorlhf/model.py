"""GPT-2's architecture by hand: one trunk, three heads.

    GPT        tokens (B, T) -> logits (B, T, V)     what comes next
    ScalarGPT  tokens (B, T) -> (B, T)               how good so far: reward models, critics
    QGPT       tokens (B, T) -> logits (B, T, V)     what comes next, tilted to what pays (ILQL)

Learned positions, pre-LayerNorm, tanh-GELU, tied embeddings, biases: GPT-2's weights load, and
what is saved here opens in other libraries as GPT-2.
"""
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanorlhf import UserError
from nanorlhf.attention import attend, causal_mask
from nanorlhf.support import checkpoint, pretrained


@dataclass
class GPTConfig:
    """The names are those of GPT-2's config.json."""
    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0   # for SFT and reward models; PPO compares exact log-probs

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_head must divide n_embd, came {self.n_head} and {self.n_embd}")


class KVCache:
    """Keys and values of every position seen so far, allocated once. k, v: L x (B, H, S, D)"""

    def __init__(self, config, B, S, device, dtype):
        shape = (B, config.n_head, S, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.rows = torch.arange(B, device=device)[:, None]                              # (B, 1)

    def update(self, layer, k, v, positions):
        """Write k, v (B, H, T, D) at positions (B, T); -> everything cached, (B, H, S, D) twice."""
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2).to(self.k[layer].dtype)
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2).to(self.v[layer].dtype)
        return self.k[layer], self.v[layer]

    def keep(self, rows):
        """Go on with these rows: bool, or indices, of which one may stand there several times."""
        self.k, self.v = ([x[rows] for x in cached] for cached in (self.k, self.v))
        self.rows = torch.arange(len(self.k[0]), device=self.rows.device)[:, None]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None, positions=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)        # (B, H, T, D)
                   for y in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.update(self.layer, k, v, positions)                          # (B, H, S, D)
            q = q.to(k.dtype)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, mask, cache=None, positions=None):
        x = x + self.attn(self.ln_1(x), mask, cache, positions)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The trunk that both heads share. tokens (B, T) -> hidden (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._init)

    def _init(self, module):
        # Linear layers keep the variance of what passes through them at every width. GPT-2's own
        # 0.02 suits a width of 768; at 128 it is so small that copying is never learnt.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)

    def forward(self, tokens, cache=None, positions=None):
        """With a cache, tokens (B, T) stand at positions (B, T) and see what was cached before."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        if cache is None:
            mask = causal_mask(tokens.shape[1], tokens.device)                           # (T, T)
        else:
            S = cache.k[0].shape[2]
            mask = torch.arange(S, device=x.device) <= positions[:, None, :, None]    # (B, 1, T, S)
        for block in self.h:
            x = block(x, mask, cache, positions)
        return self.ln_f(x)


class _Pretrained(nn.Module):
    """Saving and loading, the same for both heads, in Hugging Face's GPT-2 layout."""
    fused = False       # by config.fuse: then a new shape is dear, as it waits for the compiler

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def __str__(self):
        c, size = self.config, sum(p.numel() for p in self.parameters())
        return (f"{c.n_layer} layers x {c.n_embd}, {size / 1e6:.2f} M parameters, "
                f"vocabulary {c.vocab_size:,}")

    def save(self, folder, **extra):
        """Write config.json and model.safetensors; extra goes into config.json."""
        config = asdict(self.config)
        dropout = config.pop("dropout")
        config = {"architectures": [self.architecture], "model_type": "gpt2",
                  "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, **config,
                  "embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": 0.0, **extra}
        checkpoint.save(folder, config, {name: _stored(name, w).contiguous().cpu()
                                         for name, w in self.state_dict().items()})

    @classmethod
    def load(cls, folder, dropout=0.0, fresh_head=True):
        """The model saved in a folder, or published by the name "gpt2", "gpt2-medium" and so on, in
        eval mode. A scalar head that the folder lacks keeps its fresh start, unless told not to:
        that is how a reward model begins from a language model. Never the other way round.
        """
        if folder in pretrained.PUBLISHED:
            folder = pretrained.fetch(folder)
        config, tensors = checkpoint.load(folder)
        path = Path(folder) / "config.json"
        _check_kind(config, tensors, path)
        if cls is GPT and config.get("architectures") == [QGPT.architecture]:
            cls, fresh_head = QGPT, False     # a policy, too: whoever asks for one gets it whole
        # Published GPT-2 files name the trunk's weights without the prefix.
        bare = "wte.", "wpe.", "h.", "ln_f."
        tensors = {f"transformer.{name}" if name.startswith(bare) else name: _stored(name, w)
                   for name, w in tensors.items()}
        if issubclass(cls, GPT) and "score.weight" in tensors:
            raise UserError(f"{folder}: expected a language model, came one with a scalar head: a "
                            "reward model or a critic")
        shape = _shape(config, dropout, len(tensors), path)
        with torch.device("meta"):       # a stranger's config.json may ask for any size: not yet
            shapes = {name: tuple(w.shape) for name, w in cls(shape).state_dict().items()}
        if fresh_head:
            shapes = {name: size for name, size in shapes.items()
                      if name in tensors or name.startswith("transformer.")}
        _check_shapes(tensors, shapes, shape.n_layer, folder)
        model = cls(shape)
        model.load_state_dict({name: tensors[name] for name in shapes}, strict=False)
        return model.eval()

    @torch.no_grad()
    def resize_vocab(self, n):
        """Grow the vocabulary to n tokens, for GPT-2 as published knows no pad token. -> self

        A new row is the mean of the old ones, so its logit is their mean, and its probability below
        1 / V. A row of zeros has logit 0: GPT-2's real logits are about -35, so it would win all.
        """
        rows = self.transformer.wte.weight
        if n < len(rows):
            raise UserError(f"expected a tokenizer of at least the model's {len(rows):,} tokens, "
                            f"came one of {n:,}")
        rows = torch.cat([rows, rows.mean(0).expand(n - len(rows), -1)])
        self.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)
        self.config = self.transformer.config = replace(self.config, vocab_size=n)
        return self


def _check_kind(config, tensors, path):
    """GPT-2's family has members that this code is not: their weights would load, and lie."""
    expected = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5,
                    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                    add_cross_attention=False)
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: expected {name} {value}, came {config[name]}")
    head, embedding = (tensors.get(name) for name in ("lm_head.weight", "transformer.wte.weight"))
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{path}: expected a language head tied to the embedding, came another")


def _shape(config, dropout, most, path):
    """config.json -> GPTConfig, if its numbers are numbers and `most` tensors could be as many
    layers."""
    numbers = {}
    for name in "vocab_size", "n_positions", "n_layer", "n_head", "n_embd":
        if name not in config:
            raise UserError(f"{path} is no GPT-2 configuration: it has no '{name}'")
        n, limit = config[name], most if name == "n_layer" else 2**24
        if type(n) is not int or not 1 <= n <= limit:
            raise UserError(f"{path}: expected {name} from 1 to {limit}, came {n!r:.60}")
        numbers[name] = n
    return GPTConfig(**numbers, dropout=dropout)


def _check_shapes(tensors, expected, n_layer, folder):
    for name, shape in expected.items():
        if name not in tensors:
            kind = "reward model" if name == "score.weight" else f"GPT-2 model of {n_layer} layers"
            raise UserError(f"{folder} holds no weight {name}; expected a {kind}")
        if tensors[name].shape != shape:
            raise UserError(f"{folder}: {name} is {tuple(tensors[name].shape)}, config.json asks "
                            f"for {shape}")


def _stored(name, weight):
    """GPT-2 keeps the weights of its linear layers as (in, out), PyTorch as (out, in)."""
    transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.t() if transposed and weight.dim() == 2 else weight


class GPT(_Pretrained):
    """A language model. tokens (B, T) -> logits (B, T, V)"""
    architecture = "GPT2LMHeadModel"

    def head(self, hidden):
        """hidden (..., C) -> logits (..., V); the embedding matrix read backwards."""
        return F.linear(hidden, self.transformer.wte.weight)

    def forward(self, tokens):
        return self.head(self.transformer(tokens))


class ScalarGPT(_Pretrained):
    """One number a position, having read everything up to it. tokens (B, T) -> (B, T)"""
    architecture = "GPT2ForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(config.n_embd + 1) ** -0.5)   # Stiennon et al. 2020

    def save(self, folder, **extra):
        super().save(folder, num_labels=1, **extra)

    def forward(self, tokens):
        return wide(self.score(self.transformer(tokens)).squeeze(-1))


def wide(x):
    """Scores and values in float32 or better: bfloat16 has two or three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class QGPT(GPT):
    """A language model that weighs each token by its worth. tokens (B, T) -> logits (B, T, V)

    The trunk says what is usual; two Q heads and a V head say what is gained by it. `beta`, saved
    with the weights, is the trade: 0 is the language model itself (Snell et al. 2022, section 5).
    """
    architecture = "QGPT"

    def __init__(self, config):
        super().__init__(config)
        self.q = nn.ModuleList(_value_head(config.n_embd, config.vocab_size) for _ in range(2))
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.v = _value_head(config.n_embd, 1)
        self.register_buffer("beta", torch.ones(()))

    def save(self, folder, **extra):
        # Not "gpt2": another library would find the trunk, drop the heads, and say nothing.
        super().save(folder, model_type="qgpt", **extra)

    def head(self, hidden):
        """log pi + beta (Q - V), up to a constant. V shifts all tokens alike: it changes nothing
        but keeps the logits near those of the language model. hidden (..., C) -> logits (..., V)"""
        gain = torch.minimum(*(q(hidden) for q in self.target_q)) - self.v(hidden)
        return super().head(hidden) + self.beta * wide(gain)


def _value_head(C, outputs):
    """Two layers, as a linear readout of a trunk that was trained for words says too little of
    worth. It starts at 0: nothing is better than anything else."""
    head = nn.Sequential(nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, outputs))
    nn.init.zeros_(head[2].weight)
    nn.init.zeros_(head[2].bias)
    return head
