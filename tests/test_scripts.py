"""The three commands as a reader runs them, only smaller: what they leave, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_rm
from nanorlhf import generate, reward, tokenizer
from nanorlhf.model import GPT
from nanorlhf.support.runlog import read

ROOT = Path(__file__).parents[1]
COMMON = "--steps 3 --device cpu --dtype float32"
COMMANDS = {
    "sft": f"train_sft.py {COMMON} --demos 150 --vocab-size 300 --n-layer 1 --n-head 2 --n-embd 16"
    " --batch-size 4",
    "rm": f"train_rm.py {COMMON} --prompts 6 --responses 3 --held-out-prompts 8"
    " --max-new-tokens 12",
    "ppo": f"train_ppo.py {COMMON} --prompts 16 --eval-prompts 8 --batch-size 4 --max-new-tokens 12"
    " --save-every 2",
}


def command(folder, words, **environment):
    """Run a command in a folder. -> status, standard output, standard error"""
    script, *flags = words.split()
    done = subprocess.run(
        [sys.executable, ROOT / script if script.endswith(".py") else script, *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder where all three have run, one after the other; and what each of them printed."""
    folder = tmp_path_factory.mktemp("workshop")
    printed = {}
    for stage, words in COMMANDS.items():
        status, printed[stage], errors = command(folder, words)
        assert status == 0, errors
    return folder, printed


def summary(folder, stage):
    return json.loads((folder / "out" / stage / "summary.json").read_text())


MODEL = "config.json model.safetensors vocab.json merges.txt tokenizer_config.json".split()
DIARY = "settings.json log.jsonl summary.json curves.png samples.md".split()
KEYS = {
    "sft": "loss perplexity",
    "rm": "accuracy accuracy_ceiling",
    "ppo": "score kl win_rate win_rate_low win_rate_high gold_before gold_after",
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_promised_file_is_there(workshop, stage):
    run = workshop[0] / "out" / stage
    names = {path.name for path in run.iterdir()}
    assert names >= {*MODEL, *DIARY}
    assert not [name for name in names if name.endswith(".tmp")]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_summary_holds_every_promised_number(workshop, stage):
    found = summary(workshop[0], stage)
    assert found.keys() >= {"seconds", "steps", "tokens", *KEYS[stage].split()}
    assert found["steps"] == 3 and found["tokens"] > 0 and found["seconds"] > 0
    assert len(read(workshop[0] / "out" / stage)) == 3  # one line a step


def test_the_numbers_are_plausible(workshop):
    sft, rm, ppo = (summary(workshop[0], stage) for stage in COMMANDS)
    assert 1 < sft["loss"] < 8
    assert 0 <= rm["accuracy"] <= 1 and 0.5 <= rm["accuracy_ceiling"] <= 1
    assert 0 <= ppo["win_rate_low"] <= ppo["win_rate"] <= ppo["win_rate_high"] <= 1


def test_what_was_trained_can_be_loaded(workshop):
    out = workshop[0] / "out"
    tok = tokenizer.load(out / "ppo")
    assert GPT.load(out / "ppo").config.vocab_size == tok.vocab_size
    assert reward.load(out / "rm").config.vocab_size == tok.vocab_size
    config = json.loads((out / "rm" / "config.json").read_text())
    assert config["reward_std"] > 0 and "reward_mean" in config
    for folder in "sft", "rm", "ppo", "ppo/critic":
        config = json.loads((out / folder / "config.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (tok.eos, tok.pad)


def test_the_screen_shows_something_human(workshop):
    _, printed = workshop
    for stage in "sft", "ppo":  # three prompts, before and after
        assert printed[stage].count("\nprompt ") + printed[stage].startswith("prompt ") >= 3
        assert "curves.png" in printed[stage]
    assert "next: python train_rm.py" in printed["sft"]
    assert "next: python train_ppo.py" in printed["rm"]
    assert "win rate" in printed["ppo"]


# --- did it help? ---

EVALUATE = (
    "-m nanorlhf.evaluate --policy out/ppo --against out/sft --prompts 8 --max-new-tokens 12"
    " --device cpu --dtype float32 --overwrite"
)


def test_evaluate_says_of_a_finished_run_exactly_what_the_run_said(workshop):
    """The same seed draws the same samples, so a reader can check a run after the fact."""
    folder, _ = workshop
    status, printed, errors = command(folder, EVALUATE + " --out out/evaluated")
    assert status == 0, errors
    ours, theirs = summary(folder, "evaluated"), summary(folder, "ppo")
    for key in "win_rate", "win_rate_low", "win_rate_high":
        assert ours[key] == theirs[key]
    assert (ours["score_against"], ours["score_policy"], ours["kl_policy"]) == (
        theirs["gold_before"], theirs["gold_after"], theirs["kl"])  # fmt: skip
    assert ours["kl_against"] == 0 != theirs["kl"]  # or both would have read one model
    assert "over 8 held-out prompts, by env" in printed
    said = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert said["win"][1] == f"{theirs['win_rate']:.3f}"
    assert said["kl"] == [f"{theirs['kl']:.3f}", "0.000"]
    assert said["score"] == [f"{theirs[key]:.3f}" for key in ("gold_after", "gold_before")]


def test_another_seed_draws_other_samples(workshop):
    folder, _ = workshop
    status, _, errors = command(folder, EVALUATE + " --seed 2 --out out/evaluated-2")
    assert status == 0, errors
    assert summary(folder, "evaluated-2")["score_policy"] != summary(folder, "ppo")["gold_after"]


# --- what fits into memory ---


@pytest.mark.parametrize("size", [1, 2])
def test_the_micro_batch_size_bounds_what_the_reward_model_samples_and_changes_no_result(
    size, workshop, monkeypatch, capsys
):
    """It counts prompts. Each has two responses: those of the comparisons share theirs by twos."""
    sample, train = generate.generate, reward.train
    sampled, learnt_from = [], []

    def watched(model, prompts, limit, temperature, eos, pad, G, uniforms):
        sampled.append((len(prompts), G))
        return sample(model, prompts, limit, temperature, eos, pad, G, uniforms)

    monkeypatch.setattr(generate, "generate", watched)
    monkeypatch.setattr(
        reward, "train", lambda m, groups, *a: learnt_from.append(groups) or train(m, groups, *a)
    )
    monkeypatch.chdir(workshop[0])
    for name, micro_batch_size in ("whole", 0), ("parts", size):
        sampled.clear()
        train_rm.main(reward.RMConfig(
            out=f"out/{name}-{size}", micro_batch_size=micro_batch_size, steps=3, prompts=6,
            responses=4, held_out_prompts=8, max_new_tokens=12, device="cpu", dtype="float32",
        ))  # fmt: skip
        if not micro_batch_size:
            assert sampled[:2] == [(6, 2), (8, 2)]  # all at once, and so are the 256 to normalise
    assert {n for n, _ in sampled} == {size}
    assert sum(n * G for n, G in sampled) == 6 * 2 + 8 * 2 + 256
    assert learnt_from[0] == learnt_from[1]
    whole, parts = (workshop[0] / "out" / f"{name}-{size}" for name in ("whole", "parts"))
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (parts, whole))
    same = {key: pytest.approx(x, rel=1e-4) for key, x in theirs.items() if key != "seconds"}
    assert {key: x for key, x in ours.items() if key != "seconds"} == same
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.allclose(*(reward.load(run)(tokens) for run in (parts, whole)), atol=1e-3)


# --- a terminal that knows little ---


def test_samples_that_a_terminal_cannot_show_do_not_end_a_run(tmp_path):
    """A fox, a dash and an umlaut in the prompts, and what an untrained model writes."""
    records = [dict(prompt=f"Erz\u00e4hl mir \u2013 \U0001f98a {n}:", response="So ist es.")
               for n in range(40)]  # fmt: skip
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "fox.jsonl").write_text(lines, encoding="utf-8")
    words = COMMANDS["sft"].replace("--steps 3", "--steps 1") + " --data fox.jsonl"
    status, printed, errors = command(tmp_path, words, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert status == 0 and "Traceback" not in errors, errors
    page = (tmp_path / "out" / "sft" / "samples.md").read_text(encoding="utf-8")
    assert "Erz\u00e4hl mir \u2013 \U0001f98a" in page and "\ufffd" in page
    assert printed.isascii() and "Erz?hl mir ? ?" in printed
    assert "next: python train_rm.py" in printed  # it came to its end


def test_the_same_command_can_be_run_again_and_gives_the_same(workshop):
    folder, _ = workshop
    for stage, words in COMMANDS.items():
        before = summary(folder, stage) | {"seconds": 0}
        status, _, errors = command(folder, words)
        assert status == 0, errors
        assert summary(folder, stage) | {"seconds": 0} == before


@pytest.mark.parametrize("stage", COMMANDS)
def test_other_settings_do_not_overwrite_a_run(workshop, stage):
    folder, _ = workshop
    before = {p: p.read_bytes() for p in (folder / "out" / stage).iterdir() if p.is_file()}
    status, _, errors = command(folder, COMMANDS[stage] + " --seed 7")
    assert status == 2 and errors.count("\n") == 1
    assert f"out/{stage} holds a run with other settings (seed 1 there, 7 here)" in errors
    assert {p: p.read_bytes() for p in before} == before


def test_ppo_can_be_resumed_and_taken_further(workshop):
    folder, _ = workshop
    words = COMMANDS["ppo"].replace("--steps 3", "--steps 5") + " --resume"
    status, _, errors = command(folder, words)
    assert status == 0, errors
    assert [row["step"] for row in read(folder / "out" / "ppo")] == [0, 1, 2, 3, 4]
    assert summary(folder, "ppo")["steps"] == 5


def test_a_reward_of_ones_own(workshop):
    folder, _ = workshop
    (folder / "mine.py").write_text(
        "def score(pairs):\n    return [float(len(response)) for prompt, response in pairs]\n"
    )
    words = COMMANDS["ppo"] + " --reward mine.py:score --out out/mine"
    status, printed, errors = command(folder, words)
    assert status == 0, errors
    assert "scored by mine.py:score" in printed and summary(folder, "mine")["score"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("train_sft.py --data nowhere.jsonl", "nowhere.jsonl:1: expected a file to read"),
        ("train_rm.py --sft nowhere", "nowhere is no checkpoint"),
        ("train_ppo.py --reward nowhere.py:f", "expected rm, env or FILE.py:FUNCTION"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_in_the_way(workshop, words, message, tmp_path):
    status, _, errors = command(workshop[0], f"{words} --out {tmp_path / 'out'}")
    assert status == 2 and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()
