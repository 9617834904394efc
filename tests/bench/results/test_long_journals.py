"""Journals that are long, and clocks that go back."""

import cProfile
import json
import pstats
import time

import pytest
from healthy_results import healthy_row
from scripts import benchmark

from bench.commands import history
from bench.errors import JournalError
from bench.report.page import page
from bench.report.pull_request import digest
from bench.report.tables import newest
from bench.report.write import measured
from bench.results.bases import told_apart
from bench.results.journal import Journal, read, resume

long_journal = benchmark("long_journal")

# --- Growth ----------------------------------------------------------------------------------------------------------


def show_page(path):
    page(*measured(path), storage=path.parent / "none")


READERS = {
    "read": read,
    "history": lambda path: history.moves(history.of_journal(path)),
    "digest": lambda path: digest(told_apart(read(path))),
    "newest rows": lambda path: newest(told_apart(read(path)).each_row()),
    "page": show_page,
    "resume": resume,
    "claim": lambda path: Journal(path, run="new").close(),
}


@pytest.fixture(scope="module")
def journals(tmp_path_factory):
    """Two journals, the second about ten times as long as the first."""
    found = {}
    for lines in (800, 8000):
        found[lines] = tmp_path_factory.mktemp("journals") / "journal.jsonl"
        long_journal.write(found[lines], lines)
    return found


def calls(reader, path):
    """How many functions a reader calls, of Python and of C."""
    profile = cProfile.Profile()
    profile.runcall(reader, path)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_journal_takes_no_more_steps_than_the_journal_has_lines(journals, name):
    reader = READERS[name]
    calls(reader, journals[800])  # modules are imported at the first call
    short, long = (calls(reader, path) for path in journals.values())
    lines = [len(path.read_bytes().splitlines()) for path in journals.values()]

    assert long <= 1.2 * lines[1] / lines[0] * short


def test_a_record_holds_its_line_and_no_more_until_a_field_is_needed(journals):
    records = read(journals[800]).records

    assert all(not hasattr(record, "__dict__") for record in records)
    assert [json.loads(line)["kind"] for line in journals[800].read_bytes().splitlines()] == [
        record["kind"] for record in records
    ]
    for record, line in zip(records, journals[800].read_bytes().splitlines(), strict=True):
        assert {name: value for name, value in json.loads(line).items() if name != "check"} == dict(record)


# --- Clocks ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1.7e9
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def a_run(path, name, value, status="passed"):
    with Journal(path, run=name) as journal:
        journal.start({"seed": 0, "base": "reference", "base_hash": "b1"})
        journal.append(healthy_row(run=name, value=value, base_value=None, ratio=None))
        journal.end(status)


@pytest.mark.parametrize("beside", [False, True], ids=["one file", "two files"])
def test_what_was_written_last_is_the_newest_value_though_the_clock_went_back(tmp_path, clock, beside):
    path = tmp_path / "journal.jsonl"
    if beside:
        with Journal(path, run="first"):  # holds the named file
            a_run(path, "old", 2.0)
    else:
        a_run(path, "old", 2.0)
    clock.now -= 3600
    a_run(path, "new", 3.0)

    assert "new" == read(path).rows_of()[-1].run
    assert [3.0] == [row.value for row in newest(read(path).each_row())]
    assert sorted(times := [record["time"] for record in read(path).records]) == times


def test_a_finished_run_is_not_resumed_though_the_clock_went_back(tmp_path, clock):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="one") as journal:
        journal.start({"seed": 0})
        journal.append(healthy_row(run="one"))
        clock.now -= 3600
    with Journal(path, run="one") as journal:  # gone on with
        journal.start({"seed": 0})
        journal.end("passed")

    assert resume(path) is None


def test_of_a_file_that_an_older_version_wrote_the_order_of_lines_holds(tmp_path):
    path = tmp_path / "journal.jsonl"
    records = list(long_journal.records(100))
    for place, record in enumerate(records):
        record["time"] = 1.7e9 - place  # its clock ran backwards
    path.write_bytes(b"".join(long_journal.sealed(json.dumps(record)) + b"\n" for record in records))

    assert [record["kind"] for record in records] == [record["kind"] for record in read(path).records]


@pytest.mark.parametrize("when", [-1.0, 1e300, 253_402_300_800.0])
def test_a_time_that_no_calendar_has_is_refused_by_line(tmp_path, when):
    path = tmp_path / "journal.jsonl"
    record = {"time": when, "run": "r", "kind": "end", "status": "passed"}
    path.write_bytes(long_journal.sealed(json.dumps(record)) + b"\n")

    with pytest.raises(JournalError, match=r"journal\.jsonl:1: time must be .* before the year 10000"):
        read(path)
