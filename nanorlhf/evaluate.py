"""Did it help? Win rate of one model against another on prompts that neither has seen.

    python -m nanorlhf.evaluate --policy out/ppo --against out/sft               judged by the truth
    python -m nanorlhf.evaluate --policy out/ppo --against out/sft --judge out/rm
    python -m nanorlhf.evaluate --policy out/ppo --against out/sft --judge choices.jsonl
    python -m nanorlhf.evaluate frontier                 studies of many runs: see study.py

In: two models and a judge. Out: the share of prompts on which the first is preferred, with its 95 %
interval, and beside it what a win can cost: KL, length, diversity, perplexity.

A file of choices is JSON Lines: {"prompt", "first", "second", "choice"}, where first and second are
responses of the policy and of the model to beat, and choice is "first", "second" or "tie".
"""
import importlib
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanorlhf import UserError, environment, reward, tokenizer
from nanorlhf.generate import respond
from nanorlhf.logprobs import kl_k1, masked, response_logprobs
from nanorlhf.model import GPT
from nanorlhf.support import data
from nanorlhf.support.config import autocast, run, setup
from nanorlhf.support.runlog import RunLog, open_run

# Studies of many runs, and where they are: above this file, as they are made of it.
STUDIES = dict(frontier="study", knobs="study", overoptimise="overoptimise",
               claims="claims")


@dataclass
class EvaluateConfig:
    """Compare two models on held-out prompts."""
    policy: str = "out/ppo"           # the model to judge
    against: str = "out/sft"          # the model to beat; KL and perplexity are taken under it
    judge: str = "env"        # env (the truth), a reward model's folder, a file of choices
    out: str = ""                     # a folder for summary.json; none: the screen alone
    data: list[str] = field(default_factory=list)  # files of prompts; their held-out part
    prompts: int = 500                # how many
    temperature: float = 1.0          # of sampling
    max_new_tokens: int = 80          # longest response
    seed: int = 1                     # of prompts and sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    overwrite: bool = False           # replace the summary of other models


@torch.no_grad()
def score_batches(score, batches, dtype):
    """score: (tokens, prompt_len, mask) -> (B,). -> list of floats, one a response"""
    scores = []
    for tokens, prompt_len, mask in batches:
        with autocast(tokens.device, dtype):
            scores += score(tokens, prompt_len, mask).tolist()
    return scores


def win_rate(scores, against):
    """Share of prompts on which the first scores higher; a tie is half a win. -> rate, low, high"""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(scores, against, strict=True))
    return wins / len(scores), *reward.interval(wins, len(scores))


def best_of_n_kl(n):
    """KL(best of n samples || one sample) in nats, log n - (n - 1) / n, whatever the model.

    Exact where no two responses score the same, and an upper bound else (Stiennon et al. 2020,
    appendix G.3; Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores, n):
    """How likely each response of a pool is the best of n drawn from it; ties share.

    With it, what best-of-n earns is an average over the pool, and its KL is one too, of
    log(N * probability): the estimate that best_of_n_kl can be held to. scores (P, N) -> (P, N)
    """
    pairs = scores[:, :, None], scores[:, None, :]
    below, up_to = (compared.double().mean(2) for compared in (pairs[1] < pairs[0],
                                                               pairs[1] <= pairs[0]))
    tied = (up_to - below) * scores.shape[1]
    return (up_to ** n - below ** n) / tied


@torch.no_grad()
def describe(model, reference, batches, texts, cfg):
    """What a response is like. -> {name: float}; kl in nats a response, length in tokens"""
    kl = length = surprise = 0
    for tokens, prompt_len, mask in batches:
        R = mask.shape[1]
        with autocast(tokens.device, cfg.dtype):
            logprobs = response_logprobs(model, tokens, prompt_len, R, cfg.temperature)
            ref_logprobs = response_logprobs(reference, tokens, prompt_len, R, cfg.temperature)
        kl += masked(kl_k1(logprobs, ref_logprobs), mask).sum().item()
        surprise -= masked(ref_logprobs, mask).sum().item()
        length += mask.sum().item()
    return dict(kl=kl / len(texts), response_len=length / len(texts),
                perplexity=math.exp(surprise / length), distinct_1=distinct(texts, 1),
                distinct_2=distinct(texts, 2))


def distinct(texts, n):
    """Share of n-grams of words that differ from all others: low where a model has one answer to
    everything (Li et al. 2016)."""
    grams = Counter(gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n))))
    return len(grams) / max(1, grams.total())


def choices(path):
    """A file of human choices. -> scores of the first and of the second, one each a comparison"""
    first, second = [], []
    for where, record in data.read_json_lines(path):
        choice = record.get("choice")
        if choice not in ("first", "second", "tie"):
            raise UserError(f"{where}: expected choice to be first, second or tie, came {choice!r}")
        first.append(float(choice == "first"))
        second.append(float(choice == "second"))
    return first, second


def compare(policy, against, tok, prompts, judge, cfg):
    """Both models answer the prompts (texts); who is preferred, and what each is like. -> summary

    judge: a score function (tokens, prompt_len, mask) -> (B,)
    """
    room = policy.config.n_positions - cfg.max_new_tokens
    rows = data.encode_prompts(prompts, tok, room, Counter())
    summary, scores = {}, []
    for name, model in ("policy", policy), ("against", against):
        # 64 at a time, for `describe` holds the logits: 0.6 GB with GPT-2's vocabulary.
        batches, texts = respond(model, tok, rows, cfg.max_new_tokens, cfg.temperature, 64,
                                 cfg.dtype)
        scores.append(score_batches(judge, batches, cfg.dtype))
        numbers = describe(model, against, batches, texts, cfg)
        numbers = dict(score=sum(scores[-1]) / len(rows), **numbers)
        summary |= {f"{key}_{name}": x for key, x in numbers.items()}
    rate, low, high = win_rate(*scores)
    return dict(win_rate=rate, win_rate_low=low, win_rate_high=high) | summary


def held_out_prompts(files, n, seed):
    """Prompts that no stage has trained on: of the files, or of the built-in world. -> texts"""
    if not files:
        return environment.prompts(n, seed, held_out=True)
    records = [dict(prompt=prompt) for prompt in data.prompts(files)[0]]
    return [record["prompt"] for record in data.split(records)[1]][:n]


def main(cfg):
    device = setup(cfg)
    if Path(cfg.judge).is_file():
        scores = choices(cfg.judge)
        rate, low, high = win_rate(*scores)
        print(f"win rate {rate:.3f} (95 %: {low:.3f} to {high:.3f}) over {len(scores[0])} choices")
        return
    tok = tokenizer.load(cfg.policy)
    if tokenizer.load(cfg.against).ranks != tok.ranks:
        raise UserError(f"expected two models with one tokenizer, came {cfg.policy} and "
                        f"{cfg.against} with two")
    policy, against = (GPT.load(folder).resize_vocab(tok.vocab_size).to(device)
                       for folder in (cfg.policy, cfg.against))
    if cfg.judge == "env":
        judge = reward.true_reward(tok)
    else:
        judge = reward.by_model(reward.load_beside(cfg.judge, policy, tok))
    prompts = held_out_prompts(cfg.data, cfg.prompts, cfg.seed)
    summary = compare(policy, against, tok, prompts, judge, cfg)
    print(f"win rate {summary['win_rate']:.3f} (95 %: {summary['win_rate_low']:.3f} to "
          f"{summary['win_rate_high']:.3f}) over {len(prompts)} held-out prompts, by {cfg.judge}\n")
    if cfg.out:
        open_run(cfg.out, cfg, overwrite=cfg.overwrite)
        RunLog(cfg.out).finish(**summary)
    names = [key.removesuffix("_policy") for key in summary if key.endswith("_policy")]
    print(f"{'':16}{cfg.policy:>14}{cfg.against:>14}")
    for name in names:
        print(f"{name:16}{summary[name + '_policy']:14.3f}{summary[name + '_against']:14.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STUDIES:
        name = sys.argv.pop(1)
        study = getattr(importlib.import_module(f"nanorlhf.experiments.{STUDIES[name]}"), name)
        importlib.import_module("nanorlhf.experiments.study").main(study)
    else:
        run(main, EvaluateConfig)
