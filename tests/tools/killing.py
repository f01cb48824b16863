"""Trains with a script's real main(), in processes that are killed (SIGKILL) at random moments and
resumed, until there were enough kills; prints how many there were. Used by test_trust.py, and by
hand for longer runs, here with 100 kills:

    python tests/tools/killing.py char_gpt 100 out/x.pt --n_layer 1 --max_iters 40 --eval_interval 4

The file must end as out/whole-x.pt, that of a run which nobody disturbed, or the program ends with
an error. Each run is a fork of this process, to save the seconds of `import torch`.
"""

import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def start(script, flags):
    """Run the script's main() in a new process. Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.argv = [f"{script.__name__}.py", *flags]
    status = 1
    try:
        torch.set_num_threads(1)
        script.main()
        status = 0
    finally:
        os._exit(status)


def same(a, b):
    """Whether two checkpoints are the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(name, n_kills, out, *flags):
    script, out = importlib.import_module(name), Path(out)
    whole = out.with_name(f"whole-{out.name}")
    started = time.perf_counter()
    assert os.waitpid(start(script, [*flags, "--out", str(whole)]), 0)[1] == 0
    seconds = time.perf_counter() - started
    rng, kills, ends = random.Random(0), 0, 0
    while kills < int(n_kills) or not out.exists():
        out.unlink(missing_ok=True)
        done = False
        while not done:
            resume = ["--resume"] if out.exists() else []
            pid = start(script, [*flags, "--out", str(out), *resume])
            if kills < int(n_kills):
                time.sleep(rng.uniform(0, 0.8 * seconds))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            assert status in (0, signal.SIGKILL), status
            kills += status == signal.SIGKILL
            if out.exists():  # a run can be killed after its last save, too
                checkpoint = torch.load(out, weights_only=True)
                done = checkpoint["last"]["step"] == checkpoint["config"]["max_iters"]
        ends += 1
        a, b = [torch.load(path, weights_only=True) for path in (whole, out)]
        for part in ("config", "vocab", "history", "model", "last"):
            for checkpoint in (a, b):
                checkpoint["config"].update(out="", resume=False)
                checkpoint["last"]["seconds"] = 0
            assert same(a[part], b[part]), f"{part} is not the same"
    print(f"{kills} kills, {ends} runs to the end, each the same to the last bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
