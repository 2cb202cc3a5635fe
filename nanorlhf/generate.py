"""Prompts in, responses out.

One causal pass over the prompts fills the key-value cache; then one token a step for all rows, each
row at its own position. A step writes into the same tensors every time and never waits for the
device, so that on CUDA it can be captured: one launch in place of hundreds.
"""
import torch

from nanorlhf import UserError
from nanorlhf.logprobs import response_tokens, tempered
from nanorlhf.model import KVCache
from nanorlhf.support import parallel
from nanorlhf.support.config import autocast


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

    cache, hidden = prefill(model, tokens, prompt_len, P, G)
    decoder = Decoder(model, cache, tokens, prompt_len, temperature, eos, pad)
    decoder.choose(hidden)
    step = decoder.step
    for r in range(1, R):
        if r % 8 == 0:                                   # not always: asking waits for the device
            if not decoder.alive.any():
                break
            # A CPU need not go on with rows that have ended; a GPU is faster with constant shapes.
            if device.type == "cpu" and not model.fused and decoder.alive.float().mean() < 0.75:
                decoder.keep(decoder.alive)
        step()
        if r == 1 and model.fused and device.type == "cuda":
            step = captured(step)

    response = response_tokens(tokens, prompt_len, R)
    ends = torch.zeros_like(response) if eos is None else (response == eos).long()
    mask = ends.cumsum(1) == ends                      # nothing before it has ended
    R = max(1, int(mask.sum(1).max()))
    return tokens[:, :P + R], prompt_len, mask[:, :R]


def prefill(model, tokens, prompt_len, P, G):
    """Read the prompts, each once for its G rows. -> cache of B rows, hidden (B, C) at their ends

    Padding behind a short prompt is cached too; the row's own tokens overwrite it before the row's
    position, and with it the attention mask, ever reaches that far.
    """
    B, S = tokens.shape
    if model.fused:
        S += -S % 64                                # as each new shape would wait for the compiler
    cache = KVCache(model.config, B // G, S, model.device, cache_dtype(model))
    positions = torch.arange(P, device=model.device).expand(B // G, P)
    hidden = model.transformer(tokens[::G, :P], cache, positions)                    # (B / G, P, C)
    group = torch.arange(B, device=model.device) // G
    if G > 1:
        cache.keep(group)
    hidden = hidden[group, prompt_len - 1]                                                  # (B, C)
    if not hidden.isfinite().all():
        raise UserError("the model computes no finite numbers, so its weights are spoilt: a lower "
                        "--learning-rate is the usual cure")
    return cache, hidden


class Decoder:
    """Rows that are being answered, one token a step. All that changes, changes in place."""

    def __init__(self, model, cache, tokens, prompt_len, temperature, eos, pad):
        self.model, self.cache, self.tokens = model, cache, tokens
        self.temperature, self.eos, self.pad = temperature, eos, pad
        self.rows = torch.arange(len(tokens), device=tokens.device)      # of tokens: ours to answer
        self.token, self.at = tokens[:, 0].clone(), prompt_len - 1       # the last one, and where
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)

    def step(self):
        """Read each row's last token, and write the next."""
        x = self.model.transformer(self.token[:, None], self.cache, self.at[:, None])
        self.choose(x[:, 0])

    def choose(self, hidden):
        """hidden (B, C): what the model makes of each row's last token"""
        chosen = sample(self.model.head(hidden), self.temperature)
        self.token.copy_(torch.where(self.alive, chosen, self.pad))
        self.at += 1
        self.tokens[self.rows, self.at] = self.token
        if self.eos is not None:
            self.alive &= self.token != self.eos

    def keep(self, rows):
        """Go on with these rows alone."""
        self.cache.keep(rows)
        self.rows, self.token, self.at = self.rows[rows], self.token[rows], self.at[rows]
        self.alive = self.alive[rows]


def captured(step):
    """The same step as one CUDA graph. It records a call without doing the work of it, so all that
    is made once (the autocast copies of the weights, cuBLAS's workspace) must have been made."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cache_dtype(model):
    """That of the keys and values which the model computes."""
    if torch.is_autocast_enabled(model.device.type):
        return torch.get_autocast_dtype(model.device.type)
    return model.transformer.wte.weight.dtype


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


def respond(model, tok, prompts, max_new_tokens, temperature=1.0, batch_size=0, dtype="float32"):
    """Answer each prompt (token lists), batch_size at a time; 0: as many as is quick and fits.

    -> batches (tokens, prompt_len, mask), texts
    """
    batches, texts = [], []
    batch_size = batch_size or quick_batch(model, prompts, max_new_tokens)
    for i in range(0, len(prompts), batch_size):
        with autocast(model.device, dtype):
            batch = generate(model, prompts[i:i + batch_size], max_new_tokens, temperature,
                             tok.eos, tok.pad)
        batches.append(batch)
        texts += [tok.decode(r) for r in responses(*batch)]
    return batches, texts


def quick_batch(model, prompts, max_new_tokens, most=500, room=4e9):
    """Rows to answer at once: past 500 it is hardly faster, and 4 GB are not to be exceeded."""
    c, longest = model.config, max(map(len, prompts), default=0) + max_new_tokens
    row = 4 * (2 * c.n_layer * c.n_embd * longest + 4 * c.vocab_size)   # keys, values and logits
    return max(1, min(most, int(room / row)))


def answer(model, tok, prompts, max_new_tokens, temperature=1.0, seed=0):
    """The same prompts (token lists), the same dice: before and after can be compared.

    The random state of the run is left as it was. -> (prompt, response) texts
    """
    gpu = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpu):
        torch.manual_seed(seed)
        texts = respond(model, tok, prompts, max_new_tokens, temperature)[1]
    return [(tok.decode(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]


def sample_rows(model, tok, prompts, cfg):
    """One response to each prompt (token lists) -> rows (tokens, prompt_len)"""
    prompts = parallel.mine(prompts)
    with parallel.own_dice():
        batches, _ = respond(model, tok, prompts, cfg.max_new_tokens, dtype=cfg.dtype)
    sampled = [response for batch in batches for response in responses(*batch)]
    mine = [(prompt + response, len(prompt))
            for prompt, response in zip(prompts, sampled, strict=True)]
    return [row for rows in parallel.everyone(mine) for row in rows]
