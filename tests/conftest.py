"""What the tests share: the scripts on the path, and a way to run them as a user does."""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The models are tiny: a second thread would only be waited for. (Before torch is imported.)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background ignores Ctrl-C, and so would the runs that are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import bpe_gpt  # noqa: E402


def load_script(name):
    """A script of data/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


hugging_face = load_script("hugging_face")
instruct = load_script("instruct")

SHAKESPEARE = ROOT / "data" / "tinyshakespeare.txt"
PLAY = ROOT / "data" / "the-glass-harbour.txt"

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(),
    reason="data/tinyshakespeare.txt is not there: run bigram.py once, with a network",
)


def has_gpt2_tokenizer():
    try:
        return bpe_gpt.gpt2_tokenizer()
    except OSError:
        return None


needs_gpt2_tokenizer = pytest.mark.skipif(
    not has_gpt2_tokenizer(), reason="GPT-2's vocabulary cannot be had: no network, no copy of it"
)


@functools.cache
def runner():
    """The process that runs scripts for run(), where there is fork()."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "tools" / "runner.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
    )


def without_gpu(**more):
    """The environment of a run that is to find no CUDA GPU. (Where it finds one, it compiles its
    model for a minute, and adds up in another order.)"""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **more}


def run(*command, cwd, status=0, fresh=not hasattr(os, "fork"), env=None):
    """Run `python COMMAND...` in the folder cwd, without a GPU unless env says otherwise; fresh: in
    a Python of its own. Returns (standard output, standard error)."""
    command = [str(word) for word in command]
    env = without_gpu(**(env or {}))
    if fresh:
        command = [sys.executable, *command]
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL)
        code, out, error = done.returncode, done.stdout, done.stderr
    else:
        print(json.dumps([command, str(cwd), env]), file=runner().stdin, flush=True)
        code, out, error = json.loads(runner().stdout.readline())
    assert code == status, out + error
    return out, error


def one_line_error(script, *flags, cwd):
    """Run a script with a user's mistake. It must end with status 1 and one line on standard error,
    which is returned."""
    lines = run(script, *flags, cwd=cwd, status=1)[1].splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A folder with what a fresh clone has, in which the real command line of each training script
    has made a checkpoint: a small one, of the shipped text."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("bigram.py", "char_gpt.py", "bpe_gpt.py", "sample.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    (folder / "logs").mkdir()
    shutil.copy(PLAY, folder / "data")
    for name in ("hugging_face.py", "instruct.py", "evaluate.py"):
        shutil.copy(ROOT / "data" / name, folder / "data")
    small = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --max_iters 60 --eval_interval 30 "
    small += "--warmup_iters 5 --learning_rate 0.01"
    bpe = small + " --vocab_size 300 --total_batch_size 512 --batch_size 8"
    for script, flags in (("bigram", "--max_iters 200"), ("char_gpt", small), ("bpe_gpt", bpe)):
        output, error = run(
            f"{script}.py", "--data", "data/the-glass-harbour.txt", *flags.split(), cwd=folder,
            fresh=True)
        assert error == ""
        (folder / "logs" / f"{script}.txt").write_text(output, encoding="utf-8")
        os.utime(folder / "out" / f"{script}.pt")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """When a learner's own code ends with an error, the report of an exercise is three lines: the
    error, the line, and the input of the function; not the lines of the test."""
    report = yield
    if report.when != "call" or call.excinfo is None or item.path.name != "test_exercises.py":
        return report
    mine = [entry for entry in call.excinfo.traceback if Path(entry.path).parent in (ROOT, ROOT / "data")]
    if mine:
        entry = mine[-1]
        code = entry.frame.code.raw
        names = code.co_varnames[: code.co_argcount]
        values = [(name, entry.frame.f_locals.get(name)) for name in names]
        report.longrepr = (
            f"{call.excinfo.exconly()}\n"
            f"in {Path(entry.path).name}, line {entry.lineno + 1}: {str(entry.statement).strip()}\n"
            f"input: {', '.join(f'{name} {brief(value)}' for name, value in values)}")
    return report


def brief(value):
    """A value in a few words: of a large tensor, the shape."""
    shape = getattr(value, "shape", None)
    text = " ".join(repr(value).split())
    if shape is not None and len(text) > 60:
        return f"of the shape {tuple(shape)}"
    return f"= {text}" if len(text) <= 60 else f"({type(value).__name__})"
