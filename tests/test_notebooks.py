"""Every notebook runs, shows its pictures where it is read, and copies nothing."""

import ast
import base64
import inspect
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
DRAWS = {"draw", "strips", "token_strip", "plot_guess", "small_multiples"}

# Side by side in two processes; those that share a model stay together, so that one trains it.
SHARES = pytest.mark.xdist_group("shared model")
each_notebook = pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[SHARES] * ("imitator" in path.read_text("utf-8")))
    for path in NOTEBOOKS])


def cells(path, kind):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def called(source):
    return {ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}


def functions(source):
    """{name: the body without its docstring} of every function, in the parser's words."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    bodies = {f.name: f.body[ast.get_docstring(f) is not None:] for f in found}
    return {name: "\n".join(map(ast.unparse, body)) for name, body in bodies.items()}


def pictures(cell):
    outputs = [output.get("data", {}) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def test_there_are_notebooks():
    assert NOTEBOOKS


def solved(exercise, text):
    """The code cell of an exercise with the functions of the solution above it in their place."""
    [solution] = re.findall(r"<summary>Solution</summary>\n+```python\n(.*?)```", text, re.DOTALL)
    answers = {node.name: node for node in ast.parse(solution).body
               if isinstance(node, ast.FunctionDef)}
    body = ast.parse(exercise).body
    stubs = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert answers and answers.keys() <= stubs, f"{[*answers]} answer no stub of {[*stubs]}"
    return "\n".join(ast.unparse(answers.get(getattr(node, "name", None), node)) for node in body)


def with_solutions(notebook):
    """After each exercise whose solution is code, the same cell again, solved."""
    cells, exercises = [], []
    for above, cell in zip([None, *notebook.cells], notebook.cells):
        cells.append(cell)
        if cell.cell_type == "code" and above and "Solution</summary>\n\n```" in above.source:
            exercises.append(nbformat.v4.new_code_cell(solved(cell.source, above.source)))
            cells.append(exercises[-1])
    notebook.cells = cells
    return exercises


@each_notebook
def test_it_runs_and_its_exercises_accept_their_solutions(path, monkeypatch):
    """A real kernel, as a reader has it; its asserts are the checks. Nothing is written back."""
    old = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT)] + [old] * bool(old)))
    notebook = nbformat.read(path, as_version=4)
    exercises = with_solutions(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources=dict(metadata=dict(path=str(ROOT)))).execute()
    assert len(exercises) >= 2
    for cell in exercises:
        assert cell.outputs[-1].text.strip().endswith("right"), cell.source


@each_notebook
def test_its_outputs_are_committed(path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run it from top to bottom, then save it")
    for cell in code:
        last = ast.parse(cell.source).body[-1]
        if isinstance(last, ast.Expr) and called(ast.unparse(last)) & DRAWS:
            assert pictures(cell), f"no picture below {cell.source[-60:]!r}"
        if "print" in called(cell.source):
            assert cell.outputs, f"nothing below {cell.source[-60:]!r}"
    assert any(pictures(cell) for cell in code)


@each_notebook
def test_the_source_that_it_shows_is_what_runs_today(path):
    names, shown = {}, 0
    for cell in cells(path, "code"):
        tree = ast.walk(ast.parse(cell.source))
        imports = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec("\n".join(map(ast.unparse, imports)), names)
        printed = "".join(output.get("text", "") for output in cell.outputs)
        for name in re.findall(r"getsource\(([\w.]+)\)", cell.source):
            assert inspect.getsource(eval(name, names)) in printed, f"run it again: {name} is new"
            shown += 1
    assert shown > 5


@each_notebook
def test_what_is_committed_is_small_and_clean(path):
    for cell in cells(path, "code"):
        assert all(len(picture) < 100_000 for picture in pictures(cell))
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
    found = re.search(r"(/home/|/tmp/|/root/|/Users/|[A-Z]:\\\\Users)", path.read_text())
    assert not found, f"a path of somebody's machine: {found}"


@each_notebook
def test_it_copies_nothing_from_the_package(path):
    """What it shows is what runs: imported, and printed with inspect.getsource."""
    package = {}
    for file in [*ROOT.glob("nanorlhf/**/*.py"), *ROOT.glob("train_*.py")]:
        package |= functions(file.read_text(encoding="utf-8"))
    mine = functions("\n".join(cell.source for cell in cells(path, "code")))
    assert not mine.keys() & package.keys()
    assert not {body for body in mine.values() if "\n" in body} & set(package.values())


@each_notebook
def test_it_keeps_the_house_style(path):
    code, text = cells(path, "code"), cells(path, "markdown")
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    assert 35 <= len(code) + len(text) <= 60
    assert 1200 <= sum(len(cell.source.split()) for cell in text) <= 2000
    assert lengths[len(lengths) // 2] <= 8 and lengths[-1] <= 40
    assert sum(cell.source.startswith("guess = ") for cell in code) >= 3
    assert sum(cell.source.count("assert ") for cell in code) >= 5
    assert text[0].source.splitlines()[0].endswith("?"), "a question is the title"
