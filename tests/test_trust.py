"""Training that can be trusted: killed at any moment, short of disk, in several processes."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLAY, ROOT, one_line_error, run

import bpe_gpt
import char_gpt

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for processes")

CHAR = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 8 --dropout 0.2 "
CHAR += "--max_iters 60 --eval_interval 5 --warmup_iters 4 --offline --data play.txt"
BPE = CHAR.replace("--batch_size 8", "--batch_size 3 --total_batch_size 128")
SCRATCH = BPE + " --init scratch --learned_vocab_size 300"
TUNING = BPE.replace("--n_layer 1 --n_head 2 --n_embd 16 ", "") + " --init model"


@pytest.fixture
def folder(tmp_path):
    """A short text, and a model that can be fine-tuned."""
    text = PLAY.read_text(encoding="utf-8")[:4000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    tokenizer = bpe_gpt.train_bpe(text, 300)
    torch.manual_seed(0)
    config = bpe_gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=32)
    bpe_gpt.export(bpe_gpt.GPT(config), tokenizer, tmp_path / "model")
    return tmp_path


# ---------------------------------------------------------------------------------------------
# Killed, stopped, resumed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(folder):
    """A model of characters, one of tokens, and one that is fine-tuned, killed 7 times each."""
    harness = [sys.executable, ROOT / "tests" / "killing.py"]
    runs = ("char_gpt 7 a.pt", CHAR), ("bpe_gpt 7 b.pt", SCRATCH), ("bpe_gpt 7 c.pt", TUNING)
    for run in [
        subprocess.Popen(
            [*harness, *what.split(), *flags.split()],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )
        for what, flags in runs
    ]:  # fmt: skip
        output, error = run.communicate(timeout=150)
        assert run.returncode == 0 and error == "", error
        assert int(output.split()[0]) >= 7
    assert not list(folder.glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize("script, flags", [("char_gpt", CHAR), ("bpe_gpt", SCRATCH)])
def test_sigterm_saves_and_says_how_to_go_on(folder, script, flags):
    flags = flags.replace("--max_iters 60 --eval_interval 5", "--max_iters 100000")
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / f"{script}.py", *flags.split(), "--out", "x.pt"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("at this speed"):
            break
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert f"to go on: python {script}.py --resume --out x.pt" in output
    assert torch.load(folder / "x.pt", weights_only=True)["last"]["step"] >= 11


@pytest.mark.parametrize("script, flags", [("char_gpt", CHAR), ("bpe_gpt", SCRATCH)])
def test_what_would_make_another_run_of_it_is_refused_on_resuming(folder, script, flags):
    few = flags.replace("--max_iters 60", "--max_iters 5")
    path = ROOT / f"{script}.py"
    run(path, *few.split(), "--out", "x.pt", cwd=folder)
    before = (folder / "x.pt").read_bytes()
    (folder / "other.txt").write_text("Another text. " * 300, encoding="utf-8")
    mistakes = ["--n_layer 2", "--n_embd 32", "--block_size 8", "--seed 2", "--data other.txt"]
    if script == "bpe_gpt":
        mistakes += ["--total_batch_size 64", "--stride 4", "--muon_learning_rate 0"]
        mistakes += ["--tokenizer gpt2", "--learned_vocab_size 280", "--no-tied", "--init gpt2"]
    for mistake in mistakes:
        go_on = f"--resume --out x.pt --offline {mistake}".split()
        error = one_line_error(path, *go_on, cwd=folder)
        assert mistake.split()[0].replace("no-", "") in error, error
    assert "--max_iters" in one_line_error(path, "--resume", "--out", "x.pt", cwd=folder)
    assert (folder / "x.pt").read_bytes() == before
    changes = "--resume --out x.pt --max_iters 9 --learning_rate 0.003 --offline"
    output, _ = run(path, *changes.split(), cwd=folder)
    assert "--max_iters changes from 5 to 9" in output
    assert re.search(r"--learning_rate changes from 0\.00\d to 0\.003", output)
    assert "going on after step 5" in output and "step 9/9" in output


# ---------------------------------------------------------------------------------------------
# When things go wrong


@linux
@pytest.mark.parametrize("script", ["bigram", "char_gpt", "bpe_gpt"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(folder, script):
    flags = {"bigram": "--max_iters 5 --data play.txt", "char_gpt": CHAR, "bpe_gpt": SCRATCH}
    command = [f"{script}.py", *flags[script].split(), "--out", "x.pt", "--max_iters", "5"]
    (folder / "x.pt").write_bytes(b"what was there before")
    code = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # no file may become larger
sys.argv = {command}
runpy.run_path({str(ROOT / command[0])!r}, run_name="__main__")
"""
    _, error = run("-c", code, cwd=folder, status=2)
    assert re.search(r"cannot save x.pt \((File too large|is the disk full\?)\)", error)
    assert error.count("\n") == 1
    assert (folder / "x.pt").read_bytes() == b"what was there before"
    assert not (folder / "x.pt.tmp").exists()


def test_what_a_killed_run_left_half_written_goes(folder):
    (folder / "x.pt.tmp").write_bytes(b"half a checkpo")
    bpe_gpt.check_writable(folder / "x.pt")
    assert not (folder / "x.pt.tmp").exists()


@pytest.mark.parametrize("script, flags", [("char_gpt", CHAR), ("bpe_gpt", SCRATCH)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_step_is_made_by_a_number_that_is_not_finite(folder, monkeypatch, script, flags, what):
    module = {"char_gpt": char_gpt, "bpe_gpt": bpe_gpt}[script]
    steps = []

    def spoil(parameters, length):
        steps.append(1)
        return torch.tensor(math.inf if what == "gradient" and len(steps) == 8 else 1.0)

    def forward(self, idx, targets=None, **others):
        logits, loss = plain_forward(self, idx, targets, **others)
        spoilt = what == "loss" and self.training and len(steps) == 7
        return logits, loss * math.nan if spoilt else loss

    plain_forward = module.GPT.forward
    monkeypatch.setattr(module.nn.utils, "clip_grad_norm_", spoil)
    monkeypatch.setattr(module.GPT, "forward", forward)
    monkeypatch.setattr(sys, "argv", ["x", *flags.split(), "--out", "x.pt"])
    monkeypatch.chdir(folder)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ValueError, match=f"the {what} became .* in step 8 .*x.pt.*learning_rate"):
        module.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    saved = torch.load(folder / "x.pt", weights_only=True)
    assert saved["last"]["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["last"]["model"].values())


# ---------------------------------------------------------------------------------------------
# Several processes

STEPS = SCRATCH.replace("--dropout 0.2", "--dropout 0 --dtype float32 --muon_learning_rate 0")
STEPS = STEPS.replace("--max_iters 60", "--max_iters 20")


def torchrun(n, *flags, cwd, restarts=0):
    """Starts bpe_gpt.py in n processes, as on a machine with n GPUs."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [f"--max-restarts={restarts}", str(ROOT / "bpe_gpt.py"), *flags]
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def history(path):
    return torch.load(path, weights_only=True)["history"]


def close(a, b):
    return all(x == pytest.approx(y, abs=1e-5) for x, y in zip(a, b, strict=True))


@linux
def test_two_processes_train_as_one_and_either_resumes_the_other(folder):
    run(ROOT / "bpe_gpt.py", *STEPS.split(), "--out", "one.pt", cwd=folder)
    process = torchrun(2, *STEPS.split(), "--out", "two.pt", "--max_iters", "20", cwd=folder)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert output.count("step 20/20") == 1, "the first process alone prints"
    assert close(history(folder / "two.pt"), history(folder / "one.pt"))
    # One process goes on with what two have begun.
    shutil.copy(folder / "two.pt", folder / "mixed.pt")
    for name in ("one.pt", "mixed.pt"):
        go_on = f"--resume --out {name} --max_iters 25 --offline"
        run(ROOT / "bpe_gpt.py", *go_on.split(), cwd=folder)
    assert close(history(folder / "mixed.pt"), history(folder / "one.pt"))


def workers(pid):
    """The processes that process `pid` has started."""
    started = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                started.append(int(stat.parent.name))
        except OSError:
            pass  # it has ended meanwhile
    return started


@linux
def test_when_a_process_is_killed_torchrun_goes_on_from_the_checkpoint(folder):
    flags = STEPS.replace("--max_iters 20 --eval_interval 5", "--max_iters 400 --eval_interval 100")
    run(ROOT / "bpe_gpt.py", *flags.split(), "--out", "one.pt", cwd=folder)
    process = torchrun(2, *flags.split(), "--out", "two.pt", cwd=folder, restarts=3)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 100/400"):
            os.kill(workers(process.pid)[-1], signal.SIGKILL)
            break
    output += process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert "going on after step" in output and "Traceback" not in output
    ours, theirs = history(folder / "two.pt"), history(folder / "one.pt")
    assert [row[0] for row in ours] == [100, 200, 300, 400]
    assert all(a[2] == pytest.approx(b[2], abs=2e-3) for a, b in zip(ours, theirs))


@linux
def test_more_processes_than_sequences_are_refused(folder):
    process = torchrun(2, *STEPS.split(), "--total_batch_size", "16", cwd=folder)
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert "error: --total_batch_size has 1 sequences" in output


@linux
def test_a_restart_does_not_go_on_with_another_run(folder):
    """The file at --out may be yesterday's: torchrun's name for the run, in the file, tells."""
    run(ROOT / "bpe_gpt.py", *STEPS.split(), "--out", "mine.pt", "--seed", "7", cwd=folder)
    process = torchrun(1, *STEPS.split(), "--out", "mine.pt", cwd=folder, restarts=1)
    output, killed = "", False
    for line in process.stdout:
        output += line
        if line.startswith("before training") and not killed:  # before it has saved anything
            os.kill(workers(process.pid)[-1], signal.SIGKILL)
            killed = True
    assert process.wait(timeout=100) == 0, output
    assert output.count("before training") == 2 and "going on" not in output
    assert torch.load(folder / "mine.pt", weights_only=True)["config"]["seed"] == 1337
