"""The form of the scripts: their sizes, and the text that they share. For those who maintain this, and
not for readers who edit a script. (A line more is no mistake.) So these tests run with CI=1 only."""

import ast
import os
import re
from itertools import combinations

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="the form of the scripts: set CI=1 to check it")

SCRIPTS = ["bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"]
TRAINING_SCRIPTS = SCRIPTS[:3]

# Definitions that may differ between scripts although they have the same name, and why.
MAY_DIFFER = {
    "main": "each script builds and describes its own model",
    "parse_flags": "sample.py takes the names of models, too",
}
MAY_DIFFER_IN_CHAR_GPT = {
    "train": "Muon and Adam, a schedule, the best weights, saving and resuming",
}
MAY_DIFFER_IN_BPE_GPT = {
    "train": "data classes instead of arrays, several processes",
    "GPTConfig": "GPT-2's sizes, and settings of its own",
    "CausalSelfAttention": "keeps keys and values in the cache; PyTorch's own attention",
    "Block": "hands the cache on; PyTorch's own LayerNorm, which char_gpt.py writes out",
    "GPT": "the cache, published weights",
    "generate": "uses the cache",
    "evaluate": "the data makes its own batches, in which not all targets count",
    "make_optimizers": "AdamW alone, for fine-tuning",
    "training_step": "gradient accumulation, several processes",
    "report": "perplexity; several prompts",
    "save": "a run of days notices that another one has replaced its file",
}
EXPLAINED_IN_CHAR_GPT = {"Optimizer", "Adam", "orthogonalize", "Muon"}  # short docstrings in bpe_gpt
MAX_LINES = {"bigram.py": 320, "char_gpt.py": 690, "bpe_gpt.py": 1060, "sample.py": 480}


# The repetition that is the lesson


def source(script):
    return (ROOT / script).read_text(encoding="utf-8")


def without_docstring(script, name):
    """The code of a definition, without docstrings and comments."""
    (node,) = [node for node in ast.parse(source(script)).body if getattr(node, "name", "") == name]
    node.body = node.body[1:] if ast.get_docstring(node) else node.body
    return ast.unparse(node)


def definitions(script):
    """The text of each definition of a script, with its decorators."""
    lines, found = source(script).splitlines(), {}
    for node in ast.parse(source(script)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1 : node.end_lineno]
    return found


def test_what_two_scripts_share_is_the_same_to_the_letter():
    shared = set()
    for name in EXPLAINED_IN_CHAR_GPT:
        ours, theirs = [without_docstring(script, name) for script in ("char_gpt.py", "bpe_gpt.py")]
        assert ours == theirs, f"{name} differs, and not only in its docstring"
    for a, b in combinations(SCRIPTS, 2):
        ours, theirs = definitions(a), definitions(b)
        may_differ = MAY_DIFFER | (MAY_DIFFER_IN_BPE_GPT if "bpe_gpt.py" in (a, b) else {})
        may_differ |= MAY_DIFFER_IN_CHAR_GPT if "char_gpt.py" in (a, b) else {}
        for name in ours.keys() & theirs.keys() - may_differ.keys() - EXPLAINED_IN_CHAR_GPT:
            assert ours[name] == theirs[name], f"{name} differs between {a} and {b}"
            shared.add(name)
    assert {"CharTokenizer", "get_batch", "generate", "evaluate", "replace_file", "restore"} <= shared


def test_what_may_differ_does_differ():
    """So that the lists above, of which each line costs the reader something, stay short."""
    bigram, char, bpe = [definitions(script) for script in TRAINING_SCRIPTS]
    assert all(char[name] != bpe[name] for name in MAY_DIFFER_IN_BPE_GPT)
    assert all(char[name] != bigram[name] for name in MAY_DIFFER_IN_CHAR_GPT)


def test_sections_come_in_the_same_order():
    heading = re.compile(r"^# ---- (.+?) -+$", re.MULTILINE)
    bigram, char, bpe = [heading.findall(source(script)) for script in TRAINING_SCRIPTS]
    assert len(bigram) == 6
    assert bigram == [name for name in char if name != "Optimizers"]
    new = ("Tokens", "Instructions", "Published weights")
    assert char == [name for name in bpe if name not in new]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_its_lines_and_functions_are_too(script):
    lines = source(script).splitlines()
    assert len(lines) <= MAX_LINES[script]
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.FunctionDef):
            limit = 30 if node.name == "train" else 45
            assert node.end_lineno - node.lineno < limit, node.name


def squeezed(text):
    """The lines that do two things at once: several statements, or an assignment of several values
    that is not a swap. (Taking apart a single value, as in `B, T = idx.shape`, is one thing.)"""
    nodes = list(ast.walk(ast.parse(text)))
    starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
    found = [line for line in set(starts) if starts.count(line) > 1]
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            values = sorted(map(ast.unparse, node.value.elts))
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    swap = sorted(map(ast.unparse, target.elts)) == values
                    found += [] if swap else [node.lineno]
    return found


def test_squeezed_lines_are_found():
    assert squeezed("a, b = 1, 2") and squeezed("a = 1; b = 2") and squeezed("x.y, z = f(), g()")
    assert not squeezed("a, b = b, a") and not squeezed("B, T = x.shape") and not squeezed("a = 1, 2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_line_does_two_things_at_once(script):
    assert not squeezed(source(script))


def test_the_readme_counts_the_lines_as_they_are():
    readme = source("README.md")
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\w+\.py\) \| (\d+) \| (\d*)", readme, re.M)
    before = []
    for script, count, new in rows:
        lines = source(script).splitlines()
        assert len(lines) == int(count), script
        assert not new or sum(line not in before for line in lines) == int(new), script
        before = lines
    assert len(rows) == 4
