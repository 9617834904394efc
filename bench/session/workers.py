"""Workers of pytest-xdist: one recipe per worker, one device each, one run from all their rows.

The controller names the run, hands each worker a place (a number that no living worker has), and gives all tests of a
recipe to one worker. Workers measure and write, each to a journal file of its own. When all have ended the controller
reads the journal: it judges, records and reports as a run without workers does. A measurement that was begun and has no
rows killed its worker; the controller gives it rows that say so. What else is measured of that recipe fails at once.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.errors import BenchError, JournalError
from bench.results.journal import new_run, now, read, resume
from bench.results.journal_files import files_of
from bench.session.command_line import options_of
from bench.session.selection import select
from bench.session.session import Workbench
from bench.session.worker_place import KEY, Worker, journal_of
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.session.session import Workbench

GROUPED = "loadgroup"
_HERE = Path(__file__).parents[1]
_KILLED = (
    "the process that measured this was killed, or ended without a message; the lines of pytest-xdist above name the "
    "worker. Often memory ran out (see the system's log), or a driver failed"
)


def asks_for_benchmarks(config: pytest.Config) -> bool:
    """Whether the command line names files of this package."""
    for argument in config.args:
        name = argument.partition("::")[0]
        if config.option.pyargs and name.partition(".")[0] == _HERE.name:
            return True
        path = (config.invocation_params.dir / name).resolve()
        if path == _HERE or _HERE in path.parents:
            return True
    return False


def recipe_in(nodeid: str, recipes: Sequence[str]) -> str | None:
    """The recipe of a test by its id, in which parameters are joined by "-", as are the steps of a recipe.

    >>> recipe_in("bench/test_efficiency.py::test_generation[p-kd-b1-eager]", ["p", "kd", "p-kd"])
    'p-kd'
    """
    given = f"-{nodeid.partition('[')[2].removesuffix(']')}-"
    return max((recipe for recipe in recipes if f"-{recipe}-" in given), key=len, default=None)


class Controller:
    """The plugin of the process that pytest-xdist starts workers from."""

    def __init__(self, config: pytest.Config):
        self._config = config
        self._began = now(journal_of(config))
        self._run: str | None = None
        self._places: dict[Any, int] = {}
        self._told: list[dict[str, Any]] = []
        self._lost = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to start, also one in the place of another that crashed."""
        if self._run is None:
            self._run = self._named_run()
        taken = set(self._places.values())
        self._places[node] = next(place for place in range(len(taken) + 1) if place not in taken)
        grouped = self._config.getvalue("dist") == GROUPED
        told = Worker(self._run, self._began, self._places[node], node.workerinput["workercount"], grouped)
        node.workerinput[KEY] = told._asdict()

    def _named_run(self) -> str:
        journal = journal_of(self._config)
        try:
            if self._config.getoption("--resume"):
                if unfinished := resume(journal):
                    return unfinished.run
            elif files_of(journal) and asks_for_benchmarks(self._config):
                read(journal)  # a damaged one could not be read when all is measured
        except BenchError as error:
            raise pytest.UsageError(terminal(error)) from error
        return new_run()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker ended, by itself or not."""
        self._places.pop(node, None)
        output = getattr(node, "workeroutput", None)
        if output is None:
            self._lost = True
        elif KEY in output:
            self._told.append(json.loads(output[KEY]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if config.getvalue("dist") != GROUPED:
            return None
        from xdist.scheduler import LoadGroupScheduling

        try:
            recipes = [recipe.text for recipe in select(config).recipes]
        except ValueError:  # the workers say it
            recipes = []

        class Scheduling(LoadGroupScheduling):
            """Groups by recipe: the groups of pytest-xdist 3.8 are lost on the way under pytest 9.2.

            And does not run again what a worker crashed in: it would crash the next one, until none is left. Where
            two crash at once, the first to be replaced does not have to wait for the other, nor is that one given tests
            before it has collected any.
            """

            def _split_scope(self, nodeid: str) -> str:
                return recipe_in(nodeid, recipes) or super()._split_scope(nodeid)

            def _reschedule(self, node: Any) -> None:
                if node in self.registered_collections:
                    super()._reschedule(node)

            def remove_node(self, node: Any) -> str | None:
                units = self.assigned_work[node]
                pending = [(unit, test) for unit in units.values() for test, done in unit.items() if not done]
                if not pending:
                    return super().remove_node(node)
                unit, crashed = pending[0]
                unit[crashed] = True
                for scope in [scope for scope, unit in units.items() if all(unit.values())]:
                    del units[scope]
                super().remove_node(node)
                return crashed

        return Scheduling(config, log)

    @property
    def refused(self) -> bool:
        """Whether a worker said that the command cannot be."""
        return any("refused" in each for each in self._told)

    def _left_word(self) -> bool:
        """Whether workers that tell nothing any more were measuring."""
        journal = journal_of(self._config)
        return bool(files_of(journal)) and any(each["run"] == self._run for each in read(journal).records)

    def workbench(self) -> "Workbench | None":
        """The whole run, out of the journal; None where no benchmarks were run. Raises as `Workbench` does."""
        if not (self._told or (self._lost and self._left_word())):
            return None
        workbench = Workbench(options_of(self._config, run=self._run))
        workbench.gather(since=self._began, killed=_KILLED)
        for told in self._told:
            take_over(workbench, told)
        return workbench


class Leaving:
    """The plugin of a worker: a device that is lost to this process may not be lost to another, so that it ends.

    Another worker is started in its place, and the tests that it had still to run are given to all.
    """

    def __init__(self, workbench: "Workbench"):
        self._workbench = workbench

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Behind the last report of the test that found it, which the controller then has."""
        if report.when == "teardown" and self._workbench.lost_device:
            with suppress(Exception):  # of a driver in whatever state: only a temporary folder is at stake
                self._workbench.close()
            os._exit(1)


def told_by(workbench: "Workbench") -> dict[str, Any]:
    """What a worker tells the controller beside what is in the journal, once it has measured a recipe, or all."""
    workbench.release()  # records the last size, unless a test did
    with suppress(JournalError):  # of which the tests spoke
        workbench.write_waiting()
    found = vars(workbench)
    return {
        "kernels": workbench.kernels,
        "steps": workbench.steps,
        "notes": workbench.notes,
        "failing": workbench.failing,
        "sandbox": str(found.get("sandbox") or ""),
    }


def take_over(workbench: "Workbench", told: Mapping[str, Any]) -> None:
    """What a worker told, in the controller."""
    workbench.kernels |= told["kernels"]
    workbench.steps |= told["steps"]
    workbench.notes |= told["notes"]
    workbench.failing += [words for words in told["failing"] if words not in workbench.failing]
    if told["sandbox"]:
        vars(workbench)["sandbox"] = told["sandbox"]


def report(config: pytest.Config, workbench: "Workbench") -> None:
    """A worker tells the controller at its end what `told_by` says."""
    config.workeroutput[KEY] = json.dumps(told_by(workbench))  # type: ignore[attr-defined]


def refuse(session: pytest.Session, words: str) -> None:
    """A worker finds that the command cannot be: all of them stop, and the words are the controller's."""
    session.shouldstop = words
    session.config.workeroutput[KEY] = json.dumps({"refused": words})  # type: ignore[attr-defined]
