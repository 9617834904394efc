"""Real processes that are really killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import compression


def killed_at(number, code, *arguments):
    """Run Python code that prints how far it is, a number a line, and kill -9 it once it says `number`.

    The code can import the tests; what it prints `number` before it must not get past `sys.stdin.read()`.
    """
    folders = [str(Path(compression.__file__).parents[1]), str(Path(__file__).parent)]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        while int(child.stdout.readline()) < number:
            pass
        child.send_signal(signal.SIGKILL)
        assert -signal.SIGKILL == child.wait(timeout=30)
