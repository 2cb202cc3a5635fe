"""Did it help? Win rate of one model against another on prompts that neither has seen.

    python -m nanorlhf.evaluate --policy out/ppo --against out/sft     judged by the true reward
    python -m nanorlhf.evaluate --judge out/labels.jsonl               by people (people/label.py)

A file of choices has records {"prompt", "first", "second", "choice"}, where first and second are
responses of the policy and of the model to beat, and choice is "first", "second" or "tie".
"""
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from nanorlhf import environment, reward
from nanorlhf.generate import generate_rows
from nanorlhf.logprobs import whole_logprobs
from nanorlhf.model import GPT, load_policy
from nanorlhf.support import UserError, data
from nanorlhf.support.config import ComputeConfig, run, setup
from nanorlhf.support.data import choices, response_len, score_rows
from nanorlhf.support.runlog import RunLog, open_run
from nanorlhf.support.stats import distinct, win_rate


@dataclass
class EvaluateConfig(ComputeConfig):
    """Compare two models on held-out prompts."""
    policy: str = "out/ppo"           # the model to judge
    against: str = "out/sft"          # the model to beat; KL and perplexity are taken under it
    judge: str = "env"        # env (the true reward), a reward model's folder, a file of choices
    out: str = ""                     # a folder for summary.json; none: the screen alone
    data: list[str] = field(default_factory=list)  # files of prompts; their held-out part
    prompts: int = 500                # how many
    temperature: float = 1.0          # of sampling
    max_new_tokens: int = 80          # longest response
    micro_batch_size: int = 0         # responses in memory at once; 0: as many as is fast


def describe(model: GPT, reference: GPT, rows: list, tok, cfg) -> dict:
    """What responses are like: kl in nats a response, length in tokens, perplexity, diversity."""
    logprobs, ref_logprobs = (
        score_rows(partial(whole_logprobs, m, temperature=cfg.temperature), rows, tok.pad, m.device,
                   cfg.dtype, cfg.micro_batch_size or 64).cpu().double()
        for m in (model, reference))
    length, texts = response_len(rows), [tok.decode(tokens[n:]) for tokens, n in rows]
    return dict(kl=(logprobs - ref_logprobs).mean().item(), response_len=length / len(rows),
                perplexity=math.exp(-ref_logprobs.sum().item() / length),
                distinct_1=distinct(texts, 1), distinct_2=distinct(texts, 2))


def compare(policy: GPT, against: GPT, tok, prompts: list[str], judge, cfg) -> dict:
    """Both models answer the prompts; which is preferred, and what each is like. -> summary
    judge: a score function (tokens, prompt_len, mask) -> (B,). The seed decides the responses."""
    room = policy.config.n_positions - cfg.max_new_tokens
    encoded = data.encode_prompts(prompts, tok, room, data.Counter())
    summary, scores, rng = {}, [], torch.Generator().manual_seed(cfg.seed)
    for name, model in ("policy", policy), ("against", against):
        rows = generate_rows(model, encoded, cfg.max_new_tokens, tok.eos, tok.pad, cfg.temperature,
                             batch_size=cfg.micro_batch_size, dtype=cfg.dtype, rng=rng)
        scores.append(score_rows(judge, rows, tok.pad, model.device, cfg.dtype,
                                 cfg.micro_batch_size or 64).tolist())
        metrics = dict(score=sum(scores[-1]) / len(rows)) | describe(model, against, rows, tok, cfg)
        if not cfg.data:                                      # the parts of the true reward, too
            parts = [environment.parts(prompt, tok.decode(tokens[n:]))
                     for prompt, (tokens, n) in zip(prompts, rows, strict=True)]
            metrics |= {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
        summary |= {f"{key}_{name}": x for key, x in metrics.items()}
    rate, low, high = win_rate(*scores)
    return dict(win_rate=rate, win_rate_low=low, win_rate_high=high) | summary


def held_out_prompts(files: list[str], n: int, seed: int) -> list[str]:
    """Prompts that no stage has trained on: of the files, or of the built-in world."""
    if not files:
        return environment.prompts(n, seed, held_out=True)
    records = [dict(prompt=prompt) for prompt in data.prompts(files)[0]]
    return [record["prompt"] for record in data.split(records)[1]][:n]


def main(cfg):
    device = setup(cfg)
    if Path(cfg.judge).is_file():
        first, second, whose = choices(cfg.judge)
        print("win rate {:.3f} (95 %: {:.3f} to {:.3f})".format(*win_rate(first, second)),
              f"over {len(first)} choices, of {whose}")
        return
    (policy, tok), (against, other) = (load_policy(name, device)
                                       for name in (cfg.policy, cfg.against))
    if other.ranks != tok.ranks:
        raise UserError(f"expected two models with one tokenizer, came {cfg.policy} and "
                        f"{cfg.against} with two")
    judge = (reward.true_reward(tok) if cfg.judge == "env" else
             reward.by_model(reward.load_for(cfg.judge, policy, tok)))
    prompts = held_out_prompts(cfg.data, cfg.prompts, cfg.seed)
    if cfg.out:
        open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    log = RunLog(cfg.out)
    summary = log.finish(**compare(policy, against, tok, prompts, judge, cfg))
    print(f"win rate {summary['win_rate']:.3f} (95 %: {summary['win_rate_low']:.3f} to "
          f"{summary['win_rate_high']:.3f}) over {len(prompts)} held-out prompts, by {cfg.judge}\n")
    print(f"{'':16}{cfg.policy:>14}{cfg.against:>14}")
    for name in [key.removesuffix("_policy") for key in summary if key.endswith("_policy")]:
        print(f"{name:16}{summary[name + '_policy']:14.3f}{summary[name + '_against']:14.3f}")


if __name__ == "__main__":
    run(main, EvaluateConfig)
