"""Attention, written out to be read and fused to be fast; tests hold the two together."""
import torch
import torch.nn.functional as F
from torch import Tensor


def attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v   (Vaswani et al. 2017, eq. 1)

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D)
    mask: broadcastable to (B, H, T, S), True = may look; None: causal, each position sees itself
    and what stands before it

    Every position must see at least one, padding included: the softmax of a row of -inf is NaN, and
    one NaN in the cache spoils every later layer. In a causal mask each position sees itself.
    """
    mask = causal_mask(q.shape[2], q.device) if mask is None else mask
    forbidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1) + forbidden
    return scores.softmax(-1).to(v.dtype) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same in one kernel that never stores (T, S) weights; without a mask, flash attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The faster of the two: on a CPU, at the sizes of this project, that is the plain one, except
    where a single query reads a cache."""
    plain = q.device.type == "cpu" and q.shape[2] > 1
    return (attend_plain if plain else attend_fused)(q, k, v, mask)


def causal_mask(T: int, device) -> Tensor:
    """Position i sees positions 0..i. Padding stands last, so no real token sees it. -> (T, T)"""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()
