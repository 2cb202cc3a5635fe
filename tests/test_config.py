"""A dataclass is the command line: its fields are the flags, its comments are the help."""

import dataclasses
import importlib
import inspect
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from nanorlhf import generate, ppo
from nanorlhf.dpo import DPOConfig
from nanorlhf.evaluate import EvaluateConfig
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.ppo import PPOConfig
from nanorlhf.reward import RMConfig
from nanorlhf.sft import SFTConfig
from nanorlhf.support import UserError, config
from nanorlhf.support.config import (
    TrainConfig,
    autocast,
    compile_trunks,
    find_device,
    named,
    parse,
    precision,
    run,
    setup,
)


@dataclass
class Config:
    """Teach a model to be kind.

    This paragraph is for readers of the source.
    """

    steps: int = 200  # updates to make
    learning_rate: float = 3e-4  # AdamW's; decays to 10 % of it
    out: str = "out/sft"  # folder to write; "#" in a name is fine
    sft: str = ""  # checkpoint to start from
    data: list[str] = field(default_factory=list)  # files to read
    parts: list[str] = field(default_factory=lambda: ["a", "b"])  # of the score
    compile: bool = True  # fuse the model
    resume: bool = False  # continue from the last save
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    seed: int = 0  # of everything random


def test_no_words_give_the_defaults():
    assert parse(Config, []) == Config(steps=200, parts=["a", "b"])


def test_every_type_of_field_is_a_flag():
    words = "--steps 3 --learning-rate 1e-3 --out=a_b --data x.jsonl y.gz --no-compile --resume"
    assert parse(Config, words.split() + ["--device", "cpu"]) == Config(
        steps=3, learning_rate=1e-3, out="a_b", data=["x.jsonl", "y.gz"], compile=False,
        resume=True, device="cpu",
    )  # fmt: skip


def test_underscores_are_accepted_in_flags_and_kept_in_values():
    assert parse(Config, ["--learning_rate=1", "--sft=my_run"]) == Config(
        learning_rate=1.0, sft="my_run"
    )


def test_two_runs_do_not_share_a_list():
    parse(Config, []).data.append("x")
    assert parse(Config, []).data == []


def test_help_is_the_comment_beside_the_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "Teach a model to be kind." in text and "readers of the source" not in text
    assert "AdamW's; decays to 10 % of it (default: 0.0003)" in text
    assert 'folder to write; "#" in a name is fine (default: out/sft)' in text
    assert "checkpoint to start from (default: none)" in text
    assert "--compile, --no-compile fuse the model (default: True)" in text
    assert text.count("default: True") == 1


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--steps ten", ["--steps: ", "int", "'ten'"]),
        ("--device tpu", ["--device", "'tpu'", "auto", "cpu", "cuda", "mps"]),
        ("--stepz 3", ["--stepz", "did you mean --steps?"]),
        ("--learning_rat=3", ["--learning-rat ", "did you mean --learning-rate?"]),
        ("--xyzzy", ["--xyzzy", "--help"]),
        ("--step 3", ["--step ", "did you mean --steps?"]),  # no abbreviations
        ("stray", ["stray"]),
        ("--steps", ["--steps", "expected one argument"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_flag(words, parts):
    with pytest.raises(UserError) as mistake:
        parse(Config, words.split())
    sentence = str(mistake.value)
    assert sentence.startswith(parts[0]) and all(part in sentence for part in parts)
    assert "\n" not in sentence


PACKAGE = Path(config.__file__).parents[1]
# The settings of every command, and of what several commands share: (module, class)
COMMANDS = [
    (path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."), name)
    for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("[!s]*/*.py")])  # not of support
    for name in re.findall(r"^@dataclass\nclass (\w+Config)\(", path.read_text(), re.MULTILINE)
]


@pytest.fixture(params=COMMANDS, ids=str)
def cls(request):
    """The settings of a command."""
    return class_of(request.param)


def class_of(command):
    """A class, or (module, name), which is imported only where it is used."""
    if isinstance(command, tuple):
        return getattr(importlib.import_module(command[0]), command[1])
    return command


def test_all_commands_are_looked_at():
    names = {name for _, name in COMMANDS}
    assert names >= {f"{stage}Config" for stage in "SFT RM PPO DPO ILQL Evaluate Bench".split()}


def test_help_shows_the_fields_of_the_class_first_and_every_comment_of_its_bases(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    text = capsys.readouterr().out
    flags = re.findall("^  --([a-z-]+)", text, re.MULTILINE)
    names = [flag.replace("-", "_") for flag in flags]
    if place := getattr(cls, "POSITIONAL", None):  # stands alone: chat out/ppo
        assert f"\n  {place} " in text
        names.insert(0, place)
    own = list(cls.__annotations__)
    assert names[: len(own)] == own
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(cls))
    assert text.count("(default:") + text.count("(default\n") == len(names)
    seen = set()
    for base in filter(dataclasses.is_dataclass, cls.__mro__):
        comments = re.findall(r"^    (\w+): .*#(.*)", inspect.getsource(base), re.MULTILINE)
        assert len(comments) == len(base.__annotations__)
        for name, comment in comments:
            assert name in seen or comment.strip() in " ".join(text.split()), name
            seen.add(name)


def test_a_comment_of_a_class_takes_the_place_of_the_one_of_its_base(capsys):
    @dataclass
    class Own(TrainConfig):
        """Train."""
        out: str = "out"  # folder
        warmup: int = 3  # my own words

    with pytest.raises(SystemExit):
        parse(Own, ["--help"])
    text = capsys.readouterr().out
    assert "my own words (default: 3)" in text and "rises from zero" not in text


def test_every_number_has_its_range_and_its_default_lies_within(cls):
    numbers = {f.name for f in dataclasses.fields(cls) if f.type in (int, float)}
    assert numbers <= config.RANGES.keys() | getattr(cls, "RANGES", {}).keys()
    assert parse(cls, []) == cls()


OUT_OF_RANGE = {
    SFTConfig: "--steps=-1 --batch-size=0 --learning-rate=nan --learning-rate=-1 --n-layer=0"
    " --n-head=0 --n-embd=0 --save-every=0 --block-size=1 --vocab-size=10 --demos=0 --warmup=-1"
    " --weight-decay=-1 --grad-clip=0 --grad-clip=nan --dropout=1 --micro-batch-size=-1"
    " --learning-rate=inf --learning-rate=-inf",
    RMConfig: "--responses=1 --held-out-prompts=0 --annotator-temperature=-1 --max-new-tokens=0",
    PPOConfig: "--temperature=0 --temperature=-1 --temperature=nan --kl-coef=nan --kl-coef=-1"
    " --clip=-1 --clip=0 --value-clip=-1 --epochs=0 --minibatches=0 --minibatches=65 --lam=2"
    " --gamma=1.01 --gamma=-0.1 --eval-prompts=0 --no-end-penalty=nan --kl-target=-1 --responses=0"
    " --critic-learning-rate=nan --temperature=inf",
    DPOConfig: "--beta=0 --beta=-1 --beta=nan --beta=inf --responses=1 --prompts=0",
    EvaluateConfig: "--temperature=0 --prompts=0",
    ("nanorlhf.experiments.bench", "BenchConfig"): "--iters=0 --batch=0 --vocab=0",
}


@pytest.mark.parametrize(
    "command, word", [(c, word) for c, words in OUT_OF_RANGE.items() for word in words.split()]
)
def test_a_number_that_makes_no_sense_is_refused_by_name(command, word):
    flag, _, value = word.partition("=")
    with pytest.raises(UserError) as mistake:
        parse(class_of(command), [word])
    sentence = str(mistake.value)
    assert sentence.startswith(f"{flag}: expected ") and sentence.endswith(
        (f"came {value}", f"came {float(value)}")
    )


@pytest.mark.parametrize(
    "cls, words",
    [
        (SFTConfig, "--steps=0 --block-size=2 --dropout=0.99 --grad-clip=inf --warmup=0"),
        (RMConfig, "--responses=2 --annotator-temperature=0 --micro-batch-size=0"),
        (PPOConfig, "--responses=1 --lam=0 --gamma=1 --clip=inf --value-clip=inf --minibatches=64"),
        (DPOConfig, "--beta=1e-9 --learning-rate=0"),
    ],
)
def test_the_ends_of_a_range_belong_to_it(cls, words):
    parse(cls, words.split())


def test_a_users_mistake_ends_in_one_line_and_status_2(monkeypatch, capsys):
    def main(cfg):
        raise UserError(f"no model\nin {cfg.out}")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run(main, Config)
    assert (stop.value.code, capsys.readouterr().err) == (2, "no model in out/sft\n")


def test_control_c_ends_in_one_line_and_status_130(monkeypatch, capsys):
    def main(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run(main, Config)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run(lambda cfg: 1 / 0, Config)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_setup_seeds_every_source_of_random_numbers():
    setup(Config(seed=1, device="cpu"))
    first = draw()
    setup(Config(seed=1, device="cpu"))
    assert draw() == first
    setup(Config(seed=2, device="cpu"))
    assert not set(draw()) & set(first)


def test_a_seed_that_numpy_cannot_take_is_refused():
    for seed in -1, 2**32:
        with pytest.raises(UserError, match=f"--seed: expected 0 to {2**32 - 1}, came {seed}"):
            parse(Config, [f"--seed={seed}"])


def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cuda")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cpu.*not cuda"):
        find_device("cuda")


def test_precision_is_bfloat16_only_where_the_hardware_has_it(monkeypatch):
    cpu = torch.device("cpu")
    assert precision(cpu, "bfloat16") == torch.bfloat16  # asked for by name: given
    assert precision(cpu, "float32") == torch.float32
    for has_it, expected in (True, torch.bfloat16), (False, torch.float32):
        for name in "_is_avx512_bf16_supported", "_is_amx_tile_supported":
            monkeypatch.setattr(torch.cpu, name, lambda: has_it)  # noqa: B023
        assert precision(cpu, "auto") == expected
    assert precision(torch.device("mps"), "auto") == torch.float32


def test_a_run_says_on_what_and_in_what_it_computes(monkeypatch):
    assert named(torch.device("cpu"), "float32") == "cpu in float32"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    for capability, more in ((8, 0), ", elsewhere in TF32"), ((7, 5), ""):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)  # noqa: B023
        expected = f"cuda (NVIDIA H100) in bfloat16{more}"
        assert named(torch.device("cuda"), "bfloat16") == expected


def test_a_torch_without_the_private_names_computes_in_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert precision(torch.device("cpu"), "auto") == torch.float32


def test_autocast_changes_matrix_products_and_only_when_asked():
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "float32"):
        assert (a @ a).dtype == torch.float32


def test_where_nothing_can_be_compiled_the_run_goes_on_and_says_so(monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_layer=1, n_head=1, n_embd=8))
    compile_trunks(True, model)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "not possible here (RuntimeError)" in said
    assert not model.compiled
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 11)
    compile_trunks(False, model)
    assert capsys.readouterr().out == ""


def run_in(main, capsys, monkeypatch, cls=Config, words=()):
    """-> exit status and what was said on standard error"""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run(main, cls)
    return stopped.value.code, capsys.readouterr().err


REMEDY = "try a smaller --micro-batch-size (0, the default, is no limit)"


def test_out_of_memory_names_the_setting_only_of_a_command_that_has_it(cls, capsys, monkeypatch):
    status, said = run_in(lambda cfg: torch.empty(2**50), capsys, monkeypatch, cls)
    assert status == 2 and said.count("\n") == 1 and said.startswith("out of memory: ")
    has_it = "micro_batch_size" in {f.name for f in dataclasses.fields(cls)}
    assert (REMEDY in said) == ("--micro-batch-size" in said) == has_it


def test_the_setting_that_is_named_is_a_remedy_when_sampling_runs_out(capsys, monkeypatch):
    prefill, at_once = generate.prefill, []

    def with_room_for_two(model, tokens, *others):
        at_once.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return prefill(model, tokens, *others)

    def sample(cfg):
        model = GPT(GPTConfig(vocab_size=12, n_positions=9, n_layer=1, n_head=1, n_embd=8)).eval()
        rows = ppo.collect(model, model, None, lambda tokens, prompt_len, mask: mask.sum(1).float(),
                           [[1], [2, 3]], cfg, 0.1, 10, 11)  # fmt: skip
        sys.exit(len(rows))

    monkeypatch.setattr(generate, "prefill", with_room_for_two)
    words = ["--advantage=rloo", "--responses=2", "--batch-size=4", "--max-new-tokens=3"]
    status, said = run_in(sample, capsys, monkeypatch, PPOConfig, words)
    assert (status, at_once) == (2, [4]) and REMEDY in said and said.count("\n") == 1
    words.append("--micro-batch-size=2")
    assert run_in(sample, capsys, monkeypatch, PPOConfig, words) == (4, "")
    assert at_once == [4, 2, 2]


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])  # fmt: skip
def test_whatever_way_memory_runs_out_it_is_one_line(error, capsys, monkeypatch):
    def main(cfg):
        raise error

    code, said = run_in(main, capsys, monkeypatch)
    assert code == 2 and said.startswith("out of memory: ") and said.count("\n") == 1


def test_memory_that_runs_out_in_a_cuda_graph_is_one_line_too(capsys, monkeypatch):
    """Ending the graph then fails as well, and that error alone would say nothing of memory."""

    def main(cfg):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")

    code, said = run_in(main, capsys, monkeypatch)
    assert code == 2 and said.startswith("out of memory: ") and said.count("\n") == 1


def test_another_error_of_the_machine_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(lambda cfg: torch.ones(2, 3) @ torch.ones(2, 3), Config)


def in_a_process(tmp_path, main, *words, **environment):
    """A real command, whose main is this text. -> exit status, standard output, standard error"""
    script = tmp_path / "train.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from nanorlhf.support import UserError\n"
        "from nanorlhf.support.config import run\n"
        "@dataclass\n"
        "class Config:\n"
        "    '''Train.'''\n"
        "    steps: int = 1  # updates\n"
        f"{main}\n"
        "run(main, Config)\n"
    )
    done = subprocess.run(
        [sys.executable, script, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_wrong_flag_in_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    expected = "--stepz is not a flag of train.py: did you mean --steps?\n"
    assert in_a_process(tmp_path, "main = print", "--stepz") == (2, "", expected)


def test_a_terminal_that_knows_only_ascii_shows_question_marks_and_no_traceback(tmp_path):
    main = (
        "def main(cfg):\n"
        "    print('na\\xefve \\u2603')\n"
        "    raise UserError('no file caf\\xe9')"
    )
    said = in_a_process(tmp_path, main, PYTHONIOENCODING="ascii")
    assert said == (2, "na?ve ?\n", "no file caf?\n")
