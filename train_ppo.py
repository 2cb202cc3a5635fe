"""Stage 3: improve the SFT model until the reward model likes it better.

    python train_ppo.py                                     the built-in world
    python train_ppo.py --reward env                        score by the true reward instead
    python train_ppo.py --reward mine.py:score              score by a function of your own
    python train_ppo.py --advantage grpo --responses 4      no critic: compare answers
    python train_ppo.py --data hh.jsonl.gz --sft out/hh-sft --rm out/hh-rm --out out/hh-ppo
"""
from nanorlhf import environment, ppo, reward
from nanorlhf.evaluate import compare, held_out_prompts
from nanorlhf.generate import generate_texts
from nanorlhf.model import load_policy
from nanorlhf.support import data, parallel
from nanorlhf.support.config import compile_trunks, named, run, setup
from nanorlhf.support.plotting import curves
from nanorlhf.support.runlog import RunLog, open_run, samples

PANELS = [("Score", "of the reward model", ["score"]),
          ("KL to the reference", "nats / response", ["kl", "kl_k3"]),
          ("Response length", "tokens", ["response_len"]), ("Policy loss", "", ["policy_loss"]),
          ("Value loss", "score units, squared", ["value_loss"]),
          ("Entropy", "nats / token", ["entropy"]), ("Ended by itself", "share", ["ended"]),
          ("Clip fraction", "share of tokens", ["clip_frac"]),
          ("Explained variance", "of returns", ["explained_variance"])]
COLUMNS = ("score", "kl", "entropy", "response_len", "ended", "clip_frac", "tokens_per_s")


def main(cfg):
    device = setup(cfg)
    (policy, tok), (reference, _) = (load_policy(cfg.sft, device) for _ in range(2))
    critic = reward.load_for(cfg.rm, policy, tok) if cfg.advantage == "gae" else None
    score = reward.score_function(cfg, tok, policy)

    if cfg.data:
        texts, counts = data.prompts(cfg.data)
        texts = [r["prompt"] for r in data.split([dict(prompt=text) for text in texts])[0]]
    else:
        texts = environment.prompts(cfg.prompts, cfg.seed)
        counts = data.Counter(records=cfg.prompts)
    room = policy.config.n_positions - cfg.max_new_tokens
    prompts = data.encode_prompts(texts, tok, room, counts)
    print(f"prompts   {data.describe(counts)}")
    print(f"policy    {policy}, on {named(device, cfg.dtype)}; scored by {cfg.reward}")
    compile_trunks(cfg.compile, *filter(None, (policy, reference, critic)))

    open_run(cfg.out, cfg, cfg.resume, cfg.overwrite)
    held_out = held_out_prompts(cfg.data, cfg.eval_prompts, cfg.seed)
    shown = data.encode_prompts(held_out[:3], tok, room, data.Counter())
    log = RunLog(cfg.out, columns=COLUMNS, decode=tok.decode)
    summary = ppo.train(policy, reference, critic, score, prompts, tok.eos, tok.pad, cfg, log)
    parallel.finish()
    policy.save(cfg.out, tok)
    if critic is not None:
        critic.save(f"{cfg.out}/critic", **tok.special)

    # Did it help? The built-in world has a true reward; elsewhere only the score itself can say.
    judge, judged = (score, "the score") if cfg.data else (reward.true_reward(tok),
                                                           "the true reward")
    result = compare(policy, reference, tok, held_out, judge, cfg)
    summary |= {key: result[key] for key in ("win_rate", "win_rate_low", "win_rate_high")}
    summary["kl"] = result["kl_policy"]
    if not cfg.data:
        summary |= dict(gold_before=result["score_against"], gold_after=result["score_policy"])
        parts = {name: (result[f"{name}_against"], result[f"{name}_policy"])
                 for name in environment.parts(held_out[0], "")}
        summary["parts"] = parts                               # {name: (before, after)}
    summary = log.finish(**summary)
    samples(cfg.out, *(generate_texts(model, tok, shown, cfg.max_new_tokens, cfg.temperature,
                                      cfg.seed) for model in (reference, policy)))
    curves(cfg.out, PANELS)
    print(f"win rate over the SFT model, by {judged}: {summary['win_rate']:.3f} (95 %: "
          f"{summary['win_rate_low']:.3f} to {summary['win_rate_high']:.3f}), "
          f"at {summary['kl']:.1f} nats a response, after {summary['seconds']:.0f} s")
    print(f"{judged}: {result['score_against']:.2f} before, {result['score_policy']:.2f} after; "
          f"see {cfg.out}/curves.png and samples.md")
    if not cfg.data:
        print("its parts: " + "  ".join(f"{name} {before:.2f} -> {after:.2f}"
                                        for name, (before, after) in parts.items()))
    print(f"next: python -m nanorlhf.evaluate --policy {cfg.out} --against {cfg.sft}")


if __name__ == "__main__":
    run(main, ppo.PPOConfig)
