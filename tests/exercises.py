"""The exercises of the README's section "Write it yourself":

    python tests/exercises.py                       # a list, with a mark for those whose tests pass
    python tests/exercises.py attention             # begin: its body is replaced by an error
    python tests/exercises.py attention --solution  # the original beside what you wrote
    python tests/exercises.py attention --restore   # put the original back, and keep other changes

The script as it was before you began stays beside it, as char_gpt.py.before_attention for example.
"""

import argparse
import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from wrong_answers import find, rows_of_the_table, with_body  # noqa: E402


def word_of(row):
    """The word that selects an exercise, here and in the command of its row."""
    return row.command.split()[-1]


def text_of(source, name):
    """The lines of a function or method."""
    node = find(ast.parse(source), name)
    return source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]


def list_exercises(rows):
    """Run all tests once, and print a line for each exercise."""
    command = [sys.executable, "-m", "pytest", "tests/test_exercises.py", "-q", "-rf", "--tb=no"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if not re.search(r"\d (passed|failed)", done.stdout):  # no pytest, or a script with an error
        sys.exit(done.stdout + done.stderr)
    failed = re.findall(r"^FAILED tests/test_exercises\.py::(\w+)", done.stdout, re.MULTILINE)
    for row in rows:
        passed = not any(name.startswith(f"test_{word_of(row)}_") for name in failed)
        mark = "\N{CHECK MARK}" if passed else " "
        print(f"{mark} {word_of(row):15} {row.function} in {row.script}, {row.time}")


def begin(row, script, backup):
    if backup.exists():
        sys.exit("you have begun this one; add --solution, or --restore to put the original back")
    source = script.read_text(encoding="utf-8")
    empty = with_body(source, row.function, lambda body: "raise NotImplementedError")
    if empty == source:
        sys.exit("there is nothing to replace: its body is already `raise NotImplementedError`")
    backup.write_text(source, encoding="utf-8")
    script.write_text(empty, encoding="utf-8")
    line = find(ast.parse(empty), row.function).lineno
    print(f"{row.task}\nWrite it in {row.script}, line {line}. Then: {row.command} -x")


def show_solution(row, script, backup):
    if not backup.exists():
        sys.exit(f"you have not begun this one; the original is in {row.script}")
    texts = [text_of(path.read_text(encoding="utf-8"), row.function) for path in (script, backup)]
    print("".join(difflib.unified_diff(*texts, "yours", "the original", n=99)), end="")


def restore(row, script, backup):
    if not backup.exists():
        sys.exit("you have not begun this one")
    source = script.read_text(encoding="utf-8")
    node = find(ast.parse(source), row.function)
    lines = source.splitlines(keepends=True)
    original = text_of(backup.read_text(encoding="utf-8"), row.function)
    lines[node.lineno - 1 : node.end_lineno] = original
    text = "".join(text_of(source, row.function))
    n = 1
    while (ROOT / f"{row.script}.your_{word_of(row)}_{n}").exists():
        n += 1
    if "raise NotImplementedError" not in text:
        yours = ROOT / f"{row.script}.your_{word_of(row)}_{n}"
        yours.write_text(text, encoding="utf-8")
        print(f"your {row.function} is in {yours.name}")
    script.write_text("".join(lines), encoding="utf-8")
    backup.unlink()
    print(f"{row.function} in {row.script} is the original again")


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a check mark
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="?", help="the last word of its command in the README")
    parser.add_argument("--solution", action="store_true")
    parser.add_argument("--restore", action="store_true")
    args = parser.parse_args()
    rows = rows_of_the_table()
    if not args.exercise:
        return list_exercises(rows)
    chosen = [row for row in rows if args.exercise in (word_of(row), row.function)]
    if not chosen:
        sys.exit(f"no exercise is called {args.exercise}: see `python tests/exercises.py`")
    row = chosen[0]
    script = ROOT / row.script
    backup = ROOT / f"{row.script}.before_{word_of(row)}"
    action = show_solution if args.solution else restore if args.restore else begin
    try:
        action(row, script, backup)
    except (SyntaxError, ValueError) as error:  # the function cannot be found
        way = f" (as it was before: {backup.name})" if backup.exists() else ""
        sys.exit(f"{row.script} cannot be read, or has no {row.function}: {error}{way}")


if __name__ == "__main__":
    main()
