"""The two lanes of the tests, and how pytest-xdist shares them between processes.

`pytest` runs all but what is marked `process`; `pytest -m process` runs that: kills, workers, browsers, continuous
integration, sandboxes. All tests of the folder `process` are marked. What the command line names is always run. A
command that names a folder runs in as many processes as there are cores; one file, `-k` or `-n 0` run in one, which
needs no other to start first.
"""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROCESS = TESTS / "process"
LANE = "process"
CONTRACT = "contract"  # the folder whose tests are shared by their parameters, not by their files
WORKERS = 8  # at most: each holds torch and a few models


def named(config: pytest.Config) -> list[Path]:
    """The files and folders that the command line names, or pytest.ini where it names none."""
    folder = config.invocation_params.dir
    return [(folder / argument.partition("::")[0]).resolve() for argument in config.args]


def passed_over(config: pytest.Config) -> bool:
    """Whether the slow folder is not even collected: nothing on the command line asks for marks or names any of it."""
    return not config.option.markexpr and not any(path.is_relative_to(PROCESS) for path in named(config))


def split(config: pytest.Config, items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests of the lane that is run, and those that are left to the slow one."""
    files = set(named(config))
    slow = set() if config.option.markexpr else {
        item for item in items if item.get_closest_marker(LANE)
        and not any(path == item.path or path.is_relative_to(PROCESS) for path in files)
    }  # fmt: skip
    return [item for item in items if item not in slow], [item for item in items if item in slow]


def of_tests(config: pytest.Config) -> bool:
    """Whether the command line names tests alone, and no benchmarks."""
    return all(path.is_relative_to(TESTS) for path in named(config))


def workers(config: pytest.Config) -> int | None:
    """How many processes a command gets that says nothing of them; None: this one is enough, or must be."""
    option = config.option
    if hasattr(config, "workerinput"):
        return None  # a worker itself, whose options say nothing of the others
    if getattr(option, "numprocesses", 0) is not None or option.dist != "no" or option.tx:
        return None  # pytest-xdist is not installed, or was told
    if option.keyword or option.collectonly or option.usepdb or not all(path.is_dir() for path in named(config)):
        return None
    if not of_tests(config):
        return None  # what is timed beside another process says nothing
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, WORKERS)
    return cores if cores > 1 else None


def unit(nodeid: str) -> str:
    """What one process runs without a break: a file, whose tests share fixtures, or what a contract has of a row.

    >>> unit("tests/bench/gate/test_gate.py::TestGate::test_it[nf4]")
    'tests/bench/gate/test_gate.py'
    >>> unit("tests/contract/test_methods.py::TestContract::test_it[nf4-a::b]")
    'tests/contract/test_methods.py[nf4-a::b]'
    """
    file, _, test = nodeid.partition("::")
    if CONTRACT not in Path(file).parts:
        return file
    return file + "".join(test.partition("[")[1:])


def scheduling(config: pytest.Config, log):
    """The scheduler of pytest-xdist that keeps units together, those of most tests first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return Scheduling(config, log)
