"""The files of the report: what they hold, of which rows, and the command that writes them."""

import json

import pytest
from checkpoints import says
from report_rows import F1, LATENCY, LOAD, SIZE, contents_of, row

from bench.__main__ import main as command
from bench.errors import JournalError, OptionError
from bench.report.pull_request import digest
from bench.report.write import chosen, writable, write
from bench.results.journal import Journal, read


def test_the_files_hold_every_row_and_the_tables_every_value(tmp_path):
    import pandas as pd

    rows = [row(SIZE, 0.5, base_value=1.0), row(LATENCY, 4.0, params=LOAD, samples=(3.0, 4.0, 5.0)),
            row(F1, None, params={"decoding": "greedy"}, status="not_available", reason="no questions")]  # fmt: skip

    written = write(tmp_path / "report", rows, contents_of(rows))

    names = {path.name for path in written}
    assert {"tables.md", "tables.tex", "tables.html", "summary.md", "results.json", "results.csv",
            "results.parquet"} <= names  # fmt: skip
    found = json.loads((tmp_path / "report/results.json").read_text())
    assert [(each.key, each.value, each.reason) for each in rows] == [
        (each["key"], each["value"], each["reason"]) for each in found
    ]
    for frame in (pd.read_parquet(tmp_path / "report/results.parquet"), pd.read_csv(tmp_path / "report/results.csv")):
        assert [each.key for each in rows] == list(frame["key"])
        assert [0.5, 4.0] == list(frame["value"].dropna())
        assert [3.0, 4.0, 5.0] == json.loads(frame["samples"][1])
    assert [path.name for path in (tmp_path / "report").iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OptionError, match=says("--report", "file", "choose another folder")):
        writable(tmp_path / "file")


def test_of_a_journal_with_several_devices_the_last_one_is_meant_or_the_one_asked_for():
    rows = [row(SIZE, 1.0, device="one"), row(SIZE, 2.0, device="two")]

    assert [2.0] == [each.value for each in chosen(rows, None, None, "j")]
    assert [1.0] == [each.value for each in chosen(rows, None, "one", "j")]
    with pytest.raises(JournalError, match=says("--device three", "reference on one; reference on two")):
        chosen(rows, None, "three", "j")


def test_the_command_writes_the_report_of_a_journal(tmp_path, capsys):
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        journal.start({"commit": None})
        journal.append(row(SIZE, 0.5, base_value=1.0))
        journal.end("passed")
    command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/summary.md").read_text() == digest(read(tmp_path / "journal.jsonl"))

    capsys.readouterr()
    command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--tables", "E14"])
    assert "### Table E14" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command(["report", "--journal", str(tmp_path / "journal.jsonl"), "--tables", "E99"])
    assert "--tables E99: there are E14" in capsys.readouterr().err


def test_a_journal_with_a_recipe_that_is_none_any_more_is_refused_with_words(tmp_path, capsys):
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        journal.append(row(SIZE, 0.5, "gone(bits=4)"))
    with pytest.raises(SystemExit, match="2"):
        command(["report", "--journal", str(tmp_path / "journal.jsonl")])

    assert "gone" in capsys.readouterr().err
