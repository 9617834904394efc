"""A/B timing: the working tree against a commit, in alternating rounds on this machine.

A ratio to the uncompressed model, recorded at another hour, cannot see a small change: what disturbs a machine (another
processor in the shared cache, another clock) slows the two models by different shares. Two states of the code that run
the *same* recipe are slowed alike. Each is a process of its own, since one process can hold only one state of a module;
where a process finds its memory decides over some tenths of a percent of its times, so a second look is taken by new
ones.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import bench
from bench.errors import BaselineError, BenchError, NotAvailable, OptionError
from bench.machine import git as repository
from bench.machine.environment import child_environment
from bench.measure.generation import Load, Round

CODE = ("bench", "compression")
PAIRS = 3  # of processes that share the rounds of a further look
_ROOT = Path(bench.__file__).resolve().parents[1]
_CHILD = Path(__file__).with_name("side.py")


class Commit:
    """The code of a commit, in a temporary folder until `close`.

    Attributes:
        name: the commit's first 12 digits.
        folder: what PYTHONPATH must name.
        root: the same of this code.

    Raises:
        OptionError: this code is in no git repository, or that does not know the commit.
    """

    def __init__(self, revision: str):
        self.root = root = _ROOT
        self._held = ExitStack()
        try:
            self.name = repository.resolved(revision, root)
            self.folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            for package in CODE:
                (self.folder / package).mkdir()
                repository.export(self.name, root / package, self.folder / package)
        except BaselineError as error:
            self.close()
            raise OptionError(
                f"--against {revision}: {error}; the benchmarks must be run from a clone of their own repository, "
                f"which holds the code of the commit (this code is in {root})"
            ) from None

    def close(self) -> None:
        """Remove the folder."""
        self._held.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides generate with.

    Attributes:
        recipe: text, None for the uncompressed model.
        folders: where each side's compressed model lies, this code's first; a side makes its own if it is not there.
            None for the uncompressed model.
    """

    base: str
    recipe: str | None
    folders: tuple[Path | None, Path | None]
    device: str
    seed: int
    calibration: str | None
    load: Load
    mode: str
    warmup: int

    def given(self, side: int) -> dict[str, Any]:
        """What the process of a side is told, as JSON knows it."""
        table = dataclasses.asdict(self)
        folder = table.pop("folders")[side]
        return table | {"folder": folder and str(folder)}


class Process:
    """One side: a process that generates."""

    def __init__(self, code: Path, given: Mapping[str, Any]):
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        paths = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            text=True, env=child_environment(PYTHONPATH=paths),
        )  # fmt: skip
        self._ask(given)

    def ready(self) -> Self:
        """Wait until it can generate.

        Raises:
            NotAvailable: its code knows no such recipe.
            BenchError: anything else hinders it.
        """
        answer = self._answer()
        if "error" in answer:
            raise (NotAvailable if answer["kind"] == "RecipeError" else BenchError)(answer["error"])
        return self

    def round(self, number: int) -> Round:
        self._ask(number)
        answer = self._answer()
        if "error" in answer:
            raise BenchError(answer["error"])
        return Round(**answer | {name: tuple(answer[name]) for name in ("steps_s", "waits_s")})

    def _ask(self, what: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` tells why

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        words = " | ".join(self._said.read().decode(errors="replace").strip().splitlines()[-3:])
        raise BenchError(f"a generating process ended with status {self._process.returncode}: {words or 'no message'}")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


class Beside:
    """Rounds of one job by this code and by that of a commit.

    Attributes:
        rounds: those of this code and of the commit's; equally many, with equal prompts at equal places.
    """

    def __init__(self, job: Job, commit: Commit):
        self._job, self._codes = job, (commit.root, commit.folder)
        self._commit = commit.name
        self.rounds: tuple[list[Round], list[Round]] = ([], [])

    def run(self, rounds: int, seconds: float) -> None:
        """Complete both sides to `rounds`, by new processes; to fewer where `seconds` are over before the last of them.

        Raises:
            NotAvailable: the commit does not know the recipe.
            BenchError: a side fails, this code's in whatever way.
        """
        end = time.monotonic() + seconds
        missing = rounds - len(self.rounds[0])
        pairs = 1 if not self.rounds[0] else min(PAIRS, missing)
        for pair in range(pairs):
            if pair and time.monotonic() > end:
                break
            self._turns(missing * (pair + 1) // pairs - missing * pair // pairs, first=pair % 2)

    def _turns(self, rounds: int, first: int) -> None:
        with ExitStack() as held:
            sides = []
            for side, code in enumerate(self._codes):
                process = Process(code, self._job.given(side))
                held.callback(process.close)
                sides.append(process)
            for side, process in enumerate(sides):
                try:
                    process.ready()
                except BenchError as error:
                    whose = f"the code of {self._commit}" if side else "this code"
                    kind = NotAvailable if side and isinstance(error, NotAvailable) else BenchError
                    raise kind(f"{whose} cannot make it: {error}") from None
            for _ in range(rounds):
                number = len(self.rounds[0])
                pair = {side: sides[side].round(number) for side in (first, 1 - first)}
                told = all(each.waits_s for each in pair.values())  # older code does not know them
                for side, each in pair.items():
                    self.rounds[side].append(each if told else dataclasses.replace(each, waits_s=()))
