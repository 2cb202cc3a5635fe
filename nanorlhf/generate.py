"""Prompts in, responses out.

One causal pass over the prompts fills the key-value cache; then one token a step for all rows, each
row at its own position. Shapes never change while decoding.
"""
import torch

from nanorlhf import UserError, parallel
from nanorlhf.config import autocast
from nanorlhf.logprobs import tempered
from nanorlhf.model import KVCache


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, eos=None, pad=0, G=1):
    """Sample G responses to each prompt; temperature 0 takes the likeliest token.

    prompts: list of B / G token lists -> tokens (B, P + R), prompt_len (B,), mask (B, R)

    The responses to one prompt stand together, and share the one pass over it.

    A row stops at the end token `eos`, which belongs to the response: choosing to stop is an action
    too. A row cut off by the limit has no end token. Past the end stands `pad`, outside the mask.
    """
    if not prompts or not all(prompts):
        raise UserError("expected prompts of one token at least, came none or an empty one")
    P, limit = max(map(len, prompts)), model.config.n_positions
    if P + max_new_tokens > limit:
        raise UserError(f"a prompt of {P} tokens and max_new_tokens of {max_new_tokens} do not fit "
                        f"into the model's {limit} positions")
    device, B, R = model.device, len(prompts) * G, max_new_tokens
    prompt_len = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(G)
    tokens = torch.full((B, P + R), pad, device=device)
    for i, prompt in enumerate(prompts):
        tokens[i * G:(i + 1) * G, :len(prompt)] = torch.tensor(prompt)
    mask = torch.zeros(B, R, dtype=torch.bool, device=device)
    rows, alive = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)

    # Prefill. Padding behind a short prompt is cached too; the row's own tokens overwrite it before
    # the row's position, and with it the attention mask, ever reaches that far.
    dtype = model.transformer.wte.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, len(prompts), P + R, device, dtype)
    positions = torch.arange(P, device=device).expand(len(prompts), P)
    hidden = model.transformer(tokens[::G, :P], cache, positions)                    # (B / G, P, C)
    if G > 1:
        cache.keep(rows // G)
    hidden = hidden[rows // G, prompt_len - 1]                                              # (B, C)
    if not hidden.isfinite().all():
        raise UserError("the model computes no finite numbers, so its weights are spoilt: a lower "
                        "--learning-rate is the usual cure")
    for r in range(R):
        token = torch.where(alive, sample(model.head(hidden), temperature), pad)
        at = prompt_len[rows] + r
        tokens[rows, at] = token
        mask[rows, r] = alive
        if eos is not None:
            alive = alive & (token != eos)
        if r % 8 == 7:                                   # not always: asking waits for the device
            if not alive.any():
                break
            # A CPU need not go on with rows that have ended; a GPU is faster with constant shapes.
            if device.type == "cpu" and alive.float().mean() < 0.75:
                cache.keep(alive)
                rows, token, at, alive = rows[alive], token[alive], at[alive], alive[alive]
        if r < R - 1:
            hidden = model.transformer(token[:, None], cache, at[:, None])[:, 0]
    R = max(1, int(mask.sum(1).max()))
    return tokens[:, :P + R], prompt_len, mask[:, :R]


def sample(logits, temperature):
    """One token a row, drawn by inverting the cumulative distribution. (B, V) -> (B,)

    One uniform number a row, where torch.multinomial draws one for every token of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = tempered(logits, temperature).softmax(-1).cumsum(-1)
    u = (1 - torch.rand(len(logits), 1, device=logits.device)) * cumulative[:, -1:]
    # u is in (0, 1]: the first token whose cumulative reaches u is never one of probability 0.
    return torch.searchsorted(cumulative, u).squeeze(-1)


def responses(tokens, prompt_len, mask):
    """The sampled tokens, end token included, as lists. -> list of B token lists"""
    return [row[n:n + m].tolist() for row, n, m in zip(tokens, prompt_len, mask.sum(1))]


def respond(model, tok, prompts, max_new_tokens, temperature=1.0, batch_size=250, dtype="float32"):
    """Answer each prompt (token lists). -> batches (tokens, prompt_len, mask), texts"""
    batches, texts = [], []
    for i in range(0, len(prompts), batch_size):
        with autocast(model.device, dtype):
            batch = generate(model, prompts[i:i + batch_size], max_new_tokens, temperature,
                             tok.eos, tok.pad)
        batches.append(batch)
        texts += [tok.decode(r) for r in responses(*batch)]
    return batches, texts


def sample_rows(model, tok, prompts, cfg):
    """One response to each prompt (token lists) -> rows (tokens, prompt_len)"""
    prompts = parallel.mine(prompts)
    with parallel.own_dice():
        batches, _ = respond(model, tok, prompts, cfg.max_new_tokens, dtype=cfg.dtype)
    sampled = [response for batch in batches for response in responses(*batch)]
    mine = [(prompt + response, len(prompt))
            for prompt, response in zip(prompts, sampled, strict=True)]
    return [row for rows in parallel.everyone(mine) for row in rows]
