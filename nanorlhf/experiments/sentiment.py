"""Can PPO make film reviews positive? On sentences that people labelled, with a model from scratch.

    python -m nanorlhf.experiments.sentiment --data sentence_polarity.zip --books books.jsonl.gz
    (then the three scripts, on the files that this writes: README.md has the commands)
    python -m nanorlhf.experiments.sentiment --data sentence_polarity.zip --policy out/reviews/ppo

10,662 sentences of film reviews were called positive or negative (Pang and Lee 2005). Six tenths of
them train the models. The rest is for the judges: a classifier, and a second language model.
"""
import json
import math
import random
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from nanorlhf import reward, tokenizer
from nanorlhf.evaluate import EvaluateConfig
from nanorlhf.generate import generate_rows
from nanorlhf.logprobs import whole_logprobs
from nanorlhf.model import load_policy
from nanorlhf.support import UserError, data
from nanorlhf.support.config import run, setup
from nanorlhf.support.data import response_len, score_rows
from nanorlhf.support.runlog import RunLog, open_run, samples, write_whole
from nanorlhf.support.stats import accuracy_of, distinct, interval


@dataclass
class SentimentConfig(EvaluateConfig):
    """Write the files that training reads. With --policy: judge what was trained."""
    data: str = "sentence_polarity.zip"  # of nltk_data: the sentences and their labels
    books: str = ""                   # a file of plain text, to pretrain on
    vocab_size: int = 4096            # of the tokenizer, which is learned from the sentences
    out: str = "out/reviews"          # the folder of the files, or of the judgement
    policy: str = ""                  # the model to judge; none: write the files
    against: str = "out/reviews/sft"  # the model that PPO started from
    judge: str = "out/reviews/rm"     # the reward model, tried on pairs that it has not seen
    second: str = "out/reviews/second"  # the language model that says how likely a text is
    prompts: int = 1000               # held-out openings to continue
    max_new_tokens: int = 48          # longest continuation


def main(cfg):
    training, judges = labelled(cfg.data)
    open_run(cfg.out, cfg, overwrite=cfg.overwrite)
    (judge if cfg.policy else write_files)(cfg, training, judges)


def labelled(path):
    """-> two lists of (sentence, is it positive?): for training, and for the judges"""
    try:
        files = zipfile.ZipFile(path)
        lines = {end: files.read(f"sentence_polarity/rt-polarity.{end}").decode().split("\n")
                 for end in ("pos", "neg")}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected sentence_polarity.zip of nltk_data: {error}") from None
    parts = [], []
    for label, line in [(end, line.strip()) for end in lines for line in lines[end]]:
        if len(line.split()) > 4:                              # an opening and something after it
            parts[zlib.crc32(line.encode()) % 10 >= 6].append((line, label == "pos"))
    return parts


# --- files to train on ---------------------------------------------------------------------------
def write_files(cfg, training, judges):
    rng, out = random.Random(cfg.seed), Path(cfg.out)
    tokenizer.learn((text for text, _ in training), cfg.vocab_size).save(out / "tokenizer")
    files = dict(sentences=demonstrations(training, rng), pairs=pairs(training, rng, 4),
                 second=demonstrations(judges, rng))
    if cfg.books:                     # all reviews are in lower case
        files["books"] = [dict(text=r["response"].lower())
                          for r in data.demonstrations([cfg.books])[0]]
    for name, records in files.items():
        write_whole(out / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        print(f"{out / name}.jsonl: {len(records):,} records")


def opening(text, n):
    """-> the first n words, and the rest"""
    words = text.split(" ")
    return " ".join(words[:n]), "".join(f" {word}" for word in words[n:])


def demonstrations(sentences, rng):
    """Each sentence in random order; its first one to three words are the prompt."""
    return [dict(zip(("prompt", "response"), opening(text, rng.randint(1, 3))))
            for text, _ in rng.sample(sentences, len(sentences))]


def pairs(sentences, rng, most):
    """Each positive sentence is preferred to negative ones with the same first word, to `most` of
    them if there are as many."""
    rests = defaultdict(lambda: ([], []))                      # negative, positive
    for text, positive in sentences:
        word, rest = opening(text, 1)
        rests[word][positive].append(rest)
    records = [dict(prompt=word, chosen=chosen, rejected=rejected)
               for word, (negative, positive) in rests.items() for chosen in positive
               for rejected in rng.sample(negative, min(most, len(negative)))]
    return rng.sample(records, len(records))


# --- judges --------------------------------------------------------------------------------------
def judge(cfg, training, judges):
    device, rng, counts = setup(cfg), random.Random(cfg.seed), data.Counter()
    (policy, tok), (against, _), (second, _) = (load_policy(folder, device) for folder in
                                                (cfg.policy, cfg.against, cfg.second))
    log, classify = RunLog(cfg.out), naive_bayes(judges)
    summary = dict(judge_accuracy=accuracy(classify, training))
    print(f"judge         right on {summary['judge_accuracy']:.3f} of {len(training):,} sentences "
          "that it has not seen")

    # The reward model: how often does it agree with people on pairs that no training has seen?
    model = reward.load_for(cfg.judge, policy, tok)
    records, words = pairs(judges, rng, 1), logistic_regression(training)
    groups = data.by_prompt(data.encode_pairs(records, tok, model.config.n_positions, counts))
    metrics, _ = reward.report(reward.by_model(model), groups, tok.pad, device, cfg.dtype)
    margins = torch.tensor([words(r["prompt"] + r["chosen"]) - words(r["prompt"] + r["rejected"])
                            for r in records])
    summary |= metrics | dict(words_accuracy=accuracy_of(margins).item())
    print("reward model  accuracy {accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f}) on "
          "{pairs:,} pairs; words alone {words_accuracy:.3f}, length alone {length_accuracy:.3f}"
          .format(**summary))

    # Texts by people and by both models.
    openings = demonstrations(judges, rng)[:cfg.prompts]
    prompts = data.encode_prompts([r["prompt"] for r in openings], tok, 16, counts)
    texts = dict(people=data.encode(demonstrations(training, rng)[:cfg.prompts], tok,
                                    second.config.n_positions, counts))
    for name, writer in ("before", against), ("after", policy):
        texts[name] = generate_rows(
            writer, prompts, cfg.max_new_tokens, tok.eos, tok.pad, cfg.temperature,
            batch_size=cfg.micro_batch_size, dtype=cfg.dtype,
            rng=torch.Generator().manual_seed(cfg.seed))
    for name, rows in texts.items():
        metrics = describe_texts(rows, classify, second, tok, cfg)
        summary |= {f"{key}_{name}": x for key, x in metrics.items()}
        print(f"{name:12}", "  ".join(f"{key} {x:.3f}" for key, x in metrics.items()))
    samples(cfg.out, *([(tok.decode(tokens[:n]), tok.decode(tokens[n:]))
                        for tokens, n in texts[name][:20]] for name in ("before", "after")))
    log.finish(**summary)


def describe_texts(rows, classify, second, tok, cfg):
    """Share of positive texts, perplexity under the second model, distinct words and pairs."""
    logprobs = score_rows(partial(whole_logprobs, second), rows, tok.pad, second.device, cfg.dtype)
    responses = [tok.decode(tokens[n:]) for tokens, n in rows]
    positive = sum(classify(tok.decode(tokens)) > 0 for tokens, _ in rows)
    low, high = interval(positive, len(rows))
    return dict(positive=positive / len(rows), positive_low=low, positive_high=high,
                perplexity=math.exp(-logprobs.double().sum().item() / response_len(rows)),
                length=response_len(rows) / len(rows),
                distinct_1=distinct(responses, 1), distinct_2=distinct(responses, 2))


def words_and_pairs(text):
    words = text.split()
    return {*words, *pairwise(words)}


def accuracy(classify, sentences):
    return sum((classify(text) > 0) == positive for text, positive in sentences) / len(sentences)


def naive_bayes(sentences):
    """A classifier by words and pairs of words (Wang and Manning 2012, section 2.1: right on 79 %
    of these sentences, having learned from nine tenths). -> a function of a text, > 0: positive"""
    counts = Counter(), Counter()
    for text, positive in sentences:
        counts[positive].update(words_and_pairs(text))
    known = counts[0] | counts[1]
    total = [n.total() + len(known) for n in counts]
    weights = {x: math.log((counts[1][x] + 1) / total[1]) - math.log((counts[0][x] + 1) / total[0])
               for x in known}
    return lambda text: sum(weights.get(x, 0) for x in words_and_pairs(text))


def logistic_regression(sentences, steps=100, decay=0.3):
    """The same with learned weights. -> a function of a text, > 0: positive"""
    index = defaultdict(lambda: len(index))
    bags = [[index[x] for x in sorted(words_and_pairs(text), key=str)] for text, _ in sentences]
    words, starts = torch.tensor([*chain(*bags)]), torch.tensor([0, *accumulate(map(len, bags))])
    target = torch.tensor([float(positive) for _, positive in sentences])
    weights = torch.zeros(len(index), 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights], 0.05)
    for _ in range(steps):
        logits = F.embedding_bag(words, weights, starts[:-1], mode="sum")[:, 0]
        loss = (F.binary_cross_entropy_with_logits(logits, target)
                + decay * weights.square().sum() / len(bags))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = dict(zip(index, weights[:, 0].tolist()))
    return lambda text: sum(learned.get(x, 0) for x in words_and_pairs(text))


if __name__ == "__main__":
    run(main, SentimentConfig)
