"""Stage 1: teach a GPT to imitate demonstrations, or pretrain it on plain text.

    python train_sft.py                                     the built-in world
    python train_sft.py --data books.jsonl.gz --tokenizer gpt2 --out out/base
    python train_sft.py --data hh.jsonl.gz --init out/base --out out/hh-sft
    python train_sft.py --data hh.jsonl.gz --init gpt2 --learning-rate 5e-5 --out out/hh-gpt2
"""
from nanorlhf import environment, sft, tokenizer
from nanorlhf.generate import generate_texts
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.support import data, parallel
from nanorlhf.support.config import compile_trunks, named, run, setup
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples

PANELS = [("Loss", "nats / token", ["loss", "held_out_loss"]),
          ("Learning rate", "", ["lr"]),
          ("Gradient norm", "", ["grad_norm"])]


def main(cfg):
    device = setup(cfg)

    # Data: records with a prompt and a response; some are kept aside to measure on.
    if cfg.data:
        records, counts = data.demonstrations(cfg.data)
        train, held_out = data.split(records)
    else:
        counts = data.Counter(records=cfg.demos)
        train = environment.demonstrations(cfg.demos, cfg.seed)
        held_out = environment.demonstrations(200, cfg.seed, held_out=True)

    # Model: from scratch, or what an earlier run or GPT-2 has learnt, with its tokenizer.
    tok = load_tokenizer(cfg, train)
    if cfg.init == "scratch":
        model = GPT(GPTConfig(tok.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                              cfg.dropout))
    else:
        model = GPT.load(cfg.init, cfg.dropout).resize_vocab(tok.vocab_size)
    model.to(device)
    block_size = model.config.n_positions

    rows = data.encode(train, tok, block_size, counts)
    print(f"data      {data.describe(counts)}")
    print(f"model     {model}, on {named(device, cfg.dtype)}")
    compile_trunks(cfg.compile, model)

    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    length = min(block_size // 2, 128)
    prompts = list(dict.fromkeys(r["prompt"] for r in held_out))[:3]
    prompts = data.encode_prompts(prompts, tok, block_size - length, data.Counter())
    before = generate_texts(model, tok, prompts, length, seed=cfg.seed)
    log = RunLog(cfg.out, columns=("loss", "held_out_loss", "lr"), decode=tok.decode)
    held_out_rows = data.encode(held_out, tok, block_size, counts)
    summary = sft.train(model, rows, held_out_rows, tok.pad, cfg, log)
    parallel.finish()

    model.save(cfg.out, tok)
    summary = log.finish(**summary)
    samples(cfg.out, before, generate_texts(model, tok, prompts, length, seed=cfg.seed))
    curves(cfg.out, PANELS)
    print(f"held-out loss {summary['loss']:.3f} nats a token, "
          f"perplexity {summary['perplexity']:.2f}, after {summary['seconds']:.0f} s; "
          f"see {cfg.out}/curves.png and samples.md")
    print(f"next: python train_rm.py --sft {cfg.out}")


def load_tokenizer(cfg, records):
    if cfg.init != "scratch":
        return tokenizer.load(cfg.init)
    if cfg.tokenizer == "builtin":
        texts = (text for r in records for text in (r["prompt"], r["response"]))
        return tokenizer.learn(texts, cfg.vocab_size)
    return tokenizer.load(cfg.tokenizer)


if __name__ == "__main__":
    run(main, sft.SFTConfig)
