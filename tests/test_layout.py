"""The house stands as planned: imports point down, files stay short, nothing is unpickled."""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", MODULES)
def test_a_file_can_be_read_at_one_sitting(name):
    assert len(FILES[name].read_text().splitlines()) <= 330


@pytest.mark.parametrize("name", MODULES)
def test_a_file_says_at_its_top_what_it_is_for(name):
    assert ast.get_docstring(tree(name))


@pytest.mark.parametrize("name", MODULES)
def test_only_a_few_packages_are_needed(name):
    packages = {module.split(".")[0] for module in imported(name)}
    assert packages <= THIRD_PARTY | {"nanorlhf"} | set(sys.stdlib_module_names)


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


def test_every_file_of_the_course_is_described_where_a_reader_begins():
    guide = ast.get_docstring(ast.parse((ROOT / "nanorlhf/__init__.py").read_text()))
    assert not [name for name in COURSE if f"{name}.py" not in guide]


def test_nothing_else_lies_about():
    """Dot-files aside, the top level is what the README shows."""
    expected = {"nanorlhf", "notebooks", "tests", "requirements.txt", "README.md", "LICENSE", "out"}
    expected |= {path.name for path in ROOT.glob("train_*.py")}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert found <= expected
