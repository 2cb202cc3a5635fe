"""The rules for the code: imports point down, files stay short, nothing is unpickled."""

import ast
import collections
import copy
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from nanorlhf import ppo, reward
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.support.runlog import RunLog

ROOT = Path(__file__).parents[1]
# By the names they are imported by: support.config, ppo, train_ppo.
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("nanorlhf."): path
    for path in [*ROOT.glob("nanorlhf/**/*.py"), *ROOT.glob("train_*.py")]
    if path.name != "__init__.py"
}
MODULES = sorted(FILES)
COURSE = [name for name in MODULES if "." not in name and not name.startswith("train_")]
PROGRAMS = "train_", "experiments.", "people."


def place(name):
    """0: support; 1: the course; 2: the programs that use it. Imports never point up."""
    return 0 if name.startswith("support.") else 2 if name.startswith(PROGRAMS) else 1


# What requirements.txt installs, and what that brings along.
THIRD_PARTY = {"torch", "numpy", "tiktoken", "tqdm", "matplotlib", "regex", "PIL"}


@cache
def tree(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imported(name):
    """Every module that a file imports, wherever in the file, by its full name."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports with dots; nanorlhf.name can be searched for"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name):
    """Those of them that are files of this repository."""
    return {m.removeprefix("nanorlhf.") for m in imported(name)} & set(MODULES)


def calls(name):
    """(what is called, the call) for every call in a file."""
    nodes = (node for node in ast.walk(tree(name)) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node) for node in nodes]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    above = {other for other in ours(name) if place(other) > place(name)}
    assert not above, f"{name} imports from above: {above}"


def test_there_is_no_ring():
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("support.")])
def test_support_imports_nothing_of_ours_but_support(name):
    """Not even the package itself, which would be a way around."""
    found = {m for m in imported(name) if m.split(".")[0] == "nanorlhf" or m in MODULES}
    assert all(m.startswith("nanorlhf.support") for m in found), found


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_by_a_name_in_a_string(name):
    """Such an import is seen neither by a reader nor by the tests here.

    A user's own file is another matter: it is loaded from its path, and once.
    """
    assert "__import__" not in {node.id for node in ast.walk(tree(name)) if type(node) is ast.Name}
    assert not {m for m in imported(name) if m.split(".")[0] in ("runpy", "pkgutil", "imp")}
    through = {m for m in imported(name) if m.split(".")[0] == "importlib"}
    assert through <= ({"importlib.util"} if name == "support.user_code" else set())
    assert not {what for what, _ in calls(name) if what.endswith("import_module")}


# --- how long it is ---


def lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_can_be_read_at_one_sitting(name):
    assert lines([FILES[name]]) <= 330


@pytest.mark.parametrize("files, most", [
    ("nanorlhf/ppo.py", 300),
    ("nanorlhf/*.py", 1890),  # the course
    ("nanorlhf/**/*.py", 5980),
])  # fmt: skip
def test_there_are_no_more_lines_than_planned(files, most):
    length = lines(ROOT.glob(files))
    assert 0 < length <= most


def body(function):
    """What a function does, as text: without its name and its docstring."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return "\n".join(map(ast.dump, statements))


def test_no_two_functions_do_the_same_in_the_same_words():
    where = collections.defaultdict(list)
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.FunctionDef):
                where[body(node)].append(f"{name}.{node.name}")
    assert not [names for names in where.values() if len(names) > 1]


def test_a_round_of_ppo_is_understood_from_eight_files_of_the_course():
    """One round with a critic and a reward model, as train_ppo.py runs it: what is called?"""
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=12, n_positions=9, n_layer=1, n_head=2, n_embd=8)
    policy, critic, reward_model = GPT(shape).eval(), ScalarGPT(shape), ScalarGPT(shape)
    cfg = ppo.PPOConfig(steps=1, batch_size=4, max_new_tokens=4, device="cpu", dtype="float32")
    score, course, found = reward.by_model(reward_model), ROOT / "nanorlhf", set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent == course:
            found.add(path.stem)

    sys.setprofile(note)
    try:
        ppo.train(policy, copy.deepcopy(policy), critic.eval(), score, [[1, 2], [3]] * 4, 10, 11,
                  cfg, RunLog())  # fmt: skip
    finally:
        sys.setprofile(None)
    assert {"ppo", "generate", "model", "attention", "logprobs", "advantages"} <= found
    assert len(found) <= 8, found


@pytest.mark.parametrize("name", MODULES)
def test_a_file_says_at_its_top_what_it_is_for(name):
    assert ast.get_docstring(tree(name))


@pytest.mark.parametrize("name", MODULES)
def test_only_a_few_packages_are_needed(name):
    packages = {module.split(".")[0] for module in imported(name)}
    scripts = {name for name in FILES if name.startswith("train_")}
    assert packages <= THIRD_PARTY | scripts | {"nanorlhf"} | set(sys.stdlib_module_names)


def test_the_packages_are_those_that_are_installed():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == THIRD_PARTY - {"regex", "PIL"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled_that_could_run_code(name):
    assert not imported(name) & {"pickle", "marshal", "shelve", "dill", "joblib"}
    for function, call in calls(name):
        settings = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert function not in ("eval", "exec"), f"line {call.lineno}"
        if function == "torch.load":
            assert settings.get("weights_only") == "True", f"line {call.lineno}"
        if function == "np.load":
            assert "allow_pickle" not in settings, f"line {call.lineno}"


@pytest.mark.parametrize("name", [name for name in MODULES if place(name) < 2])
def test_float64_is_computed_on_the_cpu(name):
    """Apple's GPUs have none."""
    for function, call in calls(name):
        double = function.endswith(".double")
        assert not double or function.endswith(".cpu().double"), f"line {call.lineno}"


def test_every_file_of_the_course_is_described_where_a_reader_begins():
    guide = ast.get_docstring(ast.parse((ROOT / "nanorlhf/__init__.py").read_text()))
    assert not [name for name in COURSE if f"{name}.py" not in guide]


def test_nothing_else_lies_about():
    """Dot-files aside, the top level is what the README shows."""
    expected = {"nanorlhf", "notebooks", "tests", "requirements.txt", "README.md", "LICENSE", "out"}
    expected |= {path.name for path in ROOT.glob("train_*.py")}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert found <= expected
