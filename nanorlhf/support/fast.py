"""The fast forms of what the course writes plainly. Tests hold each to its plain form."""
from functools import partial

import torch
from torch.autograd.function import once_differentiable


def rows_at_a_time(function, logits, *others, **settings):
    """function(logits (..., V), *others (...), **settings) -> (...), for a few rows at a time: they
    stay in the processor's cache, so at GPT-2's vocabulary it is twice as fast, in less memory."""
    rows = logits.flatten(0, -2), *(x.flatten() for x in others)
    if len(rows[0]) <= rows_in_chunk(logits):         # nothing to split, or to compute twice
        return function(logits, *others, **settings)
    return _RowsAtATime.apply(partial(function, **settings), *rows).view(logits.shape[:-1])


class _RowsAtATime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, logits, *others):
        ctx.function = function
        ctx.save_for_backward(logits, *others)
        return torch.cat([function(*part) for part in chunks(logits, *others)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Each chunk is computed again, and its gradient written where it belongs."""
        logits, *others = ctx.saved_tensors
        result = torch.empty_like(logits)
        for x, out, push, *rest in chunks(logits, result, gradient, *others):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                out.copy_(torch.autograd.grad(ctx.function(x, *rest), x, push)[0])
        return None, result, *(None for _ in others)


def chunks(logits, *others):
    """Parts of logits (N, V) and others."""
    n = rows_in_chunk(logits)
    return zip(*(x.split(n) for x in (logits, *others)))


def rows_in_chunk(logits):
    """4 MB for a CPU's cache, 64 MB to keep a GPU busy."""
    return max(1, (2**20 if logits.device.type == "cpu" else 2**24) // logits.shape[-1])


class Decoder:
    """generate.decode, step by step: tensors change in place, and nothing waits for the device."""

    def __init__(self, sample, model, cache, tokens, prompt_len, uniforms, temperature, eos, pad):
        self.sample, self.model, self.cache, self.tokens = sample, model, cache, tokens
        self.temperature, self.eos, self.pad, self.uniforms = temperature, eos, pad, uniforms
        self.rows = torch.arange(len(tokens), device=tokens.device)      # of tokens: ours to answer
        self.token, self.at = tokens[:, 0].clone(), prompt_len - 1       # the last one, and where
        self.r = torch.zeros(1, dtype=torch.long, device=tokens.device)  # tokens chosen so far
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)

    def step(self):
        """Read each row's last token, and choose the next."""
        x = self.model.transformer(self.token[:, None], self.cache, self.at[:, None])
        self.choose(x[:, 0])

    def choose(self, hidden):
        """hidden (B, C): the trunk's output at each row's last token"""
        u = self.uniforms.index_select(1, self.r)                                           # (B, 1)
        chosen = self.sample(self.model.head(hidden), self.temperature, u)
        self.token.copy_(torch.where(self.alive, chosen, self.pad))
        self.at += 1
        self.r += 1
        self.tokens[self.rows, self.at] = self.token
        if self.eos is not None:
            self.alive &= self.token != self.eos

    def keep(self, rows):
        """Continue with these rows only."""
        self.cache.keep(rows)
        self.rows, self.token, self.at = self.rows[rows], self.token[rows], self.at[rows]
        self.alive, self.uniforms = self.alive[rows], self.uniforms[rows]


def decode(sample, model, cache, hidden, tokens, *settings):
    """generate.decode, as fast as the device allows. sample: generate.sample; then the same"""
    decoder = Decoder(sample, model, cache, tokens, *settings)
    decoder.choose(hidden)
    step, device, R = decoder.step, tokens.device, decoder.uniforms.shape[1]
    flexible = device.type == "cpu" and not model.compiled                 # as to shapes
    for r in range(1, R):
        if r % 8 == 0:                                   # not always: asking waits for the device
            if not decoder.alive.any():
                break
            # A CPU need not go on with rows that have ended; a GPU is faster with constant shapes.
            if flexible and decoder.alive.float().mean() < 0.75:
                decoder.keep(decoder.alive)
        if flexible:
            cache.filled = tokens.shape[1] - R + r              # the longest prompt, and r tokens
        step()
        if r == 1 and model.compiled and device.type == "cuda":
            step = captured(step)


def captured(step):
    """The same step as one CUDA graph, once a first call has made what is made only once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def computed_dtype(model):
    """The number format of the keys and values that the model computes."""
    if torch.is_autocast_enabled(model.device.type):
        return torch.get_autocast_dtype(model.device.type)
    return model.transformer.wte.weight.dtype


def rows_that_fit(config, longest, most=500, memory=4e9):
    """Responses to sample at once: more than 500 are hardly faster, and 4 GB must hold them."""
    row = 4 * (2 * config.n_layer * config.n_embd * longest    # keys and values
               + 5 * config.vocab_size)                        # logits and what is made of them
    return max(1, min(most, int(memory / row)))
