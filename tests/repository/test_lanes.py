"""Which tests a command runs, and in how many processes."""

import os
from pathlib import Path
from types import SimpleNamespace

import lanes
import pytest
from lanes import PROCESS, TESTS, passed_over, split, unit, workers

ROOT = TESTS.parent
PAGES = "tests/bench/test_pages.py"


def config(*args, **options):
    """The configuration of `pytest ARGS` in the repository; without any, pytest.ini names the tests."""
    known = {"markexpr": "", "keyword": "", "numprocesses": None, "dist": "no", "tx": [], "collectonly": False,
             "usepdb": False}  # fmt: skip
    return SimpleNamespace(
        args=list(args) or ["tests"],
        invocation_params=SimpleNamespace(dir=ROOT),
        option=SimpleNamespace(**known | options),
    )


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((), {}, 2),
        (("tests/repository",), {}, 2),
        (("tests", "tests/repository"), {"markexpr": "process"}, 2),
        (("tests/conftest.py",), {}, None),
        (("tests/conftest.py::test_it",), {}, None),
        ((), {"keyword": "gate"}, None),
        ((), {"numprocesses": 0}, None),
        ((), {"numprocesses": 3}, None),
        ((), {"collectonly": True}, None),
        ((), {"usepdb": True}, None),
        (("bench",), {}, None),
        (("tests", "bench"), {}, None),
        ((".",), {}, None),
    ],
)
def test_folders_of_tests_run_on_all_cores_and_benchmarks_or_what_is_told_never(two_cores, args, options, expected):
    assert expected == workers(config(*args, **options))


def test_without_xdist_or_a_second_core_there_are_no_workers(two_cores, monkeypatch):
    without = config()
    del without.option.numprocesses
    assert None is workers(without)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert None is workers(config())


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((), {}, True),
        (("tests/repository",), {}, True),
        ((), {"markexpr": "process"}, False),
        (("tests/process",), {}, False),
        (("tests/process/test_workers.py::test_it",), {}, False),
    ],
)
def test_the_slow_folder_is_passed_over_unless_it_is_asked_for(args, options, expected):
    assert expected is passed_over(config(*args, **options))


class Item:
    def __init__(self, path, slow):
        self.path, self.slow = ROOT / path, slow

    def get_closest_marker(self, name):
        return self.slow and name == lanes.LANE


@pytest.mark.parametrize(
    ("args", "options", "left"),
    [
        ((), {}, [True, True]),
        ((PAGES,), {}, [False, True]),
        (("tests/process",), {}, [False, False]),
        ((), {"markexpr": "process"}, [False, False]),  # pytest itself chooses
    ],
)
def test_slow_tests_are_left_to_their_lane_unless_their_file_is_named(args, options, left):
    quick, slow, other = Item(PAGES, False), Item(PAGES, True), Item(PROCESS / "test_kills.py", True)

    kept, gone = split(config(*args, **options), [quick, slow, other])

    assert [each for each, away in zip((slow, other), left, strict=True) if away] == gone
    assert kept == [each for each in (quick, slow, other) if each not in gone]


def test_files_stay_together_and_a_contract_is_shared_by_rows():
    assert "tests/bench/test_gate.py" == unit("tests/bench/test_gate.py::TestIt::test_it[nf4]")
    assert "tests/contract/test_methods.py[a::b]" == unit("tests/contract/test_methods.py::TestIt::test_it[a::b]")
    assert "tests/contract/test_methods.py" == unit("tests/contract/test_methods.py::test_all_are_there")


def test_no_test_starts_a_process_that_could_outlive_it():
    """Children are started by `running` and what is made of it, and have no deadline in seconds."""
    found = [
        f"{path.relative_to(TESTS)}:{number}"
        for path in Path(TESTS).rglob("*.py")
        if path.name not in ("processes.py", Path(__file__).name)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for name in ("subprocess.run(", "subprocess.check_", "subprocess.call(", "os.system(", "= subprocess.Popen(")
        if name in line
    ]

    assert {"process/test_sandbox.py"} == {each.partition(":")[0] for each in found}  # one, in a jail's own code


def test_a_worker_starts_no_workers_of_its_own(two_cores):
    """Its options are those of a command that says nothing of processes."""
    worker = config()
    worker.workerinput = {"workerid": "gw0"}

    assert None is workers(worker)
