"""How much memory will a run need? Said before it begins, so that nobody learns it in the middle.

In: models and the sizes of a batch. Out: bytes, within a factor of 1.5 (a test measures), and one
line on the screen. Only what is large is counted:

    a weight       4 bytes; if it is trained, 4 more for its gradient and 8 for AdamW's moments
    an activation  what a layer keeps of every token until the backward pass. In units of C floats:
                   2 LayerNorms in and out (4), queries, keys, values as computed and as multiplied
                   (6), attention out and its copy (2), the MLP before and after GELU (8). On a CPU,
                   attention also keeps its weights: a row of T for each head
    a logit        4 bytes as computed, and 4 for its gradient; what else is made of them is made
                   of a few rows at a time (logprobs.few)
    a cached key   or value: C floats a token and layer, while sampling

Where micro-batches follow each other on a CPU, the allocator's holes cost half as much again as the
activations themselves: that is measured, not reasoned.
"""
import torch

from nanorlhf.support.config import precision

GB = 1e9


def held(trained=(), frozen=()):
    """Weights, gradients and moments of models. -> bytes"""
    count = lambda models: sum(p.numel() for model in models for p in model.parameters())  # noqa: E731
    return 16 * count(trained) + 4 * count(frozen)


def activations(model, rows, T, dtype="float32"):
    """What a forward pass over `rows` sequences of T tokens keeps for the backward pass."""
    c, half = model.config, precision(model.device, dtype) == torch.bfloat16
    linear = (12 if half else 20) * 4 * c.n_embd       # half of it stays float32: norms, residuals
    weights = 0 if model.device.type == "cuda" else (2 if half else 4) * c.n_head * T
    return rows * T * (c.n_layer * (linear + weights) + 2 * weights)    # 2: one layer's, backwards


def logits(model, rows, R, forms):
    return 4 * forms * rows * R * model.config.vocab_size


def cache(model, rows, T):
    return 4 * rows * T * 2 * model.config.n_layer * model.config.n_embd


def lengths(rows):
    """The longest row (tokens, prompt_len) and the longest response -> T, R"""
    return max(len(tokens) for tokens, _ in rows), max(len(tokens) - n for tokens, n in rows)


def split(batch, micro_batch_size, device):
    """-> rows in memory at once, and what the holes between the parts of a batch cost"""
    part = min(micro_batch_size or batch, batch)
    return part, 1.5 if part < batch and device.type == "cpu" else 1


def sft(model, rows, cfg):
    T, R = lengths(rows)
    B, holes = split(cfg.batch_size, cfg.micro_batch_size, model.device)
    update = holes * activations(model, B, T, cfg.dtype) + logits(model, B, R, 2)
    return held([model]) + max(update, logits(model, cfg.batch_size, R, 1))  # held-out rows


def comparisons(model, frozen, groups, cfg):
    """Reward models, and DPO, whose reference reads along."""
    T, R = lengths([row for rows, _ in groups for row in rows])
    prompts, holes = split(cfg.batch_size, cfg.micro_batch_size, model.device)
    B = prompts * max(len(rows) for rows, _ in groups)
    update = holes * activations(model, B, T, cfg.dtype)
    if not hasattr(model, "score"):
        update += logits(model, B, R, 3)                 # the reference's, too
    return held([model], [frozen]) + update


def ilql(model, rows, cfg):
    """The trunk reads and keeps nothing; each of two Q heads speaks of every token, and a copy."""
    T, R = lengths(rows)
    B, holes = split(cfg.batch_size, cfg.micro_batch_size, model.device)
    return held([model.q, model.v], [model]) + holes * logits(model, B, R, 5)


def ppo(policy, critic, frozen, prompts, cfg):
    T, R = max(map(len, prompts)) + cfg.max_new_tokens, cfg.max_new_tokens
    models = [policy, critic] if critic is not None else [policy]
    B, end = cfg.batch_size, min(64, cfg.eval_prompts)       # 64 rows at once when it is judged
    rows, holes = split(-(-B // cfg.minibatches), cfg.micro_batch_size, policy.device)
    update = logits(policy, rows, R, 2)           # more than to measure as many rows, forwards only
    update += holes * sum(activations(model, rows, T, cfg.dtype) for model in models)
    respond = cache(policy, B, T) + logits(policy, B, 1, 4)
    compare = cache(policy, end, T) + logits(policy, end, R, 2)
    return held(models, frozen) + max(update, respond, compare)


def free(device):
    """Bytes that nobody uses, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None


def tell(needed, device, micro_batch_size):
    """One line; where it will not do, what would."""
    left = free(device)
    short = left is not None and needed > left
    advice = f", and {left / GB:.1f} GB are free: try a smaller one" if short else ""
    size = micro_batch_size or "0 (no limit)"
    print(f"memory    about {max(0.1, needed / GB):.1f} GB at --micro-batch-size {size}{advice}")
