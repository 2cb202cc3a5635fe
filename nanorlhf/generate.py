"""Prompts in, responses out.

    generate         one batch of prompts -> tensors
    generate_rows    any number of prompts -> rows (tokens, prompt_len), as many at once as fit
    generate_texts   the same as text, from a seed of its own

One causal pass over the prompts fills the key-value cache; then every step adds one token to each
row, at the row's own position. The random numbers are drawn first, one for each token of each
response. So a response depends on the seed, and not on the rows that share its batch or process.
"""
import torch
from torch import Tensor

from nanorlhf.logprobs import response_tokens, tempered
from nanorlhf.model import GPT, KVCache
from nanorlhf.support import UserError, fast, parallel
from nanorlhf.support.config import autocast


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             eos: int | None = None, pad: int = 0, G: int = 1, uniforms: Tensor | None = None):
    """Sample G responses to each prompt; temperature 0 takes the likeliest token.

    prompts: B / G token lists; uniforms (B, max_new_tokens): one number in (0, 1] for each token
    -> tokens (B, P + R), prompt_len (B,), mask (B, R). The G responses to a prompt stand together.

    A row stops at the end token `eos`, which belongs to the response: choosing to stop is an action
    too. A row cut off by the limit has no end token. Past the end stands `pad`, outside the mask.
    Raises UserError where prompt and response do not fit into the model.
    """
    if not prompts or not all(prompts):
        raise UserError("expected prompts of one token at least, came none or an empty one")
    P, limit = max(map(len, prompts)), model.config.n_positions
    if P + max_new_tokens > limit:
        raise UserError(f"a prompt of {P} tokens and max_new_tokens of {max_new_tokens} do not fit "
                        f"into the model's {limit} positions")
    device, B, R = model.device, len(prompts) * G, max_new_tokens
    prompt_len = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(G)
    tokens = torch.tensor([p + [pad] * (P + R - len(p)) for p in prompts for _ in range(G)],
                          device=device)
    uniforms = draw_uniforms(B, R) if uniforms is None else uniforms
    double = torch.float32 if device.type == "mps" else torch.float64          # MPS has no float64
    cache, hidden = prefill(model, tokens, prompt_len, P, G)
    fast.decode(sample, model, cache, hidden, tokens, prompt_len, uniforms.to(device, double),
                temperature, eos, pad)

    response = response_tokens(tokens, prompt_len, R)
    ends = torch.zeros_like(response) if eos is None else (response == eos).long()
    mask = ends.cumsum(1) == ends                # no end token stands before this token
    R = max(1, int(mask.sum(1).max()))
    return tokens[:, :P + R], prompt_len, mask[:, :R]


def draw_uniforms(*shape: int, rng: torch.Generator | None = None) -> Tensor:
    """The random numbers of all responses: float64, in (0, 1]."""
    return 1 - torch.rand(*shape, dtype=torch.float64, generator=rng)


def prefill(model: GPT, tokens: Tensor, prompt_len: Tensor, P: int, G: int):
    """Read each prompt once for its G rows. -> cache of B rows, hidden (B, C) at the prompts' ends
    Padding behind a short prompt is cached too, and overwritten before the row gets that far."""
    (B, S), device = tokens.shape, model.device
    S += -S % 64 if model.compiled or device.type == "cuda" else 0   # few shapes: each is compiled
    cache = KVCache(model.config, B // G, S, device, fast.computed_dtype(model))
    cache.filled = S if device.type == "cpu" else P      # a GPU's fastest kernel is causal
    positions = torch.arange(P, device=device).expand(B // G, P)
    hidden = model.transformer(tokens[::G, :P], cache, positions)                    # (B / G, P, C)
    cache.filled = S
    group = torch.arange(B, device=device) // G
    if G > 1:
        cache.keep(group)
    hidden = hidden[group, prompt_len - 1]                                                  # (B, C)
    if not hidden.isfinite().all():
        raise UserError("the model's output is not a finite number, so its weights are of no use: "
                        "training with a lower --learning-rate is the usual remedy")
    return cache, hidden


def decode(model: GPT, cache: KVCache, hidden: Tensor, tokens: Tensor, prompt_len: Tensor,
           uniforms: Tensor, temperature: float, eos: int | None, pad: int):
    """Write the responses into tokens, one token of every row a step, until every row has ended.
    hidden (B, C): the trunk's output at the end of each prompt. This is the plain form; fast.decode
    does the same, drops rows that have ended, and captures CUDA graphs."""
    rows = torch.arange(len(tokens), device=tokens.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    for r in range(uniforms.shape[1]):
        chosen = sample(model.head(hidden), temperature, uniforms[:, r:r + 1])
        token = torch.where(alive, chosen, pad)
        tokens[rows, prompt_len + r] = token
        alive = alive & (token != eos)
        if not alive.any():
            break
        hidden = model.transformer(token[:, None], cache, (prompt_len + r)[:, None])[:, 0]


def sample(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """One token a row: the first whose cumulative probability reaches u.

    logits (B, V), u (B, 1) in (0, 1] -> (B,). The sum is taken in the number format of u. Over
    GPT-2's 50,257 tokens float32 is too coarse: most of them, with a probability of about 1e-4 in
    all, would never be drawn. As u is above 0, no token of probability 0 is drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = tempered(logits, temperature).softmax(-1).cumsum(-1, dtype=u.dtype)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).squeeze(-1)


def generate_rows(model: GPT, prompts: list[list[int]], max_new_tokens: int, eos: int, pad: int,
                  temperature: float = 1.0, G: int = 1, batch_size: int = 0,
                  dtype: str = "float32", rng: torch.Generator | None = None):
    """G responses to each prompt, side by side -> rows (tokens, prompt_len)
    batch_size: responses at once, 0: as many as is fast. Several processes share the work."""
    if 0 < batch_size < G:
        prompts, G = [prompt for prompt in prompts for _ in range(G)], 1
    longest = max(map(len, prompts)) + max_new_tokens
    n = max(1, (batch_size or fast.rows_that_fit(model.config, longest)) // G)   # prompts at once
    uniforms = draw_uniforms(len(prompts), G, max_new_tokens, rng=rng)
    prompts, uniforms = parallel.local_rows(prompts), parallel.local_rows(uniforms)
    rows = []
    for i in range(0, len(prompts), n):
        with autocast(model.device, dtype):
            tokens, prompt_len, mask = generate(
                model, prompts[i:i + n], max_new_tokens, temperature, eos, pad, G,
                uniforms[i:i + n].flatten(0, 1))
        ends = prompt_len + mask.sum(1)
        rows += [(row[:end], start) for row, start, end in
                 zip(tokens.tolist(), prompt_len.tolist(), ends.tolist())]
    return parallel.gather_rows(rows)


def generate_texts(model: GPT, tok, prompts: list[list[int]], max_new_tokens: int,
                   temperature: float = 1.0, seed: int = 0) -> list[tuple[str, str]]:
    """Texts to compare before and after training, (prompt, response): a seed gives the same random
    numbers, and the random state of the run stays as it was."""
    rows = generate_rows(model, prompts, max_new_tokens, tok.eos, tok.pad, temperature,
                         rng=torch.Generator().manual_seed(seed))
    return [(tok.decode(tokens[:n]), tok.decode(tokens[n:])) for tokens, n in rows]
