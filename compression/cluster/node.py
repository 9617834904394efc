"""What runs in Ray's workers: our commands, each a process of its own.

These functions travel to a node with the task and need nothing there but Python, so that a node on which the package
is missing can say so. A process that measures is kept for the next task of the same worker, and ends with the worker.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

CHANNEL = "COMPRESSION_CHANNEL"  # variable: the file descriptor of the socket to who started this process
_TAIL = 3000  # bytes of what a process printed, for the message of its end
_kept: dict[str, Any] = {}


def complete(arguments: Sequence[str], folder: str, environment: Mapping[str, str], given: str = "") -> dict[str, Any]:
    """Run Python to its end: its exit `status` (negative: the signal that ended it), `output` and `errors`.

    A folder that is not there, or a Python that does not start, has words in `errors` and the status 127.
    """
    mine, theirs = socket.socketpair()
    with mine, theirs:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, input=given, capture_output=True, text=True, check=False,
                env={**os.environ, **environment, CHANNEL: str(theirs.fileno())}, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        except OSError as error:
            return {"status": 127, "output": "", "errors": str(error)}
    return {"status": done.returncode, "output": done.stdout, "errors": done.stderr}


def complete_or_raise(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """As `complete`; ChildProcessError, upon which Ray tries again, where a signal ended the process."""
    done = complete(arguments, folder, environment)
    if done["status"] < 0:
        raise ChildProcessError(f"the process was ended by signal {-done['status']}\n{done['errors'][-_TAIL:]}")
    return done


class Kept:
    """A process that is asked for one thing after another by lines on its channel, and answers by lines of JSON."""

    def __init__(self, arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
        mine, theirs = socket.socketpair()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=self._printed,
                stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()],
                env={**os.environ, **environment, CHANNEL: str(theirs.fileno())},
            )  # fmt: skip
        with mine:
            self._asking, self._answers = mine.makefile("w", encoding="utf-8"), mine.makefile(encoding="utf-8")

    def asked(self, name: str) -> Iterator[Any]:
        """Its answers to one line, until it says that this is finished.

        Raises ChildProcessError where it ends before.
        """
        try:
            self._asking.write(f"{name}\n")
            self._asking.flush()
            for line in self._answers:
                answer = json.loads(line)
                if answer == {"finished": name}:
                    return
                yield answer
        except OSError:
            pass
        words = self._ended()
        self.close()
        raise ChildProcessError(words)

    def close(self) -> None:
        """Have it end, and wait for that."""
        with suppress(BrokenPipeError):  # of a line that it was not alive to read
            self._asking.close()
        self._answers.close()
        self._process.wait()
        self._printed.close()

    def _ended(self) -> str:
        status = self._process.wait()
        self._printed.seek(max(0, self._printed.seek(0, os.SEEK_END) - _TAIL))
        words = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
        return f"{words}; the last that it printed:\n{self._printed.read().decode(errors='replace')}"


def ask_kept(name: str, start: tuple[Sequence[str], str, Mapping[str, str]], told: Any, keep: bool) -> list[Any]:
    """Have the process of this worker do one thing: all its answers.

    `told`, the actor of a queue, gets (name, answer) of each at once, the start before them. It is not waited for: Ray
    would give the CPUs of a task that waits to another one.

    Raises ChildProcessError where the process ends; the next call starts another.
    """
    told.put_nowait.remote((name, {"started": f"{platform.node()}, process {os.getpid()}"}))
    if "process" not in _kept:
        _kept["process"] = Kept(*start)
    answers = []
    try:
        for answer in _kept["process"].asked(name):
            answers.append(answer)
            told.put_nowait.remote((name, answer))
    except ChildProcessError:
        del _kept["process"]
        raise
    if not keep:
        _kept.pop("process").close()
    return answers
