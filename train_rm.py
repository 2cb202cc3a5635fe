"""Stage 2: learn from comparisons how good a response is.

    python train_rm.py                                      the built-in world
    python train_rm.py --data hh.jsonl.gz --sft out/hh-sft --out out/hh-rm
"""
from nanorlhf import environment, reward, tokenizer
from nanorlhf.evaluate import held_out_prompts
from nanorlhf.generate import sample_rows
from nanorlhf.model import GPT, ScalarGPT
from nanorlhf.support import data, memory, parallel
from nanorlhf.support.config import fuse, run, setup
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples

PANELS = [("Loss", "nats / pair", ["loss"]), ("Accuracy", "of the batch", ["accuracy"]),
          ("Margin", "chosen - rejected", ["margin"]), ("Gradient norm", "", ["grad_norm"])]


def main(cfg):
    device = setup(cfg)
    sft, tok = GPT.load(cfg.sft), tokenizer.load(cfg.sft)
    sft.resize_vocab(tok.vocab_size).to(device)
    if cfg.data:
        records, counts = data.preferences(cfg.data)
        train, held_out = (data.encode_pairs(side, tok, sft.config.n_positions, counts)
                           for side in data.split(records))
        print(f"data      {data.describe(counts)}")
    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    log = RunLog(cfg.out, columns=("loss", "accuracy", "margin", "lr"), decode=tok.decode)

    # Comparisons: from files, or of the SFT model's own samples by the built-in annotators.
    ceiling = {}
    if cfg.data:
        groups = reward.by_prompt(train)
    else:
        groups, _ = compare_samples(sft, tok, cfg.prompts, cfg.responses, cfg, held_out=False)
        held_out, best = compare_samples(sft, tok, cfg.held_out_prompts, 2, cfg, held_out=True)
        held_out = [(rows[i], rows[j]) for rows, [(i, j)] in held_out]
        ceiling = dict(accuracy_ceiling=best)
    print(f"pairs     {sum(len(wins) for _, wins in groups):,} comparisons of "
          f"{sum(len(rows) for rows, _ in groups):,} responses; {len(held_out):,} held out")

    model = ScalarGPT.load(cfg.sft).resize_vocab(tok.vocab_size).to(device)
    print(f"model     {model}, on {device}")
    memory.tell(memory.comparisons(model, sft, groups, cfg), device, cfg.micro_batch_size)
    fuse(cfg.compile, model)
    log.every = max(1, len(groups) // cfg.batch_size // 20)
    summary = reward.train(model, groups, tok.pad, cfg, log)
    parallel.finish()

    # How good is it? Then shift and scale: 0 is the SFT model's average, 1 its deviation.
    found, table = reward.report(model, held_out, tok.pad, cfg.dtype)
    prompts = data.encode_prompts(held_out_prompts(cfg.data, 256, cfg.seed), tok,
                                  sft.config.n_positions - cfg.max_new_tokens, data.Counter())
    rows = sample_rows(sft, tok, prompts, cfg)
    mean, std = reward.normalise(model, rows, tok.pad, cfg.dtype)
    model.save(cfg.out, **tok.special, reward_mean=mean, reward_std=std)
    tok.save(cfg.out)
    summary = log.finish(**summary, **found, **ceiling)
    samples(cfg.out, *scored_pairs(model, tok, held_out[:3], cfg), ("chosen", "rejected"))
    curves(cfg.out, PANELS)
    tell(summary, table, cfg)


def compare_samples(sft, tok, n, k, cfg, held_out):
    """The SFT model answers n prompts k times each, and annotators compare. -> groups, ceiling"""
    prompts = environment.prompts(n, cfg.seed, held_out)
    rows = sample_rows(sft, tok, [tok.encode(p) for p in prompts for _ in range(k)], cfg)
    return reward.annotate(prompts, rows, tok, cfg)


def scored_pairs(model, tok, pairs, cfg):
    """Pairs to read: (prompt, response and its score), first the chosen, then the rejected."""
    sides = []
    for rows in zip(*pairs):
        scores = reward.score_rows(model, rows, tok.pad, cfg.dtype)
        sides.append([(tok.decode(tokens[:n]), f"{tok.decode(tokens[n:])}  ({score:+.2f})")
                      for (tokens, n), score in zip(rows, scores)])
    return sides


def tell(summary, table, cfg):
    """The reward model in a few lines, and what to do next."""
    s = summary
    print(f"accuracy  {s['accuracy']:.3f} on {s['pairs']:,} held-out pairs "
          f"(95 %: {s['accuracy_low']:.3f} to {s['accuracy_high']:.3f})")
    if "accuracy_ceiling" in s:
        print(f"ceiling   {s['accuracy_ceiling']:.3f}, as annotators err; "
              f"{s['accuracy'] / s['accuracy_ceiling']:.0%} of it reached")
    print(f"length    alone would reach {s['length_accuracy']:.3f}")
    print("calibration, said -> came true:  "
          + "  ".join(f"{said:.2f} -> {true:.2f} ({n})" for said, true, n in table))
    print(f"{s['seconds']:.0f} s; see {cfg.out}/curves.png")
    print(f"next: python train_ppo.py --sft {cfg.sft} --rm {cfg.out}")


if __name__ == "__main__":
    run(main, reward.RMConfig)
