"""The fast forms of what the course writes plainly. Tests hold each to its plain form."""
import copy
from functools import partial

import torch
import torch.nn.functional as F
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
    decoder, S = Decoder(sample, model, cache, tokens, *settings), cache.filled
    step, device, R = decoder.step, tokens.device, decoder.uniforms.shape[1]
    flexible = device.type == "cpu" and not model.compiled                 # as to shapes
    if graphs := captures(model):
        decoder, step = kept(decoder, sample, *settings[2:])
    # Attention reads a multiple of this many positions: each new number is a new graph on a GPU.
    width = 1 if flexible else 64 if graphs or device.type == "cuda" else S
    decoder.choose(hidden)
    for r in range(1, R):
        if r % 8 == 0:                                   # not always: asking waits for the device
            if not decoder.alive.any():
                break
            # A CPU need not go on with rows that have ended; a GPU is faster with constant shapes.
            if flexible and decoder.alive.float().mean() < 0.75:
                decoder.keep(decoder.alive)
        filled = tokens.shape[1] - R + r                        # the longest prompt, and r tokens
        decoder.cache.filled = filled + -filled % width
        step()
    if graphs:
        tokens.copy_(decoder.tokens[:, :tokens.shape[1]])


def captures(model):
    """Are decoding steps captured as CUDA graphs? Launching kernels one by one takes longer than
    they do. Graphs are kept for other rows of the same shapes, as to capture one takes as long as
    hundreds of steps."""
    return model.compiled and model.device.type == "cuda"


def kept(decoder, *settings):
    """The decoder and the step that its model keeps, to continue with the rows of this decoder."""
    model, cache, tokens = decoder.model, decoder.cache, decoder.tokens
    decoder.tokens = F.pad(tokens, (0, cache.filled - tokens.shape[1]))   # prompts differ in length
    key = cache.k[0].shape, cache.k[0].dtype, decoder.uniforms.shape, *settings
    if model.captured is None or model.captured.key != key:
        model.captured = None                            # gives its memory back before the next one
        model.captured = Captured(key, decoder)
    model.captured.load(model, decoder)
    return model.captured.decoder, model.captured.step


class Captured:
    """A decoder's step as CUDA graphs, one for each number of positions that attention reads. They
    know addresses alone: whatever they read stays in its place, weights too, and is written there.
    """

    def __init__(self, key, decoder):
        self.key, self.decoder, self.graphs = key, decoder, {}
        decoder.model = cast(decoder.model, decoder.cache.k[0].dtype)

    def load(self, model, other):
        self.decoder.model.load_state_dict(model.state_dict())
        for ours, theirs in zip(*([x.token, x.at, x.r, x.alive, x.uniforms, x.tokens, *x.cache.k,
                                   *x.cache.v] for x in (self.decoder, other))):
            ours.copy_(theirs)

    def step(self):
        n = self.decoder.cache.filled
        if n in self.graphs:
            return self.graphs[n].replay()
        self.decoder.step()               # makes what is made only once, compiled code for example
        self.graphs[n] = capture(self.decoder.step, [g.pool() for g in self.graphs.values()][:1])

    def __deepcopy__(self, memo):
        return None                       # a copy of the model makes its own


def capture(step, pool):
    """Record the step as a CUDA graph, without running it, in the memory of an earlier graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, *pool, capture_error_mode="thread_local"):
        step()
    return graph


def cast(model, dtype):
    """A copy to sample from, its matrices in the format that autocast makes of them: in compiled
    code it does so at every step, and moves four times as many bytes as the product reads."""
    model = copy.deepcopy(model).requires_grad_(False)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) or part is model.transformer.wte:
            part.to(dtype)
    if model.compiled:
        model.transformer.compile()
    return model


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
