"""Damaged journals and baselines: never a traceback, never a number that was not measured, never a whole row lost."""

import json
import os
import random
from dataclasses import replace

import damage
import pytest
from checkpoints import says
from healthy_results import CONTEXT, FINGERPRINT, HEALTHY_METRICS, healthy_row, healthy_rows, item_row, recorded
from healthy_results import LOSSES as LOSSES_OF_100

from bench.__main__ import main as command
from bench.commands.repair import mend
from bench.errors import BaselineError, JournalError
from bench.gate.digest import sign
from bench.gate.verdicts import Baseline, update
from bench.results.checksums import opened, sealed, whole_in
from bench.results.items import Items
from bench.results.journal import Journal, read, resume

DAMAGES = 1000
LOSSES = Items(LOSSES_OF_100.hashes[:4], LOSSES_OF_100.values[:4], "real")


# --- Journals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sound journal of two files and two runs, the second unfinished: the bytes of each file by name."""
    path = tmp_path_factory.mktemp("sound") / "journal.jsonl"
    with Journal(path, run="one") as one, Journal(path, run="two") as two:
        for journal in (one, two):
            journal.start({"seed": 0, "base_hash": "b1"})
            journal.append({"kind": "begin", "of": "loss", "recipe": "nf4", "params": {}, "data": None})
            journal.append(replace(item_row("quality.nll", LOSSES), run=journal.run))
            journal.append(healthy_row(run=journal.run, params={"batch": 1}, samples=(1.9, 2.1)))
        one.append({"kind": "verdict", "recipe": "nf4", "key": "quality.nll", "outcome": "pass", "words": "nf4: fine"})
        one.end("passed")
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def _records(path):
    return sorted(json.dumps(dict(record), sort_keys=True) for record in read(path).records)


def _of_lines(lines):
    return sorted(json.dumps(json.loads(opened(line)), sort_keys=True) for line in lines)


@pytest.mark.parametrize("part", range(10))
def test_of_a_damaged_journal_every_whole_record_comes_back_and_nothing_else(written, tmp_path, part, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands, which only a power cut would need
    path = tmp_path / "journal.jsonl"
    whole = {line for data in written.values() for line in data.split(b"\n") if line}
    refused = lost = 0
    for number in range(part, DAMAGES, 10):
        numbers = random.Random(number)
        spoiled = dict(written)
        name = numbers.choice(sorted(spoiled))
        spoiled[name] = numbers.choice((*damage.ANYWHERE, damage.line_changed))(spoiled[name], numbers)
        for file in tmp_path.iterdir():
            file.unlink()
        for each, data in spoiled.items():
            (tmp_path / each).write_bytes(data)
        kept = {line for line in whole if any(line in data for data in spoiled.values())}
        if numbers.random() < 0.3:  # a writer that comes later neither minds nor loses anything
            with Journal(path, run="three") as journal:
                journal.append({"kind": "verdict", "recipe": "nf4", "number": number})
            kept |= {(tmp_path / journal.path.name).read_bytes().split(b"\n")[-2]}
        lost += len(whole - kept)

        try:
            found = _records(path)
        except JournalError as error:
            refused += 1
            assert "python -m bench mend" in str(error) and ".jsonl:" in str(error)
            assert mend(path)
            assert any(file.name.endswith(".damaged") for file in tmp_path.iterdir())
            found = _records(path)

        assert _of_lines(kept) == found, f"damage {number}"
        mend(path)  # also what was torn off
        assert (_of_lines(kept), []) == (_records(path), mend(path))
        try:
            left = resume(path)
        except JournalError as error:
            assert "lost the record of how run" in str(error)
        else:
            assert left is None or set(left.rows.values()) <= {row for row in read(path).rows(left.run)}
    assert refused > DAMAGES / 20 and lost > DAMAGES / 20  # most do damage, and most of it is seen


def test_a_line_without_a_check_as_older_versions_wrote_it_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"time": 1.0, "run": "old", "kind": "row", **healthy_row(run="old").to_json()}) + "\n")

    assert [healthy_row(run="old")] == read(path).rows()


def test_another_number_in_a_line_is_refused_though_it_is_a_number(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="r") as journal:
        journal.append(healthy_row(run="r", value=2.0))
    path.write_bytes(path.read_bytes().replace(b'"value": 2.0', b'"value": 2.1'))

    with pytest.raises(JournalError, match=says("journal.jsonl:1: it was changed: its checksum is", "bench mend")):
        read(path)


def test_the_command_moves_what_is_damaged_aside_in_words_and_keeps_two_records_that_lost_their_line_end(
    tmp_path, capsys
):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="r") as journal:
        for batch in range(4):
            journal.append(healthy_row(run="r", params={"batch": batch}))
    one, two, three, four, _ = path.read_bytes().split(b"\n")
    damaged = b"\n".join([one + b"\x0b" + two, three[:-30] + b"\n" + four]) + b"\n"
    path.write_bytes(damaged)
    assert [one, two] == whole_in(one + b"\x0b" + two)

    command(["mend", "--journal", str(path)])

    assert [0, 1, 3] == [row.params["batch"] for row in read(path).rows()]
    assert damaged == path.with_name("journal.jsonl.damaged").read_bytes()
    said = capsys.readouterr().out
    assert "2 whole records in it are kept" in said and "journal.jsonl:2:" in said and "3 records kept" in said
    command(["mend", "--journal", str(path)])
    assert "nothing is damaged" in capsys.readouterr().out


def test_a_journal_that_is_being_written_is_not_mended(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="r"), pytest.raises(JournalError, match="is being written by a run"):
        mend(path)


def test_a_writer_that_opened_a_journal_before_it_was_mended_does_not_write_into_what_was_set_aside(
    tmp_path, monkeypatch
):
    path = tmp_path / "journal.jsonl"
    path.write_text("not a record\n")
    import fcntl

    lock = fcntl.flock

    def mended_meanwhile(file, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        mend(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", mended_meanwhile)
    with Journal(path, run="r") as journal:
        journal.append(healthy_row(run="r"))

    assert [healthy_row(run="r")] == read(path).rows()


def test_rows_whose_run_lost_the_record_of_its_beginning_are_kept_but_not_gone_on_with(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, run="r") as journal:
        journal.start({"base_hash": "b1"})
        journal.append(healthy_row(run="r"))
    path.write_bytes(path.read_bytes().replace(b'"b1"', b'"b2"'))
    mend(path)

    assert [healthy_row(run="r")] == read(path).rows("r")
    with pytest.raises(JournalError, match=says("run r", "its 1 rows", "start a new run without --resume")):
        resume(path)


def test_a_seal_is_of_all_that_is_before_it():
    line = sealed('{"time": 1.0, "run": "r"}')

    assert '{"time": 1.0, "run": "r"}' == opened(line)
    for at in range(len(line) * 8):
        spoiled = bytearray(line)
        spoiled[at // 8] ^= 1 << at % 8
        assert [] == whole_in(bytes(spoiled))


# --- Baselines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The files of a sound baseline with items, by their path in the folder of baselines."""
    folder = tmp_path_factory.mktemp("baselines")
    rows = [row for row in healthy_rows() if row.items is None] + [item_row("quality.nll", LOSSES)]
    update(folder, rows, CONTEXT, FINGERPRINT, metrics=HEALTHY_METRICS)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("part", range(10))
def test_a_damaged_baseline_is_refused_or_says_what_it_said(recording, tmp_path, part):
    refused = 0
    (tmp_path / "reference" / "items").mkdir(parents=True)
    for each, data in recording.items():
        (tmp_path / each).write_bytes(data)
    sound = Baseline.find(tmp_path, "reference", "nf4")
    for number in range(part, DAMAGES, 10):
        numbers = random.Random(number)
        name = numbers.choice((*sorted(recording), "reference/nf4.json", "reference/nf4.json"))
        ways = damage.ANYWHERE if name.endswith(".hashes") else (*damage.ANYWHERE, damage.document_changed)
        way = numbers.choice(ways)
        (tmp_path / name).write_bytes(way(recording[name], numbers))

        try:
            found = Baseline.find(tmp_path, "reference", "nf4")
        except BaselineError as error:
            refused += 1
            assert str(tmp_path / "reference") in str(error)
        else:
            assert sound == found, f"damage {number}: {way.__name__} of {name}"
        (tmp_path / name).write_bytes(recording[name])
    assert refused > 0.8 * DAMAGES / 10


def test_a_number_changed_by_hand_is_refused_until_it_is_signed(tmp_path, capsys):
    path = recorded([healthy_row("efficiency.stored_bytes", value=15_728_640.0)]).save(tmp_path)
    path.write_text(path.read_text().replace("15728640", "15728639"))

    with pytest.raises(BaselineError, match=says(str(path), "is not what was recorded", f"bench sign {path}")):
        Baseline.load(path)
    command(["sign", str(path)])

    assert f"{path}: signed; the digest was" in capsys.readouterr().out
    assert 15728639 == next(iter(Baseline.find(tmp_path, "reference", "nf4").sections[""].rows.values())).value
    command(["sign", str(path)])
    assert f"{path}: nothing was changed" in capsys.readouterr().out


def test_a_baseline_without_a_digest_is_refused_and_can_be_signed(tmp_path):
    path = recorded([healthy_row("efficiency.layers", value=8.0)]).save(tmp_path)
    sound = Baseline.load(path)
    table = json.loads(path.read_text())
    del table["digest"]
    path.write_text(json.dumps(table))

    with pytest.raises(BaselineError, match="it has no digest"):
        Baseline.load(path)
    assert "the digest was None" in sign(path)
    assert sound == Baseline.load(path)


def test_a_baseline_that_is_laid_out_anew_is_what_it_was(tmp_path):
    path = recorded(healthy_rows()).save(tmp_path)
    sound = Baseline.load(path)
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7).replace("\n", "\r\n"))

    assert sound == Baseline.load(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[:-9], "only JSON can be signed"),
        (lambda text: "[]", "cannot be signed"),
        (lambda text: text.replace('"unit": "1"', '"unit": ""'), "unit must be a non-empty string, not ''"),
        (lambda text: text.replace('"value": 8', '"value": "8"'), "not '8' (str)"),
    ],
)
def test_what_could_not_be_a_baseline_is_not_signed_and_stays_as_it_is(tmp_path, spoil, words):
    path = recorded([healthy_row("efficiency.layers", value=8.0)]).save(tmp_path)
    path.write_text(spoilt := spoil(path.read_text()))

    with pytest.raises(BaselineError, match=says(str(path), words)):
        sign(path)
    assert spoilt == path.read_text()
    assert ["nf4.json"] == [each.name for each in path.parent.iterdir()]
