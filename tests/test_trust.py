"""Training that can be trusted: killed at any moment, short of disk, in several processes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import PLAY, ROOT, run, without_gpu

import bpe_gpt

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for processes")

CHAR = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 8 "
CHAR += "--max_iters 60 --eval_interval 5 --warmup_iters 4 --data play.txt"
BPE = CHAR.replace("--batch_size 8", "--batch_size 3 --total_batch_size 128 --dropout 0.2")
SCRATCH = BPE + " --vocab_size 300"
TUNING = BPE.replace("--n_layer 1 --n_head 2 --n_embd 16 ", "") + " --init model.pt"


@pytest.fixture
def folder(tmp_path):
    """A short text, and a model that can be fine-tuned."""
    text = PLAY.read_text(encoding="utf-8")[:4000]
    (tmp_path / "play.txt").write_text(text, encoding="utf-8")
    tokenizer = bpe_gpt.train_bpe(text, 300)
    torch.manual_seed(0)
    config = bpe_gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=300, block_size=32)
    tokens = tokenizer.tokens
    checkpoint = dict(
        written_by="bpe_gpt", config=vars(config), vocab=tokens, text_before="\n")
    torch.save(checkpoint | {"model": bpe_gpt.GPT(config).state_dict()}, tmp_path / "model.pt")
    return tmp_path


# Killed, resumed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(folder):
    """A model of characters, one of tokens, and one that is fine-tuned, killed 3 times each."""
    harness = [sys.executable, ROOT / "tests" / "tools" / "killing.py"]
    runs = ("char_gpt 3 a.pt", CHAR), ("bpe_gpt 3 b.pt", SCRATCH), ("bpe_gpt 3 c.pt", TUNING)
    for process in [
        subprocess.Popen(
            [*harness, *what.split(), *flags.split()],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env=without_gpu(),
        )
        for what, flags in runs
    ]:
        output, error = process.communicate()
        assert process.returncode == 0 and error == "", error
        assert int(output.split()[0]) >= 3


# When things go wrong


@linux
@pytest.mark.parametrize("script", ["char_gpt", "bpe_gpt"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(folder, script):
    flags = {"char_gpt": CHAR, "bpe_gpt": SCRATCH}
    command = [f"{script}.py", *flags[script].split(), "--out", "x.pt", "--max_iters", "5"]
    (folder / "x.pt").write_bytes(b"what was there before")
    (folder / "limited.py").write_text(f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # no file may become larger
sys.argv = {command}
runpy.run_path({str(ROOT / command[0])!r}, run_name="__main__")
""")
    _, error = run("limited.py", cwd=folder, status=1)
    assert re.fullmatch(r"error: .*(disk full|too large).*\n", error)
    assert (folder / "x.pt").read_bytes() == b"what was there before"
    assert not list(folder.glob("x.pt.*")), "nothing half written is left"


# Several processes

STEPS = SCRATCH.replace("--dropout 0.2", "--dropout 0 --dtype float32 --muon_learning_rate 0")
STEPS = STEPS.replace("--max_iters 60", "--max_iters 20")


def torchrun(n, *flags, cwd, restarts=0):
    """Starts bpe_gpt.py in n processes, as on a machine with n GPUs. They are stopped if they still
    wait for each other after ten minutes."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [f"--max-restarts={restarts}", str(ROOT / "bpe_gpt.py"), *flags]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", env=without_gpu(OMP_NUM_THREADS="1"),
    )
    timer = threading.Timer(600, process.terminate)
    timer.daemon = True
    timer.start()
    return process


def history(path):
    return torch.load(path, weights_only=True)["history"]


def close(a, b):
    return all(x == pytest.approx(y, abs=1e-5) for x, y in zip(a, b, strict=True))


@linux
@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_train_as_one_and_one_resumes_them(folder, n):
    """The sum of the gradients of their rows is the gradient of the whole step."""
    run(ROOT / "bpe_gpt.py", *STEPS.split(), "--out", "one.pt", cwd=folder)
    process = torchrun(n, *STEPS.split(), "--out", "many.pt", cwd=folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    for line in ("settings that are not", " parameters, on", "steps 0 to 20 of ", "step 20:", "best val"):
        assert output.count(line) == 1, "the first process alone prints"
    assert close(history(folder / "many.pt"), history(folder / "one.pt"))
    for name in ("one.pt", "many.pt") if n == 2 else ():
        go_on = f"--resume --out {name} --max_iters 25"
        run(ROOT / "bpe_gpt.py", *go_on.split(), cwd=folder)
        assert close(history(folder / name), history(folder / "one.pt"))


@linux
def test_a_second_machine_needs_no_text_and_no_checkpoint_of_its_own(folder, tmp_path):
    """The first process reads them, and sends what it has read to the others."""
    flags = STEPS.replace("--data play.txt", "").split()
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        (machine / "data").mkdir(parents=True)
        shutil.copy(ROOT / "bpe_gpt.py", machine)
    text = (folder / "play.txt").read_text(encoding="utf-8")
    (machines[0] / "data" / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    for more in ("--max_iters 10", "--resume --max_iters 20"):
        outputs = two_machines(machines, *flags, *more.split())
        assert [status for status, _ in outputs] == [0, 0], outputs
    run(ROOT / "bpe_gpt.py", *STEPS.split(), "--max_iters", "10", "--out", "one.pt", cwd=folder)
    run(ROOT / "bpe_gpt.py", "--resume", "--max_iters", "20", "--out", "one.pt", cwd=folder)
    assert close(history(machines[0] / "out" / "bpe_gpt.pt"), history(folder / "one.pt"))
    assert not (machines[1] / "out" / "bpe_gpt.pt").exists()


@linux
def test_machines_with_different_tokens_are_told_so_and_save_nothing(tmp_path):
    machines = [tmp_path / "first", tmp_path / "second"]
    for i, machine in enumerate(machines):
        (machine / "data").mkdir(parents=True)
        shutil.copy(ROOT / "bpe_gpt.py", machine)
        (machine / "text.txt").write_text("word " * 300 + "other " * i)
    script = (
        "import sys, numpy as np, bpe_gpt\n"
        "words = lambda config, tokenizer: [*[bpe_gpt.TextData(np.frombuffer(open('text.txt', 'rb')"
        ".read(), np.uint8), config) for _ in range(2)], bpe_gpt.train_bpe('', 257)]\n"
        "bpe_gpt.main(words)\n")
    for machine in machines:
        (machine / "own_text.py").write_text(script)
    outputs = two_machines(machines, *STEPS.split(), script="own_text.py")
    assert all(status != 0 for status, _ in outputs)
    assert "UserError: the first process was started with a different text" in outputs[1][1]
    assert not list(tmp_path.glob("*/out/*"))


def two_machines(machines, *flags, script="bpe_gpt.py"):
    """Runs a process in each of two folders, which stand for machines without a common disk.
    Returns (status, output) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, machine in enumerate(machines):
        env = without_gpu(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                          RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
        processes.append(subprocess.Popen(
            [sys.executable, script, *flags], cwd=machine, env=env, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


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
    """--resume is all it takes: it means to go on from the checkpoint, if there is one."""
    flags = STEPS.replace("--max_iters 20 --eval_interval 5", "--max_iters 200 --eval_interval 50")
    run(ROOT / "bpe_gpt.py", *flags.split(), "--out", "one.pt", cwd=folder)
    process = torchrun(2, *flags.split(), "--resume", "--out", "two.pt", cwd=folder, restarts=3)
    output, killed = "", False
    for line in process.stdout:
        output += line
        if line.startswith("step 100:") and not killed:
            os.kill(workers(process.pid)[-1], signal.SIGKILL)
            killed = True
    assert process.wait() == 0, output
    ours, theirs = history(folder / "two.pt"), history(folder / "one.pt")
    assert [row[0] for row in ours] == [50, 100, 150, 200]
    assert all(a[3] == pytest.approx(b[3], abs=2e-3) for a, b in zip(ours, theirs))
    assert output.count("step 50:") == 1, "it did not begin anew"
