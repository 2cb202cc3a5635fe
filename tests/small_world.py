"""A world so small that all its responses can be listed, and the answers that listing gives.

Three tokens, of which 0 ends a response, and at most three of them: fifteen responses, each with a
score, and seven places where a token is chosen. A policy is a table of logits, one row a place.
What training estimates from samples is a finite sum here. Nothing of the library is used.
"""

import math
from itertools import product

import torch

V, R, END = 3, 3, 0
RESPONSES = [
    y
    for n in range(1, R + 1)
    for y in product(range(V), repeat=n)
    if END not in y[:-1] and (y[-1] == END or n == R)
]
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})

# As tensors: which token stands where, chosen at which place, both (15, R) and 0 behind the mask;
# and which responses lead through which place, (7, 15).
MASK = torch.arange(R) < torch.tensor([[len(y)] for y in RESPONSES])
TOKENS = torch.tensor([[*y, 0, 0][:R] for y in RESPONSES])
PLACE = torch.tensor(
    [[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(R)] for y in RESPONSES]
)
THROUGH = torch.tensor([[y[: len(s)] == s for y in RESPONSES] for s in PREFIXES]).double()


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def probability(logits, temperature=1.0):
    """Of each response: the product of its tokens' softmax. logits (7, V) -> (15,)"""
    p = (logits / temperature).softmax(-1)
    chosen = [[p[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))] for y in RESPONSES]
    return torch.stack([math.prod(row) for row in chosen])


def table(p):
    """The logits of a policy whose responses have these probabilities. (15,) -> (7, V)"""
    begins = {s: THROUGH[i] @ p for i, s in enumerate(PREFIXES)} | dict(zip(RESPONSES, p))
    return torch.stack([torch.stack([begins[*s, a] for a in range(V)]) for s in PREFIXES]).log()


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def tilted(q, scores, beta):
    """What no policy can beat at E[score] - beta KL(policy || q). (..., 15) twice -> (..., 15)"""
    p = q * (scores / beta).exp()
    return p / p.sum(-1, keepdim=True)


def best_of(p, n):
    """How likely each outcome is to be the best of n, where the outcomes stand in order."""
    up_to = p.cumsum(-1)
    return up_to**n - (up_to - p) ** n


def best_of_n_kl(n):
    """KL(best of n samples || one sample) in nats, where no two score the same and, with ties, an
    upper bound (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def expectile(q, tau):
    """Where the gaps to what is above, times tau, balance those below, times 1 - tau. Bisection."""
    low, high = q.min(), q.max()
    for _ in range(100):
        v = (low + high) / 2
        above, below = (q - v).clamp(min=0).sum(), (v - q).clamp(min=0).sum()
        low, high = (v, high) if tau * above > (1 - tau) * below else (low, v)
    return v


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def gradient(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def minimise(loss, start):
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=1000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()
