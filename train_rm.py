"""Stage 2: learn from comparisons how good a response is.

    python train_rm.py                                      the built-in world
    python train_rm.py --data hh.jsonl.gz --sft out/hh-sft --out out/hh-rm
"""
import math
import random

from nanorlhf import environment, reward
from nanorlhf.evaluate import held_out_prompts
from nanorlhf.generate import generate_rows
from nanorlhf.model import load_policy
from nanorlhf.support import data, parallel
from nanorlhf.support.config import compile_trunks, named, run, setup
from nanorlhf.support.data import from_files, pairs_in, score_rows
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples
from nanorlhf.support.stats import accuracy_of, interval

PANELS = [("Loss", "nats / pair", ["loss"]), ("Accuracy", "of the batch", ["accuracy"]),
          ("Margin", "chosen - rejected", ["margin"]), ("Gradient norm", "", ["grad_norm"])]


def main(cfg):
    device = setup(cfg)
    sft, tok = load_policy(cfg.sft, device)
    if cfg.data:
        groups, held_out = from_files(cfg.data, tok, sft.config.n_positions, cfg.annotator)
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("loss", "accuracy", "margin", "lr"), decode=tok.decode)

    # Comparisons: from files, or of the SFT model's own samples by the built-in annotators.
    summary = {}
    if not cfg.data:
        groups, held_out, summary["accuracy_ceiling"] = reward.from_samples(sft, tok, cfg)
    print(f"pairs     {pairs_in(groups):,} comparisons of {sum(len(g) for g, _ in groups):,}"
          f" responses; {pairs_in(held_out):,} held out")

    model = reward.new_model(cfg, sft, tok)
    print(f"model     {model}, on {named(device, cfg.dtype)}")
    compile_trunks(cfg.compile, model)
    summary |= reward.train(model, groups, tok.pad, cfg, log)
    parallel.finish()

    # How good is it? Then shift and scale: 0 is the SFT model's average, 1 its deviation.
    metrics, margin = reward.report(reward.by_model(model), held_out, tok.pad, device, cfg.dtype)
    table = calibration(margin)
    metrics["calibration_error"] = sum(n * abs(said - was) for said, was, n in table) / len(margin)
    prompts = data.encode_prompts(held_out_prompts(cfg.data, 256, cfg.seed), tok,
                                  sft.config.n_positions - cfg.max_new_tokens, data.Counter())
    G = math.ceil(256 / len(prompts))         # small files hold few prompts back, or just one
    rows = generate_rows(sft, prompts, cfg.max_new_tokens, tok.eos, tok.pad, G=G, dtype=cfg.dtype,
                         batch_size=cfg.micro_batch_size * G)
    mean, std = reward.normalise(model, rows, tok.pad, cfg.dtype)
    if not cfg.data:
        metrics |= reads_request(model, tok, 400, cfg.seed)
    model.save(cfg.out, tok, reward_mean=mean, reward_std=std)
    summary = log.finish(**summary, **metrics)
    samples(cfg.out, *scored_pairs(model, tok, held_out[:3], cfg), ("chosen", "rejected"))
    curves(cfg.out, PANELS)
    print_summary(summary, table, cfg)


def calibration(margin, bins=5):
    """Is a probability of 80 % right in 80 % of the pairs? -> (probability, share, pairs) of bins

    A pair is read from the side that the model prefers, so the probability is at least a half. Only
    before reward.normalise: the loss fixes the scale on which sigmoid(margin) is a probability.
    """
    probability, right = margin.abs().sigmoid(), (1 + margin.sign()) / 2
    at = ((probability - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [(probability[at == b].mean().item(), right[at == b].mean().item(), int((at == b).sum()))
            for b in range(bins) if (at == b).any()]


def reads_request(model, tok, n, seed):
    """Does it read the request? Stories by careful authors for n held-out requests are scored under
    their own request, and under it with one word changed, which should cost score.
    -> {reads_mood: share of stories that score higher under their own, reads_mood_low: ...}"""
    prompts, rng = environment.prompts(n, seed, held_out=True), random.Random(f"probe {seed}")
    stories = [environment.write(environment.Request.parse(p), rng, care=1) for p in prompts]

    def scores(prompts):
        records = [dict(prompt=p, response=story) for p, story in zip(prompts, stories)]
        rows = data.encode(records, tok, model.config.n_positions, data.Counter())
        return score_rows(reward.by_model(model), rows, tok.pad, model.device, "float32")

    own, metrics = scores(prompts), {}
    for slot in environment.ASKED:
        others = [environment.near_miss(p, rng, slot) for p in prompts]
        right = accuracy_of(own - scores(others)).item()
        low, high = interval(right * n, n)
        metrics |= {f"reads_{slot}": right, f"reads_{slot}_low": low, f"reads_{slot}_high": high}
    return metrics


def scored_pairs(model, tok, groups, cfg):
    """Pairs to read: (prompt, response and its score), first the chosen, then the rejected."""
    sides = [], []
    for rows, [pair, *_] in groups:
        scores = score_rows(reward.by_model(model), rows, tok.pad, model.device, cfg.dtype)
        for side, i in zip(sides, pair):
            tokens, n = rows[i]
            side.append((tok.decode(tokens[:n]), f"{tok.decode(tokens[n:])}  ({scores[i]:+.2f})"))
    return sides


def print_summary(s, table, cfg):
    """The reward model in a few lines, and what to do next."""
    print(f"accuracy  {s['accuracy']:.3f} on {s['pairs']:,} held-out pairs "
          f"(95 %: {s['accuracy_low']:.3f} to {s['accuracy_high']:.3f})")
    if "accuracy_ceiling" in s:
        print(f"ceiling   {s['accuracy_ceiling']:.3f}, because annotators err; the accuracy is "
              f"{s['accuracy'] / s['accuracy_ceiling']:.0%} of it")
    print(f"length    preferring the longer or the shorter answer would reach "
          f"{s['length_accuracy']:.3f}")
    if "reads_mood" in s:
        shares = "  ".join("{} {:.3f} ({:.3f} to {:.3f})".format(
            slot, *(s[f"reads_{slot}{end}"] for end in ("", "_low", "_high")))
            for slot in environment.ASKED)
        print(f"does it read the request? It prefers a story under its own request to the same "
              f"under a request with another  {shares}")
    print("probability of the model -> share that came true (pairs):  "
          + "  ".join(f"{said:.2f} -> {true:.2f} ({n})" for said, true, n in table))
    print(f"{s['seconds']:.0f} s; see {cfg.out}/curves.png")
    print(f"next: python train_ppo.py --sft {cfg.sft} --rm {cfg.out}")


if __name__ == "__main__":
    run(main, reward.RMConfig)
