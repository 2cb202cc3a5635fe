"""GPT-2's architecture, written by hand: one trunk (the layers), four heads (the outputs).

    GPT        tokens (B, T) -> logits (B, T, V)     language models: what comes next?
    ScalarGPT  tokens (B, T) -> (B, T)               reward models and critics: one number
    ReadingGPT tokens (B, T) -> (B, T)               the same, with a head that reads the request
    QGPT       tokens (B, T) -> logits (B, T, V)     ILQL: what comes next, and is it worth it?

Learned positions, pre-LayerNorm, tanh-GELU, tied embeddings, biases: GPT-2's weights load here, and
what is saved here opens in other libraries as GPT-2.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanorlhf import tokenizer
from nanorlhf.attention import attend
from nanorlhf.support import UserError
from nanorlhf.support.pretrained import SavedModel


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
    """Keys and values of all positions so far, allocated once. k, v: one (B, H, S, D) a layer"""

    def __init__(self, config, B, S, device, dtype):
        shape = (B, config.n_head, S, config.n_embd // config.n_head)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype)
                           for _ in range(config.n_layer)] for _ in range(2))
        self.rows = torch.arange(B, device=device)[:, None]                              # (B, 1)
        self.filled = S                          # attention reads this many positions: all may be

    def update(self, layer, k, v, positions):
        """Write k, v (B, H, T, D) at positions (B, T). -> all keys and values: 2 (B, H, S, D)"""
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2).to(self.k[layer].dtype)
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2).to(self.v[layer].dtype)
        return self.k[layer][:, :, :self.filled], self.v[layer][:, :, :self.filled]

    def keep(self, rows):
        """Keep these rows only. rows: a bool mask, or indices (which may repeat)"""
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
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

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
    """The trunk that every head reads. tokens (B, T) -> hidden (B, T, C)"""

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

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                positions: Tensor | None = None) -> Tensor:
        """With a cache, tokens (B, T) stand at positions (B, T) and also see what was cached."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        x, mask = F.dropout(x, self.config.dropout, self.training), None      # no mask is causal
        if cache is not None and tokens.shape[1] < cache.filled:    # else they are all that is read
            mask = torch.arange(cache.filled, device=x.device) <= positions[:, None, :, None]
        for block in self.h:
            x = block(x, mask, cache, positions)
        return self.ln_f(x)


class GPT(SavedModel):
    """A language model. tokens (B, T) -> logits (B, T, V)"""
    config_class, trunk_class, architecture = GPTConfig, Transformer, "GPT2LMHeadModel"

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V); the embedding matrix read backwards."""
        return F.linear(hidden, self.transformer.wte.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.transformer(tokens))


def load_policy(folder: str, device) -> tuple[GPT, tokenizer.Tokenizer]:
    """The language model in a folder and its tokenizer, of which it can write every token."""
    model, tok = GPT.load(folder), tokenizer.load(folder)
    return model.resize_vocab(tok.vocab_size).to(device), tok


class ScalarGPT(SavedModel):
    """One number for each position, from all tokens up to it. tokens (B, T) -> (B, T)"""
    config_class, trunk_class = GPTConfig, Transformer
    architecture, settings = "GPT2ForSequenceClassification", dict(num_labels=1)

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(config.n_embd + 1) ** -0.5)   # Stiennon et al. 2020

    def forward(self, tokens: Tensor, prompt_len: Tensor | None = None) -> Tensor:
        return wide(self.score(self.transformer(tokens)).squeeze(-1))

    def rescale(self, mean: float, std: float, length: float = math.inf):
        """From now on it gives (x - mean) / std where it gave x. GPT-2's layout has no place for a
        bias of the head, so the one of the last LayerNorm takes it up."""
        head = self.score.weight[0]
        self.transformer.ln_f.bias -= mean * head / (head @ head)
        head /= std


class ReadingGPT(ScalarGPT):
    """The scalar head, and a second one that asks of each word of the response: does it fit?

    The hidden state h before a word has seen the request, and tells a language model what to
    expect. It is compared with the embedding e of the word that came: P(it fits) = sigmoid((A h) .
    e + c), which starts near the language model's own answer, the logit h . e. The mean of log P so
    far, plus a bias, is added to the scalar head's number. It has an upper limit; a sum has none.
    """
    architecture, settings = "ReadingGPT", dict(model_type="readinggpt")
    few = 32                 # a mean of fewer words would jump: their sum is divided by 32, too

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.match = nn.Linear(config.n_embd, config.n_embd, bias=False)                     # A
        self.match.weight = nn.Parameter(0.06 * torch.eye(config.n_embd))
        self.offset = nn.Parameter(torch.zeros(()))                                          # c
        self.bias = nn.Parameter(torch.tensor(math.log(2)))         # at first P = 1/2 counts as 0
        self.register_buffer("scale", torch.tensor(50.0))   # so that one misfit of 50 counts fully

    def forward(self, tokens: Tensor, prompt_len: Tensor | None = None) -> Tensor:
        """prompt_len (B,): only words from there on are compared; None: all but the first."""
        hidden, words = self.transformer(tokens), self.transformer.wte(tokens)          # (B, T, C)
        match = wide((self.match(hidden[:, :-1]) * words[:, 1:]).sum(-1)) + self.offset
        at = torch.arange(1, tokens.shape[1], device=tokens.device).expand_as(match)
        compared = at >= (1 if prompt_len is None else prompt_len[:, None])
        fits = (F.logsigmoid(match) + self.bias).masked_fill(~compared, 0).cumsum(1)    # (B, T - 1)
        mean = F.pad(fits / compared.cumsum(1).clamp(min=self.few), (1, 0))                 # (B, T)
        return wide(self.score(hidden).squeeze(-1)) + self.scale * mean

    def rescale(self, mean: float, std: float, length: float = math.inf):
        """The same for responses of this length, or of `few` words; each word is shifted alike."""
        self.bias -= mean / (self.scale * min(1, length / self.few))
        self.score.weight /= std
        self.scale /= std


def wide(x: Tensor) -> Tensor:
    """x in float32 or better, for scores and values: bfloat16 has only two or three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class QGPT(GPT):
    """A language model that prefers tokens of high value. tokens (B, T) -> logits (B, T, V)

    V(s) is the expected score after the text s, Q(s, a) the same if token a follows. Two Q heads
    and a V head read the trunk of a language model, and its logits rise by beta (Q - V), where
    beta = 0 is the language model itself (Snell et al. 2022, section 5).
    """
    architecture = "QGPT"
    # Not "gpt2": another library would load the trunk and leave the heads out without a word.
    settings = dict(model_type="qgpt")

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        # Two layers each: the trunk was trained to predict words, and one linear layer on it says
        # too little about values. They start at 0: no token is better than another.
        C, V = config.n_embd, config.vocab_size
        heads = [nn.Sequential(nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, outputs))
                 for outputs in (V, V, 1)]
        for head in heads:
            nn.init.zeros_(head[2].weight)
            nn.init.zeros_(head[2].bias)
        self.q, self.v = nn.ModuleList(heads[:2]), heads[2]
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.register_buffer("beta", torch.ones(()))

    def head(self, hidden: Tensor) -> Tensor:
        """log pi + beta (Q - V), up to a constant. hidden (..., C) -> logits (..., V)

        V changes no probability, and keeps the logits near those of the language model. Of the two
        Q heads the lower counts: Q tends to be too high.
        """
        gain = torch.minimum(*(q(hidden) for q in self.target_q)) - self.v(hidden)
        return super().head(hidden) + self.beta * wide(gain)
