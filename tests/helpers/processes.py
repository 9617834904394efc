"""Child processes of tests: each ends with the test that started it, and no fixed number of seconds decides one.

A child is waited for as long as it takes. What guards against one that hangs is counted in units of this machine: the
time of one import in a new Python, measured when something takes long, and anew before it is given up.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import compression

REPOSITORY = Path(compression.__file__).parents[1]
HELPERS = Path(__file__).parent
UNIT = "import numpy, pytest"  # a third of a second on an idle machine, and a hundredth of what a dear child takes
UNITS = 1000  # a mere guard: ten times what the dearest child of all takes
QUIET_S = 60  # less than UNITS of any machine


def unit_s() -> float:
    """Seconds that one import takes in a new Python, now."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", UNIT], check=True)
    return time.monotonic() - start


class Guard:
    """Says whether something has hung: it took UNITS imports, at the slowest that the machine was asked for one.

    The machine is asked when QUIET_S are over, so that what is waited for is looked at without delay until then.
    """

    def __init__(self) -> None:
        self._start, self._patience_s = time.monotonic(), QUIET_S

    @property
    def left_s(self) -> float:
        """Seconds until it is worth asking again."""
        return self._start + self._patience_s - time.monotonic()

    def hung(self) -> bool:
        if self.left_s > 0:
            return False
        self._patience_s = max(self._patience_s, UNITS * unit_s())
        return self.left_s <= 0

    def check(self, what: object) -> None:
        """Fail the test that waits for `what` if it has hung."""
        assert not self.hung(), f"{what} hangs: it took longer than {UNITS} imports of numpy and pytest"


def environment(**more: object) -> dict[str, str]:
    """Variables for a Python that can import this repository and the helpers of the tests; `more` are added."""
    folders = [str(REPOSITORY), str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | {name: str(value) for name, value in more.items()}


@contextmanager
def running(command, **options):
    """A child process; after the block the child, and whatever it started, has ended, whichever way the test goes."""
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


def completed(command, *, check=False, input=None, text=True, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` with its output captured, of a child that ends with the test and may take what it takes."""
    pipes = {name: subprocess.PIPE for name in ("stdout", "stderr") if name not in options}
    pipes["stdin"] = subprocess.PIPE if input is not None else subprocess.DEVNULL
    guard = Guard()
    with running(command, text=text, **pipes | options) as child:
        while True:
            try:
                output, errors = child.communicate(input, timeout=max(guard.left_s, 0.1))
                break
            except subprocess.TimeoutExpired:
                guard.check(command)
                input = None  # it was handed over already
    done = subprocess.CompletedProcess(child.args, child.returncode, output, errors)
    if check and done.returncode:
        raise AssertionError(f"{child.args} ended with {done.returncode}\n{output or ''}\n{errors or ''}")
    return done


def python(code, *arguments, **options) -> subprocess.CompletedProcess:
    """What `completed` gives of Python code; without `env` it can import this repository and the helpers."""
    return completed([sys.executable, "-c", code, *arguments], **{"env": environment()} | options)


def wait_until(reached, child=None):
    """Wait for as long as it takes; a child that ends before can reach nothing any more, and is the failure."""
    guard = Guard()
    while not reached():
        ended = child and child.poll()
        assert ended is None or reached(), f"it ended with {ended} before"
        guard.check("what is waited for")
        time.sleep(0.005)


def killed_at(number, code, *arguments):
    """Run Python code that prints how far it is, a number a line, and kill -9 it once it says `number`.

    The code can import the helpers; what it prints `number` before it must not get past `sys.stdin.read()`.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with running([sys.executable, "-c", code, *arguments], env=environment(), **pipes) as child:
        while int(child.stdout.readline()) < number:
            pass
        child.send_signal(signal.SIGKILL)
        assert -signal.SIGKILL == child.wait()
