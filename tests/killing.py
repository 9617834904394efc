"""Real processes that are really killed, and end with the test that started them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import compression


@contextmanager
def running(command, **options):
    """A child process; behind it the child, and whatever it started, has ended, whichever way the test goes on."""
    child = subprocess.Popen(list(map(str, command)), start_new_session=True, **options)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout, child.stderr)):
            with suppress(BrokenPipeError):
                pipe.close()


def wait_until(reached, child):
    """Wait for as long as it takes; a child that ends before can reach nothing any more, and is the failure."""
    while not reached():
        ended = child.poll()
        assert ended is None or reached(), f"it ended with {ended} before"
        time.sleep(0.005)


def killed_at(number, code, *arguments):
    """Run Python code that prints how far it is, a number a line, and kill -9 it once it says `number`.

    The code can import the tests; what it prints `number` before it must not get past `sys.stdin.read()`.
    """
    folders = [str(Path(compression.__file__).parents[1]), str(Path(__file__).parent)]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    with running(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        while int(child.stdout.readline()) < number:
            pass
        child.send_signal(signal.SIGKILL)
        assert -signal.SIGKILL == child.wait()
