"""Runs `python SCRIPT FLAGS...` as often as it is asked to, without the seconds of `import torch`
each time: it imports torch once, and each script runs in a fork. Requests and answers are lines of
JSON. Started by conftest.py."""

import json
import os
import runpy
import sys
import tempfile
import traceback

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch  # noqa: F401


def child(command, cwd, environment, files):
    """What `python COMMAND...` does, from a fresh start but for the packages imported above."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in zip((1, 2), files):
        os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    sys.argv = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    status = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):  # as Python does
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    command, cwd, environment = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        pid = os.fork()
        if pid == 0:
            child(command, cwd, environment, (out, error))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for file in (out, error):
            file.seek(0)
        print(json.dumps([status, out.read().decode(), error.read().decode()]), flush=True)
