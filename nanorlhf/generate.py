"""Prompts in, responses out.

One causal pass over the prompts fills the key-value cache; then one token a step for all rows, each
row at its own position. Shapes never change while decoding.
"""
import torch

from nanorlhf import UserError
from nanorlhf.logprobs import log_softmax
from nanorlhf.model import KVCache


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, eos=None, pad=0):
    """Sample a response to each prompt; temperature 0 takes the likeliest token.

    prompts: list of token lists -> tokens (B, P + R), prompt_len (B,), mask (B, R)

    A row stops at the end token `eos`, which belongs to the response: choosing to stop is an action
    too. A row cut off by the limit has no end token. Past the end stands `pad`, outside the mask.
    """
    P, limit = max(map(len, prompts)), model.config.n_positions
    if P + max_new_tokens > limit:
        raise UserError(f"a prompt of {P} tokens and max_new_tokens of {max_new_tokens} do not fit "
                        f"into the model's {limit} positions")
    device, B, R = model.device, len(prompts), max_new_tokens
    prompt_len = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.full((B, P + R), pad, device=device)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    mask = torch.zeros(B, R, dtype=torch.bool, device=device)
    rows, alive = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)

    # Prefill. Padding behind a short prompt is cached too; the row's own tokens overwrite it before
    # the row's position, and with it the attention mask, ever reaches that far.
    cache = KVCache(model.config, B, P + R, device, model.transformer.wte.weight.dtype)
    positions = torch.arange(P, device=device).expand(B, P)
    hidden = model.transformer(tokens[:, :P], cache, positions)[rows, prompt_len - 1]       # (B, C)
    for r in range(R):
        token = torch.where(alive, sample(model.head(hidden), temperature), pad)
        tokens[rows, prompt_len + r] = token
        mask[:, r] = alive
        if eos is not None:
            alive = alive & (token != eos)
        if r == R - 1 or r % 8 == 7 and not alive.any():   # asking waits for the device
            break
        at = (prompt_len + r)[:, None]                                                      # (B, 1)
        hidden = model.transformer(token[:, None], cache, at)[:, 0]
    R = max(1, int(mask.sum(1).max()))
    return tokens[:, :P + R], prompt_len, mask[:, :R]


def sample(logits, temperature):
    """One token a row, drawn by inverting the cumulative distribution. (B, V) -> (B,)

    One uniform number a row, where torch.multinomial draws one for every token of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = log_softmax(logits, temperature).exp().cumsum(-1)
    u = (1 - torch.rand(len(logits), 1, device=logits.device)) * cumulative[:, -1:]
    # u is in (0, 1]: the first token whose cumulative reaches u is never one of probability 0.
    return torch.searchsorted(cumulative, u).squeeze(-1)


def responses(tokens, prompt_len, mask):
    """The sampled tokens, end token included, as lists. -> list of B token lists"""
    return [row[n:n + m].tolist() for row, n, m in zip(tokens, prompt_len, mask.sum(1))]
