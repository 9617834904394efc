"""Bases of one name: whatever shows or keeps results tells them apart, and shows no folder of this machine."""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.commands import history
from bench.errors import BaselineError, JournalError
from bench.gate.baseline import ANYWHERE, Baseline
from bench.gate.recording import merged, update
from bench.gate.verdicts import judge
from bench.metrics import all_metrics
from bench.report import trend
from bench.report.page import page
from bench.report.pull_request import digest
from bench.report.recommend import QUALITY, points_of
from bench.report.sources import recorded
from bench.report.tables import by_device, newest, tables
from bench.report.write import measured, write
from bench.results.bases import OLD, names, rows_told_apart, short, told_apart, without_paths
from bench.results.journal import Journal, read, resume
from bench.results.row import Row

DEVICE = "cpu-test-2t"
BASES = {"a" * 64: 1000.0, "b" * 64: 2000.0}  # hash, and the hundreds that its numbers are in
MEASURED = {"efficiency.stored_bytes": 1, "efficiency.model_size_gb": 2, "quality.perplexity": 3,
            "quality.average_accuracy": 4, "efficiency.latency_ms": 5}  # fmt: skip
PARAMS = {"efficiency.latency_ms": {"mode": "eager", "batch": 1}}


def row(base_hash, metric, recipe="nf4", run="r", **facts):
    known = all_metrics()[metric]
    own = {
        "base": "hf",
        "unit": known.unit,
        "better": known.better,
        "of": known.of,
        "params": PARAMS.get(metric, {}),
        "seed": 0,
    }
    value = BASES[base_hash] + MEASURED[metric] + (10 if recipe == "nf4" else 0)
    return Row(run=run, base_hash=base_hash, recipe=recipe, device=DEVICE, metric=metric, value=value,
               **own | facts)  # fmt: skip


def whose(value):
    """The base that a number is of."""
    return next((base_hash for base_hash, start in BASES.items() if start <= value < start + 100), None)


def journal(path, *runs):
    """A journal of runs, each (base_hash, metrics): all of them for fp16 and nf4."""
    for base_hash, metrics in runs:
        with Journal(path) as lines:
            context = {"base": "hf", "base_hash": base_hash, "fingerprint": DEVICE, "command": "pytest bench"}
            lines.start(context)
            for recipe in ("fp16", "nf4"):
                for metric in metrics:
                    lines.append(row(base_hash, metric, recipe, lines.run))
            lines.end("passed")
    return path


runs = st.lists(
    st.tuples(st.sampled_from(list(BASES)), st.sets(st.sampled_from(list(MEASURED)), min_size=1)),
    min_size=1,
    max_size=5,
)


@given(runs)
def test_nothing_that_readers_of_a_journal_see_has_numbers_of_two_bases(tmp_path_factory, drawn):
    path = journal(tmp_path_factory.mktemp("journal") / "journal.jsonl", *drawn)
    hashes = {base_hash for base_hash, _ in drawn}
    called = {base_hash: "hf" if len(hashes) == 1 else f"hf ({short(base_hash)})" for base_hash in hashes}

    for base_hash, name in called.items():
        rows, contents = measured(path, name, DEVICE)
        assert {name} == {each.base for each in rows} and {base_hash} == {each.base_hash for each in rows}
        for table in tables(rows):
            cells = [cell for line in table.lines for cell in line.cells if not line.source]
            assert {whose(each.value) for each in cells if each.value} <= {base_hash, None}  # None: GiB as MiB
        measures = {metric for of, metrics in drawn if of == base_hash for metric in metrics}
        for quality, column in QUALITY.items():
            points, _ = points_of(rows, quality)
            assert bool(points) == ({column.metric, "efficiency.model_size_gb"} <= measures)
            assert all(base_hash == whose(each.size) for each in points)
        by_label, _ = measured(path, "hf", DEVICE, base_hash)  # as a run asks for what its report is of
        assert rows == by_label
    contents = told_apart(read(path))
    assert set(called.values()) == set(trend.history(contents.records))
    for each in history.of_journal(path):
        assert [each.base] == [called[of] for of in {whose(point.value) for point in each.points}]
    assert set(called.values()) == {each["base"] for each in trend.runs(contents.records)}
    last = called[drawn[-1][0]]
    assert f"`{last}`" in digest(told_apart(read(path)))


def test_a_page_has_a_subject_for_each_base_with_its_own_environment_and_layers(tmp_path):
    path = journal(tmp_path / "journal.jsonl", *((base_hash, MEASURED) for base_hash in BASES))
    contents = told_apart(read(path))

    text = page(contents.rows(), contents, storage=tmp_path / "none")

    assert all(f"hf ({short(base_hash)})" in text for base_hash in BASES)
    with pytest.raises(ValueError, match="hf is the name of several bases"):
        page(read(path).rows(), read(path), storage=tmp_path / "none")


def test_rows_of_several_bases_under_one_name_are_never_one_table():
    rows = [row(base_hash, metric) for base_hash in BASES for metric in MEASURED]

    assert len(rows) == len(newest(rows))
    with pytest.raises(ValueError, match="several bases"):
        tables(rows)
    assert 2 == len(by_device(rows_told_apart(rows)))


def test_a_model_that_was_calibrated_on_another_text_is_no_part_of_the_line_of_a_recipe():
    def of(text, metric, value):
        known = all_metrics()[metric]
        params = {"calibration": text} if text else {}
        return Row(run="r", base="hf", recipe="gptq", device=DEVICE, metric=metric, value=value, unit=known.unit,
                   better=known.better, of=known.of, params=params, seed=0)  # fmt: skip

    rows = [row("a" * 64, metric, "fp16") for metric in MEASURED]
    rows = [replace(each, base_hash=None) for each in rows]
    mixed = [*rows, of("1" * 12, "efficiency.model_size_gb", 1.0), of("2" * 12, "quality.perplexity", 3.0)]

    assert "gptq" not in [point.recipe for point in points_of(mixed, "perplexity")[0]]
    for table in tables(mixed):
        cells = {cell.value for line in table.lines if line.recipe == "gptq" for cell in line.cells if not line.source}
        assert not {1.0, 1024.0} & cells
    assert any(
        "1 values of these recipes with other calibration text" in each for t in tables(mixed) for each in t.remarks
    )
    alike = [*rows, of("2" * 12, "efficiency.model_size_gb", 1.0), of("2" * 12, "quality.perplexity", 3.0)]
    assert "gptq" in [point.recipe for point in points_of(alike, "perplexity")[0]]


def test_a_label_that_is_not_one_base_is_refused_with_the_names_that_are(tmp_path):
    path = journal(tmp_path / "journal.jsonl", *((base_hash, MEASURED) for base_hash in BASES))

    with pytest.raises(JournalError, match=r"hf \(aaaaaaaa\) on cpu-test-2t; hf \(bbbbbbbb\)"):
        measured(path, "hf")


@given(st.lists(st.tuples(st.sampled_from(["hf", "hf (aaaaaaaa)", "reference"]),
                          st.sampled_from([None, "a" * 64, "a" * 8 + "b" * 56, f"{OLD}{'a' * 64}"]))))  # fmt: skip
def test_no_two_bases_have_one_name(found):
    called = names(found)

    assert len(set(found)) == len(set(called.values()))


def test_rows_of_older_journals_have_the_hash_of_their_run_and_stand_apart_from_those_of_today(tmp_path):
    path = tmp_path / "journal.jsonl"
    for schema in (1, 2):
        with Journal(path) as lines:
            context = {"base": "hf", "base_hash": "a" * 64} | ({"schema": 2} if schema == 2 else {})
            lines.append({"kind": "run", "context": context})
            own = row("a" * 64, "quality.perplexity", run=lines.run)
            lines.append(replace(own, base_hash=None, schema=1) if schema == 1 else own)
            lines.end("passed")

    old, new = read(path).rows()

    assert (f"{OLD}{'a' * 64}", "a" * 64) == (old.base_hash, new.base_hash)
    assert ["hf (schema 1, aaaaaaaa)", "hf (aaaaaaaa)"] == [each.base for each in told_apart(read(path)).rows()]
    with pytest.raises(BaselineError, match="before base_hash covered the tokenizer"):
        update(tmp_path, [old], {"base_hash": "a" * 64}, DEVICE)


def test_a_run_is_gone_on_with_under_the_label_that_was_written(tmp_path):
    path = journal(tmp_path / "journal.jsonl", ("a" * 64, MEASURED))
    with Journal(path) as lines:
        lines.start({"base": "hf", "base_hash": "b" * 64})
        lines.append(row("b" * 64, "quality.perplexity", run=lines.run))

    found = resume(path)

    assert [("hf", "b" * 64)] == [(each.base, each.base_hash) for each in found.rows.values()]


# --- Baselines --------------------------------------------------------------------------------------------------------


def record(folder, base_hash, **facts):
    rows = [row(base_hash, metric, **facts) for metric in ("efficiency.stored_bytes", "quality.perplexity")]
    return update(folder, rows, {"base_hash": base_hash, "data_hash": None, "seed": 0, "torch": "2"}, DEVICE)


def test_each_base_of_a_name_has_baseline_files_of_its_own(tmp_path):
    for base_hash in BASES:
        record(tmp_path, base_hash)

    assert ["hf-aaaaaaaa", "hf-bbbbbbbb"] == sorted(path.name for path in tmp_path.iterdir())
    for base_hash in BASES:
        found = Baseline.find(tmp_path, "hf", "nf4", base_hash)
        assert {base_hash} == {whose(each.value) for each in found.sections[ANYWHERE].rows.values()}
    groups = by_device(recorded(tmp_path))
    assert {("hf (aaaaaaaa)", DEVICE), ("hf (bbbbbbbb)", DEVICE)} == {(name, DEVICE) for name, _ in groups}
    assert all(1 == len({whose(each.value) for each in rows}) for rows in groups.values())


def test_a_base_of_which_nothing_is_recorded_is_not_compared_with_another_of_its_name_and_fails(tmp_path):
    record(tmp_path, "a" * 64)
    found = Baseline.find(tmp_path, "hf", "nf4", "b" * 64)

    verdict = judge(row("b" * 64, "quality.perplexity"), found, mode="auto", fingerprint=DEVICE,
                    context={"base_hash": "b" * 64, "torch": "2"})  # fmt: skip

    assert ("not_comparable", True) == (verdict.outcome, verdict.fails)
    assert "another base of that name, or this one changed" in verdict.words


def test_of_a_name_that_the_suite_gives_there_is_one_base_at_a_time(tmp_path):
    record(tmp_path, "a" * 64, base="reference")

    words = record(tmp_path, "b" * 64, base="reference")

    assert ["reference"] == [path.name for path in tmp_path.iterdir()]
    assert "nf4: 2 recorded rows dropped: base_hash was" in words[0]


def test_baselines_of_another_base_are_not_merged_into_those_of_a_folder(tmp_path):
    record(tmp_path / "ours", "a" * 64)
    record(tmp_path / "theirs", "b" * 64)

    proposal = merged(tmp_path / "ours", Baseline.find(tmp_path / "theirs", "hf", "nf4", "b" * 64))

    assert {"new"} == {each.direction for each in proposal.changes}


# --- Local paths ------------------------------------------------------------------------------------------------------

parts = st.text("abz09 _.-", min_size=1, max_size=8).filter(lambda part: part.strip(". ") == part)


@given(
    st.lists(parts, min_size=2, max_size=5), st.sampled_from(["{}", "'{}'", "--base={}", "--base '{}' -m x", "`{}`"])
)
def test_of_a_path_only_its_last_part_is_shown(path, around):
    quoted = any(sign in around for sign in "'`")
    path = path if quoted else [part.replace(" ", "_") for part in path]
    text = around.format("/" + "/".join(path))

    assert around.format(f"…/{path[-1]}") == without_paths(text) == without_paths(without_paths(text))


@pytest.mark.parametrize(
    "text", ["2.1 -> 3 ms/token (+42.9 %)", "owner/name", "https://host.example/v1/chat", "a / b", "tables/E14 and 1/3"]
)
def test_what_is_no_local_path_stays(text):
    assert text == without_paths(text)


def test_a_report_has_no_folder_of_the_machine_that_the_journal_was_written_on(tmp_path):
    path, secret = tmp_path / "journal.jsonl", "/srv/ann/my models"
    with Journal(path) as lines:
        lines.start({"base": "hf", "base_hash": "a" * 64, "fingerprint": DEVICE, "commit": "abc",
                     "command": f"pytest bench --base '{secret}/hf' --data ~/texts/mine"})  # fmt: skip
        for recipe in ("fp16", "nf4"):
            lines.append(row("a" * 64, "quality.perplexity", recipe, lines.run))
        failed = row("a" * 64, "efficiency.stored_bytes", run=lines.run)
        reason = f"CheckpointError: '{secret}/hf/model.safetensors' is not there"
        lines.append(replace(failed, value=None, status="failed", reason=reason))
        key = failed.key
        words = f"nf4: {key} is invalid: {reason}; see `pytest bench --base '{secret}/hf'`"
        lines.append({"kind": "verdict", "recipe": "nf4", "key": key, "outcome": "invalid", "words": words})
        lines.end("failed")

    files = write(tmp_path / "report", *measured(path))

    assert len(files) > 6
    for file in files:
        content = file.read_bytes()
        assert not [each for each in ("ann", "my models", "texts/mine") if each.encode() in content], file
    assert "…/model.safetensors" in (tmp_path / "report" / "summary.md").read_text()
    assert secret in path.read_text()  # the journal keeps what helps whoever ran it


def test_history_names_bases_apart(tmp_path):
    path = journal(tmp_path / "journal.jsonl", *((base_hash, MEASURED) for base_hash in BASES))

    with redirect_stdout(StringIO()) as said:
        history.main(["--journal", str(path), "--storage", str(tmp_path / "none"), "--metric", "perplexity"])

    assert all(f"of hf ({short(base_hash)}) on" in said.getvalue() for base_hash in BASES)
