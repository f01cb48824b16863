"""The README's section "Write it yourself": its rows name functions that exist, in the order of the
scripts, each command selects the tests of its exercise, and these fail wherever the function is
wrong. (tests/tools/wrong_answers.py does the last by running the commands themselves, which takes longer.) The
mistakes are changes of certain lines, so that these tests are for those who maintain this, with CI=1,
and not for readers who edit a script."""

import ast
import os
import shlex

import pytest
import test_exercises
from conftest import ROOT
from wrong_answers import MISTAKES, ZEROS, find, rows_of_the_table, wrong_versions

import bigram
import bpe_gpt
import char_gpt
import sample

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="the exercises themselves: set CI=1 to check them")

SCRIPTS = {"bigram.py": bigram, "char_gpt.py": char_gpt, "bpe_gpt.py": bpe_gpt, "sample.py": sample}
ROWS = rows_of_the_table()
EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.function)
TESTS = {name: test for name, test in vars(test_exercises).items() if name.startswith("test_")}


def selected(row):
    """The tests that a row's command runs: those that have the word after -k in their names."""
    word = shlex.split(row.command)[-1]
    return [name for name in TESTS if word in name]


def test_the_table_has_a_row_for_every_exercise_in_the_order_of_the_scripts():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Write it yourself")[1]
    lines = section.split("\n## ")[0].count("\n| `")
    assert len(ROWS) == lines >= 10, "a row is not of the form that is expected"
    assert [row.function for row in ROWS] == list(ZEROS) == list(MISTAKES)
    order = [list(SCRIPTS).index(row.script) for row in ROWS]
    assert order == sorted(order)


@EVERY_ROW
def test_a_row_names_a_function_with_a_docstring_or_in_a_class_with_one(row):
    tree = ast.parse((ROOT / row.script).read_text(encoding="utf-8"))
    assert isinstance(find(tree, row.function), ast.FunctionDef)
    assert any(ast.get_docstring(find(tree, name)) for name in (
        row.function, row.function.split(".")[0]))


@EVERY_ROW
def test_a_command_selects_the_tests_of_its_exercise_and_no_others(row):
    start, word = row.command.rsplit(" ", 1)
    assert start == "python -m pytest tests/test_exercises.py -k"
    assert selected(row) == [name for name in TESTS if name.startswith(f"test_{word}_")] != []


def test_every_test_belongs_to_one_exercise():
    assert sorted(name for row in ROWS for name in selected(row)) == sorted(TESTS)


def failures(row):
    failed = []
    for name in selected(row):
        try:
            TESTS[name]()
        except (Exception, pytest.fail.Exception) as error:
            failed.append(f"{name}: {error}")
    return failed


def replaced(row, source):
    """Where a row's function is, and its definition in another source of its script."""
    module = SCRIPTS[row.script]
    definition = find(ast.parse(source), row.function)
    names = dict(vars(module))
    exec(compile(ast.Module([definition], type_ignores=[]), row.script, "exec"), names)
    return f"{module.__name__}.{row.function}", names[definition.name]


@EVERY_ROW
def test_wrong_answers_fail(row, monkeypatch):
    assert failures(row) == []
    for description, source in wrong_versions(row).items():
        with monkeypatch.context() as patch:
            patch.setattr(*replaced(row, source))
            assert failures(row), f"{description}: all tests pass"


@EVERY_ROW
def test_an_exercise_needs_no_later_one(row, monkeypatch):
    for later in ROWS[ROWS.index(row) + 1 :]:
        source = wrong_versions(later)["raises", "NotImplementedError"]
        monkeypatch.setattr(*replaced(later, source))
    assert failures(row) == []
