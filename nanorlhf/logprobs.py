"""What a model says of a response: log-probs, entropy, KL, and means that respect the mask.

Everything past `response_window` is response-aligned: column r of a (B, R) tensor belongs to the
r-th token of the response, so no caller ever writes an index minus one.
"""
import torch
from torch import Tensor

from nanorlhf.support import fast


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, 0 elsewhere, even in place of NaN or infinity. -> like x"""
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the tokens that the policy chose. (B, R), (B, R) -> scalar"""
    return masked(x, mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale x to variance 1 over the mask, and shift it to mean 0 unless told to keep the mean.

    Moments over the mask of the whole batch, biased variance. (B, R) twice -> (B, R), 0 off mask
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return masked(whitened if shift_mean else whitened + mean, mask)


def response_window(x: Tensor, prompt_len: Tensor, R: int) -> Tensor:
    """The R positions whose outputs score the response: prompt_len - 1 ... prompt_len + R - 2.

    The output at position t speaks about the token at t + 1, so a row's window starts one position
    before its response. x (B, T, ...), prompt_len (B,) -> (B, R, ...)
    """
    at = prompt_len[:, None] - 1 + torch.arange(R, device=x.device)          # (B, R)
    at = at.clamp(max=x.shape[1] - 1)                 # short rows: the mask leaves these out
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def response_tokens(tokens: Tensor, prompt_len: Tensor, R: int) -> Tensor:
    """The response itself. tokens (B, T), prompt_len (B,) -> (B, R)"""
    return response_window(tokens, prompt_len + 1, R)


def tempered(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits divided by the temperature, in float32 or better. (..., V) -> (..., V)

    Sampler and scorer both call this, so what is sampled at temperature 0.7 is scored at 0.7.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, chosen: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each chosen token. logits (..., V), chosen (...) -> (...)"""
    logprobs = tempered(logits, temperature).log_softmax(-1)
    return logprobs.gather(-1, chosen[..., None]).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each choice, in nats (units of the natural logarithm). logits (..., V) -> (...)"""
    logprobs = tempered(logits, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def response_logits(model, tokens: Tensor, prompt_len: Tensor, R: int) -> Tensor:
    """The language head, run on response positions only. tokens (B, T) -> (B, R, V)"""
    return model.head(response_window(model.transformer(tokens), prompt_len, R))


def response_logprobs(model, tokens: Tensor, prompt_len: Tensor, R: int,
                      temperature: float = 1.0) -> Tensor:
    """Log-prob of each response token under the model. tokens (B, T), prompt_len (B,) -> (B, R)"""
    logits = response_logits(model, tokens, prompt_len, R)
    chosen = response_tokens(tokens, prompt_len, R)
    return fast.rows_at_a_time(token_logprobs, logits, chosen, temperature=temperature)


def response_logprobs_and_entropy(model, tokens: Tensor, prompt_len: Tensor, R: int,
                                  temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of the choice that each token was drawn from. -> (B, R) twice"""
    logits = response_logits(model, tokens, prompt_len, R)
    chosen = response_tokens(tokens, prompt_len, R)
    return (fast.rows_at_a_time(token_logprobs, logits, chosen, temperature=temperature),
            fast.rows_at_a_time(entropy, logits, temperature=temperature))


def whole_logprobs(model, tokens: Tensor, prompt_len: Tensor, mask: Tensor,
                   temperature: float = 1.0) -> Tensor:
    """Log-prob of each response, summed over its tokens. tokens (B, T), mask (B, R) -> (B,)"""
    R = mask.shape[1]
    return masked(response_logprobs(model, tokens, prompt_len, R, temperature), mask).sum(1)


# KL(policy || reference), estimated from tokens that the policy sampled: (B, R), (B, R) -> (B, R)
# http://joschu.net/blog/kl-approx.html
def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q. Unbiased; single tokens may be negative. PPO subtracts it from rewards."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared difference. Biased as a number, but as a loss its gradient is the KL's."""
    return (logprobs - ref_logprobs) ** 2 / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log q - log p. Unbiased, never negative, less noisy. For logs."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # exp overflows where the reference is far likelier
    return d.expm1() - d             # exp(d) - 1 would lose every digit of a small d
