"""The README's section "Write it yourself": its rows name functions that exist, in the order of the
scripts, each command selects the tests of its exercise, and these fail wherever the function is
wrong. (tests/tools/wrong_answers.py does the last by running the commands themselves, which takes longer.) The
mistakes are changes of certain lines, so that these tests are for those who maintain this, with CI=1,
and not for readers who edit a script."""

import ast
import os
import shlex
import shutil

import pytest
import test_exercises
from conftest import ROOT, instruct, run
from wrong_answers import (
    MISTAKES, ZEROS, copy_repository, find, rows_of_the_table, wrong_versions)

import bigram
import bpe_gpt
import char_gpt
import sample

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="the exercises themselves: set CI=1 to check them")

SCRIPTS = {"bigram.py": bigram, "char_gpt.py": char_gpt, "bpe_gpt.py": bpe_gpt,
           "data/instruct.py": instruct, "sample.py": sample}
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


# tests/exercises.py, which a learner uses


@pytest.fixture
def copy(tmp_path):
    copy_repository(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_an_exercise_is_begun_shown_and_restored_and_other_changes_stay(copy):
    script = copy / "char_gpt.py"
    original = script.read_text(encoding="utf-8")
    out, _ = run("tests/exercises.py", "attention", cwd=copy)
    empty = script.read_text(encoding="utf-8")
    assert "Scores, causal mask" in out and "-k attention" in out
    line = int(out.split("line ")[1].split(".")[0])
    assert empty.splitlines()[line - 1] == "def attention(q, k, v):"
    body = "    raise NotImplementedError\n"
    assert empty.count(body) == original.count(body) + 1
    mine = "    return v  # mine\n"
    script.write_text("# a remark\n" + empty.replace(body, mine), encoding="utf-8")
    again = run("tests/exercises.py", "attention", cwd=copy, status=1)[1]
    assert "you have begun" in again and mine in script.read_text(encoding="utf-8")
    diff, _ = run("tests/exercises.py", "attention", "--solution", cwd=copy)
    assert "-" + mine in diff and "+    return scores.softmax(dim=-1) @ v" in diff
    run("tests/exercises.py", "attention", "--restore", cwd=copy)
    assert script.read_text(encoding="utf-8") == "# a remark\n" + original
    assert not list(copy.glob("*.before_*"))
    for _ in range(2):  # begun again and given up, or solved again
        run("tests/exercises.py", "attention", cwd=copy)
        run("tests/exercises.py", "attention", "--restore", cwd=copy)
    (yours,) = copy.glob("*.your_*")
    text = yours.read_text(encoding="utf-8")
    assert text.startswith("def attention(q, k, v):\n") and text.endswith(mine)
    run("tests/exercises.py", "attention", cwd=copy)
    script.write_text(script.read_text(encoding="utf-8").replace(body, "    return q\n"), encoding="utf-8")
    run("tests/exercises.py", "attention", "--restore", cwd=copy)
    assert len(list(copy.glob("*.your_*"))) == 2 and yours.read_text(encoding="utf-8") == text


def test_a_script_that_cannot_be_read_gets_one_line_and_stays_as_it_is(copy):
    script = copy / "char_gpt.py"
    run("tests/exercises.py", "attention", cwd=copy)
    source = script.read_text(encoding="utf-8")
    broken = source.replace("def attention(q, k, v):", "def attention(q, k, v:")
    script.write_text(broken, encoding="utf-8")
    for words in (["attention", "--restore"], ["attention", "--solution"], ["layer_norm"]):
        lines = run("tests/exercises.py", *words, cwd=copy, status=1)[1].splitlines()
        assert len(lines) == 1 and "char_gpt.py cannot be read" in lines[0], lines
    assert script.read_text(encoding="utf-8") == broken
    assert [path.name for path in copy.glob("*.before_*")] == ["char_gpt.py.before_attention"]


def test_the_list_marks_the_exercises_whose_tests_pass(copy):
    for word in ("gelu", "layer_norm"):
        run("tests/exercises.py", word, cwd=copy)
    lines = run("tests/exercises.py", cwd=copy, fresh=True)[0].splitlines()
    assert len(lines) == len(ROWS)
    open_ones = [line.split()[0] for line in lines if line.startswith("  ")]
    assert open_ones == ["layer_norm", "gelu"]


def test_a_learners_error_is_reported_in_three_lines(copy):
    script = copy / "char_gpt.py"
    source = script.read_text(encoding="utf-8").replace(
        "scores = q @ k.transpose(-2, -1) /", "scores = q @ k /")
    script.write_text(source, encoding="utf-8")
    command = ("-m", "pytest", "tests/test_exercises.py", "-k", "attention_weights_sum", "-q")
    out, _ = run(*command, cwd=copy, status=1, fresh=True)
    error, place, values = out.split("___\n")[1].split("\n====")[0].splitlines()
    assert error.startswith("RuntimeError: ") and "scores = q @ k /" in place
    assert place.startswith("in char_gpt.py, line") and values.startswith("input: q of the shape (")
