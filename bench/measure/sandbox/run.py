"""Runs programs that a model wrote, each in a process of its own that can do little: HumanEval, MBPP, small functions.

Each program has limits of time, memory, processes and file size, an empty folder to write in, no environment, no
network, and no files to read but Python's standard library; it and all that it started are killed at its end. What of
that this system can forbid is tried out, not assumed: `claims` has for every claim the attempts that would break
it, and `forbidden` makes them and says how it went. The layers (`sandbox.jail`; `sandbox.warden` watches from outside):

- Linux as root, or where users may make namespaces: a root of its own that is read-only but for /tmp in memory, without
  network, processes or System V memory of others; as root also another user. Killing its first process kills all.
- Linux without namespaces, as in most containers: landlock (what files hold), another user where this one is root, and
  a reaper that orphans come to. That other files and processes are there can be seen.
- Both: seccomp, which refuses sockets, signals by whatever way, tracing, limits of other processes, and further
  namespaces (x86_64, aarch64); without a root of its own modes, owners, times and attributes of all files. And limits.
- Elsewhere: limits and the process group alone.

A program passes by coming to its end within its limits; leaving early is failing.
"""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import NotAvailable
from bench.measure.sandbox.claims import CLAIMS, attempts, surroundings

SECONDS = 5.0  # of wall clock
MEMORY = 2**30  # bytes of address space, of each process
FILE_BYTES = 2**24  # of each file, and with namespaces of all together
PROCESSES = 16  # and threads
GRACE = 20.0  # seconds until a warden that does not answer is killed
WARDEN = Path(__file__).with_name("warden.py")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program went."""

    passed: bool
    reason: str  # "passed", or why not
    seconds: float  # of wall clock, the jail included
    layers: Mapping[str, bool | str]  # True, or why a layer does not hold


@dataclass(frozen=True, kw_only=True)
class Forbidden:
    """What programs cannot do here, and what they can."""

    forbidden: tuple[str, ...]
    possible: tuple[str, ...]
    missing: Mapping[str, str]  # layers that do not hold here, and why

    def __str__(self) -> str:
        said = f"generated programs cannot {', '.join(self.forbidden)}" if self.forbidden else ""
        if self.possible:
            why = "; ".join(f"{layer}: {reason}" for layer, reason in self.missing.items())
            said += f"{'; ' * bool(said)}they CAN {', '.join(self.possible)}{f' ({why})' * bool(why)}"
        return said


def run(program: str, **limits: Any) -> Outcome:
    """Run one program; `limits` are those of `run_all`, which runs many in less time."""
    return run_all([program], **limits)[0]


def run_all(
    programs: Sequence[str],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    file_bytes: int = FILE_BYTES,
    processes: int = PROCESSES,
    workers: int | None = None,
    python: str = sys.executable,
    without: Sequence[str] = (),
) -> list[Outcome]:
    """Run programs, as many at once as there are processors, and give their outcomes in order.

    `python` is the interpreter; `without` leaves out layers of the jail, for tests. Raises NotAvailable where the jail
    itself does not come up, which says nothing about the programs.
    """
    limits = {
        "seconds": seconds, "memory": memory, "file_bytes": file_bytes, "processes": processes,
        "without": list(without),
    }  # fmt: skip
    waiting, outcomes = iter(list(enumerate(programs))), [None] * len(programs)

    def work() -> None:
        with _Jailer(python, limits) as jailer:
            for place, program in waiting:
                outcomes[place] = jailer.run(program)

    count = min(workers or os.cpu_count() or 1, max(1, len(programs)))
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return outcomes


class _Jailer:
    """A process that jails one program after another, started anew where one broke it."""

    def __init__(self, python: str, limits: Mapping[str, Any]) -> None:
        self._command, self._limits = [python, "-I", "-S", str(WARDEN)], limits
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, program: str) -> Outcome:
        answer = self._ask(program)
        if "broken" in answer:
            answer |= {"why": f"the jail broke: {answer['broken']}", "seconds": 0.0, "layers": {}}
            if "broken" in (again := self._ask("pass")):
                raise NotAvailable(f"programs cannot be run here: the sandbox does not start: {again['broken']}")
        why = answer["why"]
        return Outcome(passed=not why, reason=why or "passed", seconds=answer["seconds"], layers=dict(answer["layers"]))

    def _ask(self, program: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={},
                    cwd="/", start_new_session=True, bufsize=0,
                )  # fmt: skip
            said, until = b"", time.monotonic() + self._limits["seconds"] + GRACE
            try:
                request = {"program": program, "folder": os.path.realpath(folder), **self._limits}
                _send(self._process, json.dumps(request).encode() + b"\n")
                while not said.endswith(b"\n"):
                    if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                        raise OSError("it did not respond in time")
                    if not (piece := os.read(self._process.stdout.fileno(), 65536)):
                        raise OSError("it was killed")
                    said += piece
                return json.loads(said)
            except (OSError, ValueError) as error:
                self._stop()
                return {"broken": str(error)}

    def _stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "_Jailer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def _send(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[process.stdin.write(rest) :]


@functools.cache
def forbidden(*, python: str = sys.executable, without: tuple[str, ...] = ()) -> Forbidden:
    """Attempts everything in `bench.measure.sandbox.claims` and says what is forbidden here. Takes a few seconds.

    Raises NotAvailable where even a harmless program does not pass, since nothing could be scored.
    """
    harmless = run("import math, re, collections, heapq\nassert math.sqrt(4) == 2", python=python, without=without)
    if not harmless.passed:
        raise NotAvailable(f"programs cannot be run here: a harmless one fails with {harmless.reason}")
    with surroundings() as facts:
        limits = {"memory": MEMORY, "file_bytes": FILE_BYTES, "processes": PROCESSES}
        claims, programs = zip(*attempts(limits | facts), strict=True)
        outcomes = run_all(programs, seconds=1.0, python=python, without=without)
    broken = {claim for claim, outcome in zip(claims, outcomes, strict=True) if outcome.passed}
    return Forbidden(
        forbidden=tuple(claim for claim in CLAIMS if claim not in broken),
        possible=tuple(claim for claim in CLAIMS if claim in broken),
        missing={layer: why for layer, why in harmless.layers.items() if why is not True},
    )
