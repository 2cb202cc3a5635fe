"""Attention, written out to be read and fused to be fast; tests hold the two together."""
import torch
import torch.nn.functional as F


def attend_plain(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v   (Vaswani et al. 2017, eq. 1)

    q (B, H, T, D), k and v (B, H, S, D), mask broadcastable to (B, H, T, S), True = may look
    -> (B, H, T, D)

    Every position must be allowed at least one look, padding included: the softmax of a row of -inf
    is NaN, and one NaN in the cache spoils every later layer. Causal masks always allow a look at
    oneself, so flush-left sequences are safe.
    """
    forbidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1) + forbidden
    return scores.softmax(-1).to(v.dtype) @ v


def attend_fused(q, k, v, mask):
    """The same in one kernel that never stores the (T, S) weights."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend(q, k, v, mask):
    """Whichever is faster here: on a CPU, at this project's sizes, that is the plain form."""
    return (attend_plain if q.device.type == "cpu" else attend_fused)(q, k, v, mask)


def causal_mask(T, device):
    """Position i sees positions 0..i. Padding stands last, so no real token sees it. -> (T, T)"""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()
