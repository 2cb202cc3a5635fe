"""What a model says of a response: log-probs, entropy, KL, and means that respect the mask.

Everything past `response_window` is response-aligned: column r of a (B, R) tensor belongs to the
r-th token of the response, and no caller ever writes an index minus one.
"""
import torch
from torch.autograd.function import once_differentiable


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


def token_logprobs_plain(logits, chosen, temperature=1.0):
    """Log-prob of each chosen token. logits (..., V), chosen (...) -> (...)"""
    return log_softmax(logits, temperature).gather(-1, chosen[..., None]).squeeze(-1)


def token_logprobs(logits, chosen, temperature=1.0):
    """The same for a few rows at a time, so that no float32 copy of all logits is ever held: at
    GPT-2's vocabulary two to three times as fast on a CPU."""
    return _TokenLogprobs.apply(logits, chosen, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, chosen, temperature):
        rows, at = logits.flatten(0, -2), chosen.flatten()
        logprobs = torch.cat([token_logprobs_plain(x, i, temperature) for x, i in few(rows, at)])
        ctx.save_for_backward(logits, at[:, None], logprobs[:, None])
        ctx.temperature = temperature
        return logprobs.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx, push):
        """d log p(chosen) / d logits = (1 where chosen, and 0 elsewhere, - p) / temperature"""
        logits, at, logprobs = ctx.saved_tensors
        rows, push = logits.flatten(0, -2), push.flatten()[:, None] / ctx.temperature
        gradient = torch.empty_like(rows)
        for x, out, i, logprob, w in few(rows, gradient, at, logprobs, push):
            x = tempered(x, ctx.temperature)
            p = (x - (x.gather(-1, i) - logprob)).exp_()
            out.copy_(p.mul_(-w).scatter_add_(-1, i, w))
        return gradient.view_as(logits), None, None


def entropy(logits, temperature=1.0):
    """Entropy of each choice, in nats. logits (..., V) -> (...)"""
    logps = (log_softmax(x, temperature) for x, in few(logits.flatten(0, -2)))
    return torch.cat([-(logp.exp() * logp).sum(-1) for logp in logps]).view(logits.shape[:-1])


def few(logits, *others):
    """Parts of logits (N, V), and of others alike: 4 MB in float32, which stay in a CPU's cache,
    or 64 MB, which keep a GPU busy."""
    n = max(1, (2**20 if logits.device.type == "cpu" else 2**24) // logits.shape[-1])
    return zip(*(x.split(n) for x in (logits, *others)))


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
