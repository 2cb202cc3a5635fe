"""The list of planted defects is sound, and the runner can tell caught from survived from broken.

The whole list takes minutes: python tests/mutants.py
"""

import ast

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant


def test_every_defect_has_one_place_and_changes_what_the_code_does():
    for mutant in MUTANTS:
        text = mutant.text()  # raises where the place is gone, or not the only one
        sound = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(sound)), mutant.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 100


def test_every_test_that_should_notice_exists():
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found |= {f"{path.name}::{name}" for name in names}
    assert {mutant.test for mutant in MUTANTS} <= found


def test_defects_that_are_named_are_planted_and_caught(capsys):
    with pytest.raises(SystemExit) as end:
        mutants.main(["k3 with its arguments", "RLOO whose baseline", "k2"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[-1] == "3 of 3 caught"
    assert lines[0].startswith("k3 with its arguments reversed ")
    assert "| test_logprobs.py::test_k1_and_k3_are_right_on_average[kl_k3] |" in lines[0]


def in_logprobs(old, new):
    return Mutant("", 0, "nanorlhf/logprobs.py", old, new, "test_logprobs.py::test_entropy_by_hand")


def test_a_defect_that_nobody_notices_is_said_and_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "MUTANTS", [in_logprobs("What a model says", "What a cat says")])
    with pytest.raises(SystemExit) as end:
        mutants.main([])
    out = capsys.readouterr().out
    assert "| SURVIVED |" in out and out.endswith("0 of 1 caught\n") and end.value.code == 1


@pytest.mark.parametrize("new", ["import torch torch\n", "import torch, no_such_module\n"])
def test_code_that_cannot_even_be_imported_is_broken_and_not_caught(new):
    caught, said, _ = mutants.attempt(in_logprobs("import torch\n", new))
    assert not caught and said.startswith("BROKEN")


def test_tests_that_fail_without_any_defect_prove_nothing(monkeypatch):
    nowhere = MUTANTS[0]._replace(test="test_logprobs.py::test_that_is_not_there")
    monkeypatch.setattr(mutants, "MUTANTS", [nowhere])
    with pytest.raises(SystemExit, match="fail without any defect"):
        mutants.main([])


def test_code_that_has_moved_is_named():
    lost = MUTANTS[0]._replace(old="this line is not there")
    with pytest.raises(AssertionError, match="k3 .* the code has moved, 'this line is not there'"):
        lost.text()
