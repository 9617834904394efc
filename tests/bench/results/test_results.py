"""Rows and the journal: what may be written, and that nothing written is lost."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from healthy_results import healthy_row, names, rows, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import environment, running

from bench.errors import JournalError
from bench.results.journal import Journal, read, resume
from bench.results.records import ENDINGS
from bench.results.row import Row, key_of
from compression.files.strict_json import strict_json


@settings(deadline=None)
@given(rows())
def test_a_row_comes_back_from_json_equal(row):
    assert row == Row.from_json(strict_json(json.dumps(row.to_json(), allow_nan=False)))


@settings(deadline=None, max_examples=20)
@given(st.lists(rows(), max_size=3, unique_by=lambda row: (row.base, row.recipe, row.device, row.key)))
def test_rows_come_back_from_a_journal_equal_and_in_order(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    written = [replace(row, run="r") for row in written]
    with Journal(path, run="r") as journal:
        for row in written:
            journal.append(row)

    assert written == read(path).rows()


def test_the_key_has_metric_and_parameters_in_order_of_names():
    row = healthy_row(params={"new_tokens": 128, "batch": 1, "mode": "eager"})

    assert row.key == "efficiency.decode_ms[batch=1,mode=eager,new_tokens=128]"
    assert list(row.params) == ["batch", "mode", "new_tokens"]
    assert healthy_row().key == "efficiency.decode_ms"


def test_a_parameter_that_does_not_apply_is_left_out():
    assert healthy_row(params={"length": 512, "stride": None}).key == "efficiency.decode_ms[length=512]"


@settings(deadline=None)
@given(st.dictionaries(names, texts, max_size=3), st.dictionaries(names, texts, max_size=3))
def test_other_texts_in_the_parameters_never_give_the_same_key(one, other):
    assert (one == other) == (key_of("a.b", one) == key_of("a.b", other))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"value": math.nan}, "value: nan is not finite"),
        ({"value": math.inf}, "not finite"),
        ({"value": None}, "exactly when the status is ok or estimated"),
        ({"value": True}, "not True \\(bool\\)"),
        ({"status": "failed", "reason": "it broke"}, "exactly when"),
        ({"value": None, "status": "failed"}, "needs a reason"),
        ({"status": "estimated"}, "needs a reason"),
        ({"status": "fine"}, "status must be one of ok, estimated"),
        ({"reason": ""}, "reason must be a non-empty string or None, not ''"),
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"ratio": 2.0, "base_value": 2.0}, "value / base_value"),
        ({"ratio": math.nan, "base_value": 2.0}, "ratio: nan"),
        ({"base_value": math.inf, "ratio": None}, "base_value: inf"),
        ({"samples": (1.0, math.nan)}, "samples: nan"),
        ({"base_samples": 3.0}, "base_samples=3.0 must be a sequence"),
        ({"better": "up"}, "better must be one of lower, higher, neither, not 'up'"),
        ({"metric": "decode"}, "<group>.<name>"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, not True"),
        ({"schema": 3}, "schema must be one of 1, 2"),
        ({"recipe": ""}, "recipe must be a non-empty string, not ''"),
        ({"params": {"Batch": 1}}, "must be lower case with underscores, not 'Batch'"),
        ({"params": {"batch": [1]}}, "must be a string, a finite number"),
        ({"params": {"batch": math.nan}}, "must be a string, a finite number"),
        ({"params": [1]}, "params must be an object"),
    ],
)
def test_a_row_that_cannot_be_is_refused_in_words(facts, words):
    known = healthy_row().to_json()

    with pytest.raises(JournalError, match=words):
        Row(**known | facts)


@pytest.mark.parametrize("field", sorted(healthy_row().to_json()))
def test_a_row_that_lacks_a_field_is_refused_by_its_name(field):
    table = healthy_row().to_json()
    del table[field]

    with pytest.raises(JournalError, match=f"lacks {field}"):
        Row.from_json(table)


def test_a_row_with_an_unknown_field_is_refused_by_its_name():
    with pytest.raises(JournalError, match="unknown speed"):
        Row.from_json(healthy_row().to_json() | {"speed": 1})


def test_rows_can_be_kept_in_a_set():
    assert len({healthy_row(params={"batch": 1}), healthy_row(params={"batch": 1})}) == 1


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", '{"a": 1, "a": 2}', "[" * 10**5])
def test_strict_json_refuses_what_others_could_not_read(text):
    with pytest.raises(ValueError):
        strict_json(text)


def test_the_first_writer_has_the_named_file_and_the_next_ones_their_own(tmp_path):
    path = tmp_path / "deep" / "er" / "journal.jsonl"
    with Journal(path) as one, Journal(path) as two, Journal(path) as three:
        assert [each.path.name for each in (one, two, three)] == ["journal.jsonl", "journal.1.jsonl", "journal.2.jsonl"]
    with Journal(path) as again:
        assert path == again.path


def test_a_journal_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(JournalError, match="--journal FILE"):
        Journal(tmp_path / "file" / "journal.jsonl")
    with pytest.raises(JournalError, match="directory"):
        Journal(tmp_path)


def test_files_are_merged_in_order_of_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="a") as one, Journal(path, run="b") as two:
        for number in range(4):
            (one, two)[number % 2].append({"kind": "verdict", "number": number})

    assert [each["number"] for each in read(path).records] == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 2


def test_other_files_of_the_folder_are_not_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).close()
    for name in ("journal.01.jsonl", "journal.old.jsonl", "journalx1.jsonl", "other.1.jsonl", "journal.1.jsonl.bak"):
        (tmp_path / name).write_text("not a record\n")

    assert read(path).records == []


def test_a_torn_last_line_is_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="run-1") as journal:
        journal.append(healthy_row())
    path.write_text(path.read_text() + '{"kind": "row", "val')

    contents = read(path)

    assert [healthy_row()] == contents.rows()
    assert [f"{path}:2"] == contents.torn


def test_the_next_writer_takes_a_torn_last_line_away_aloud_and_goes_on(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": "ro')
    with Journal(path, run="run-1") as journal:
        journal.append(healthy_row())

    assert [healthy_row()] == read(path).rows()
    assert "unfinished last line" in caplog.text


def test_the_next_writer_keeps_a_whole_last_line_that_lacks_only_its_end(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="run-1") as journal:
        journal.append(healthy_row())
    path.write_text(path.read_text().rstrip("\n"))
    with Journal(path, run="run-1") as journal:
        journal.append(healthy_row(recipe="other"))

    assert [row.recipe for row in read(path).rows()] == ["nf4", "other"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "\x00\x00",
        '{"kind": "row"}',
        '{"kind": "guess", "run": "r", "time": 1}',
        '{"kind": "verdict", "run": "", "time": 1}',
        '{"kind": "verdict", "run": "r", "time": NaN}',
        '{"kind": "verdict", "run": "r", "time": 1, "time": 2}',
        '{"kind": "end", "run": "r", "time": 1, "status": "fine"}',
        json.dumps({"kind": "row", "time": 1, **healthy_row().to_json(), "schema": 2}),
        json.dumps({"kind": "row", "time": 1, **healthy_row().to_json(), "value": math.nan}),
    ],
)
def test_any_other_bad_line_is_refused_by_file_and_number(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.start({})
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(JournalError, match=r"journal\.jsonl:2: "):
        read(path)


def test_reading_a_journal_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(JournalError, match=r"the journal .* does not exist"):
        read(tmp_path / "nowhere" / "journal.jsonl")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": "guess"},
        {"kind": "row"},
        {"kind": "end", "status": "fine"},
        {"kind": "run", "context": {"a": math.nan}},
        {"kind": "verdict", "words": {1, 2}},
        replace(healthy_row(), run="another"),
    ],
)
def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path, record):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="run-1") as journal, pytest.raises(JournalError):
        journal.append(record)

    assert path.read_text() == ""


def test_a_full_disk_is_an_error_in_words_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="run-1") as journal:
        journal.append(healthy_row())
        whole = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 50, limits[1]))
        try:
            with pytest.raises(JournalError, match="cannot be written"):
                journal.append(healthy_row())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

        assert whole == path.stat().st_size
        journal.append(healthy_row(recipe="other"))
    assert ["nf4", "other"] == [row.recipe for row in read(path).rows()]


def test_of_what_a_run_measured_again_the_last_row_counts_and_a_failure_before_it_does_not(tmp_path):
    path = tmp_path / "journal.jsonl"
    failed = healthy_row(value=None, status="failed", reason="killed")
    with Journal(path, run="run-1") as journal:
        for row in (failed, healthy_row("efficiency.layers"), healthy_row(value=3.0)):
            journal.append(row)
    again = read(path)

    assert [("efficiency.layers", 2.0), ("efficiency.decode_ms", 3.0)] == [(r.metric, r.value) for r in again.rows()]
    assert [] == [row for row in again.rows(since=again.records[-1]["time"] + 1) if row.status == "failed"]


def test_time_never_goes_back_within_a_file(tmp_path, monkeypatch):
    clock = iter([100.0, 50.0, 101.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with Journal(tmp_path / "journal.jsonl", run="r") as journal:
        for number in range(3):
            journal.append({"kind": "verdict", "number": number})

    records = read(tmp_path / "journal.jsonl").records
    assert [(each["number"], each["time"]) for each in records] == [(0, 100.0), (1, 100.000001), (2, 101.0)]


def test_without_a_journal_or_a_run_there_is_nothing_to_resume(tmp_path):
    assert None is resume(tmp_path / "journal.jsonl")
    Journal(tmp_path / "journal.jsonl").close()
    assert None is resume(tmp_path / "journal.jsonl")


@pytest.mark.parametrize("status", [*ENDINGS, None])
def test_a_run_is_resumed_unless_it_passed(tmp_path, status):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="run-1") as journal:
        journal.start({"seed": 0})
        journal.append(healthy_row())
        if status:
            journal.end(status)

    rows = {("nf4", healthy_row().key): healthy_row()}
    assert (None if status == "passed" else ("run-1", rows, {"schema": 2, "seed": 0})) == resume(path)


def test_the_last_run_that_did_not_pass_is_resumed_and_then_it_is_done(tmp_path):
    path = tmp_path / "journal.jsonl"
    for run, status in (("one", None), ("two", "interrupted"), ("three", "passed")):
        with Journal(path, run=run) as journal:
            journal.start({})
            if status:
                journal.end(status)
    assert resume(path).run == "two"
    with Journal(path, run="two") as journal:
        journal.start({})
        journal.end("passed")

    assert resume(path).run == "one"


def test_a_run_that_is_still_being_written_is_not_resumed(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="alive") as journal:
        journal.start({})

        assert None is resume(path)
    assert resume(path).run == "alive"


WRITER = """
import sys
from dataclasses import replace
from bench.results.journal import Journal
from healthy_results import healthy_row, names, rows, texts
path, run, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
journal = Journal(path, run=run)
sys.stdin.readline()
journal.start({})
for number in range(count):
    journal.append(healthy_row(run=run, params={"number": number}))
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
journal.end("passed")
"""


def writer(path: Path, run: str, count: int) -> AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, "-c", WRITER, path, run, count]
    return running(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_one_journal_and_nothing_is_lost(tmp_path):
    path = tmp_path / "journal.jsonl"
    with writer(path, "one", 40) as one, writer(path, "two", 40) as two:
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait() for process in (one, two)] == [0, 0]

    contents = read(path)
    for run in ("one", "two"):
        assert list(range(40)) == [row.params["number"] for row in contents.rows(run)]
    assert contents.torn == []
    assert None is resume(path)


@pytest.mark.parametrize("seen", [1, 7, 23])
def test_a_killed_writer_leaves_a_journal_with_all_that_it_finished(tmp_path, seen):
    path = tmp_path / "journal.jsonl"
    with writer(path, "killed", 10**6) as process:
        process.stdin.write("go\n")
        process.stdin.flush()
        for _ in range(seen):
            finished = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")[:-1]
        assert process.wait() == -signal.SIGKILL
    finished = int(rest[-1]) if rest else finished

    run, found, _ = resume(path)

    assert run == "killed"
    numbers_found = [row.params["number"] for row in found.values()]
    assert list(range(len(numbers_found))) == numbers_found
    assert finished + 1 <= len(numbers_found) <= finished + 2  # a row may be on the disk before it was told
    with Journal(path, run=run) as journal:
        journal.append(healthy_row(run=run, params={"number": -1}))
    assert len(numbers_found) + 1 == len(read(path).rows())
