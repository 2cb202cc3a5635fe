"""What a model says of a response: log-probs, entropy, KL, and means that respect the mask.

Everything past `response_window` is response-aligned: column r of a (B, R) tensor belongs to the
r-th token of the response, and no caller ever writes an index minus one.
"""
import torch


def masked(x, mask):
    """x, and 0 off the mask, whatever stands there: times 0, infinity would be NaN. -> like x"""
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x, mask):
    """Mean of x over the tokens the policy chose. (B, R), (B, R) -> scalar"""
    return masked(x, mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """Scale x to variance 1 over the mask, and shift it to mean 0 unless told to keep the mean.

    Masked moments over the whole batch, biased variance. (B, R), (B, R) -> (B, R), 0 off the mask
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return masked(whitened if shift_mean else whitened + mean, mask)


# --- the one place that knows about the shift ----------------------------------------------------

def response_window(x, prompt_len, R):
    """The R positions whose outputs score the response: prompt_len - 1 ... prompt_len + R - 2.

    The output at position t speaks about the token at t + 1, so a row's window starts one before
    its response. x (B, T, ...), prompt_len (B,) -> (B, R, ...)
    """
    at = prompt_len[:, None] - 1 + torch.arange(R, device=x.device)          # (B, R)
    at = at.clamp(max=x.shape[1] - 1)                 # short rows: the mask leaves these out
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def response_tokens(tokens, prompt_len, R):
    """The response itself. tokens (B, T) -> (B, R)"""
    return response_window(tokens, prompt_len + 1, R)


# --- log-probs -----------------------------------------------------------------------------------

def tempered(logits, temperature=1.0):
    """Logits as sampler and scorer both take them: over the temperature, in float32 or better.

    Nobody else divides, so a policy sampled at T = 0.7 is scored at T = 0.7. (..., V) -> (..., V)
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def log_softmax(logits, temperature=1.0):
    """Log-probs of every token. (..., V) -> (..., V)"""
    return tempered(logits, temperature).log_softmax(-1)


def token_logprobs(logits, chosen, temperature=1.0):
    """Log-prob of each chosen token. logits (B, R, V), chosen (B, R) -> (B, R)"""
    return log_softmax(logits, temperature).gather(-1, chosen[..., None]).squeeze(-1)


def entropy(logits, temperature=1.0):
    """Entropy of each choice, in nats. logits (B, R, V) -> (B, R)"""
    logp = log_softmax(logits, temperature)
    return -(logp.exp() * logp).sum(-1)


def response_logits(model, tokens, prompt_len, R):
    """The language head, run on response positions alone. tokens (B, T) -> (B, R, V)"""
    return model.head(response_window(model.transformer(tokens), prompt_len, R))


def response_logprobs(model, tokens, prompt_len, R, temperature=1.0):
    """What the model says of each response token. tokens (B, T), prompt_len (B,) -> (B, R)"""
    logits = response_logits(model, tokens, prompt_len, R)
    return token_logprobs(logits, response_tokens(tokens, prompt_len, R), temperature)


# --- KL(policy || reference), estimated from tokens that the policy sampled ----------------------
# http://joschu.net/blog/kl-approx.html; all (B, R), (B, R) -> (B, R)

def kl_k1(logprobs, ref_logprobs):
    """Unbiased, and signed: single tokens may well be negative. This is what PPO charges."""
    return logprobs - ref_logprobs


def kl_k2(logprobs, ref_logprobs):
    """Half the squared gap: biased as a number, but its gradient is the right one."""
    return (logprobs - ref_logprobs) ** 2 / 2


def kl_k3(logprobs, ref_logprobs):
    """exp(d) - 1 - d with d = ref - policy: unbiased, never negative, less noisy. Logged."""
    d = (ref_logprobs - logprobs).clamp(max=20)  # exp overflows where the reference is far likelier
    return d.expm1() - d             # exp(d) - 1 would lose every digit of a small d
