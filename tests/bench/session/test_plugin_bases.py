"""The command on bases and texts that share a name, that lie elsewhere, or that changed where they lie."""

import json
import shutil

import pytest
from checkpoints import change_tensors
from commands import PERPLEXITY, RTN, SIZE

from bench.results.journal import read
from compression import locate

pytest_plugins = ["pytester"]

GPTQ = "gptq(group_size=32,samples=2,sequence_length=32)"


@pytest.fixture
def hf(checkpoint, tmp_path):
    """Makes folders that are called hf, each with a checkpoint of its own."""

    def make(place, shift=0.0):
        copied = shutil.copytree(checkpoint, tmp_path / place / "hf")
        change_tensors(copied, lambda tensors: tensors["model.norm.weight"].add_(shift))
        return copied

    return make


def text(folder, words="The quick brown fox jumps over the lazy dog, twice a day. ", split="test"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text(words * 60)
    return folder


def files_with(words, *folders):
    """The files that hold a text, of those that a run has written."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if str(words).encode() in path.read_bytes()]


def perplexities(pytester):
    return [row for row in read(pytester.path / ".bench" / "journal.jsonl").rows() if row.of == "perplexity"]


def test_two_bases_of_one_name_share_no_line_no_file_and_no_run(run, pytester, hf, tmp_path):
    one, other, data = hf("A"), hf("B", 1.0), text(tmp_path / "data")
    run(SIZE, "--model", RTN, "--update-baselines", base=one).assert_outcomes(passed=1)
    found = run(PERPLEXITY, "--model", RTN, "--data", data, "--length", 32, "--report", "report", "--update-baselines",
                base=other)  # fmt: skip
    found.assert_outcomes(passed=1)

    assert 2 == len(list((pytester.path / "baselines").glob("hf-*")))
    rows = json.loads((pytester.path / "report" / "results.json").read_text())
    assert {locate(str(other)).digest} == {row["base_hash"] for row in rows}
    assert f"hf ({rows[0]['base_hash'][:8]})" in (pytester.path / "report" / "tables.md").read_text()
    assert not files_with(tmp_path / "B", pytester.path / "baselines", pytester.path / "report")
    assert not files_with(data, pytester.path / "baselines", pytester.path / "report")
    assert not files_with(pytester.path, pytester.path / "baselines", pytester.path / "report")


def test_a_base_that_was_trained_in_place_is_another(run, pytester, hf):
    base = hf("A")
    run(SIZE, "--model", RTN, "--update-baselines", base=base).assert_outcomes(passed=1)
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    run(SIZE, "test_other.py", "--model", RTN, base=base).assert_outcomes(passed=1, failed=1)
    change_tensors(base, lambda tensors: tensors["model.norm.weight"].add_(1))

    resumed = run(SIZE, "test_other.py", "--model", RTN, "--resume", base=base)
    changed = run(SIZE, "--model", RTN, base=base)

    assert resumed.ret == pytest.ExitCode.USAGE_ERROR
    resumed.stderr.fnmatch_lines(["*--resume: the unfinished run * had base_hash * start a new run without --resume*"])
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*base_hash was * another base of that name, or this one changed*"])
    assert 2 == len({row.base_hash for row in read(pytester.path / ".bench" / "journal.jsonl").rows()})


def test_a_resumed_run_measures_anew_what_read_a_text_that_changed(run, pytester, hf, tmp_path):
    base, data = hf("A"), text(tmp_path / "data")
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    settings = (PERPLEXITY, "test_other.py", "--model", "fp16", "--data", data, "--length", 32)
    run(*settings, base=base).assert_outcomes(passed=1, failed=1)
    run(*settings, "--resume", base=base).assert_outcomes(passed=1, failed=1)
    rows = perplexities(pytester)
    text(data, "A lazy dog jumps over the quick brown fox, twice a week. ")

    run(*settings, "--resume", base=base).assert_outcomes(passed=1, failed=1)

    after = perplexities(pytester)
    assert 2 * len(rows) == len(after) and 1 == len({row.run for row in after})
    assert 2 == len({row.inputs["data"].digest for row in after})


@pytest.mark.process
def test_copies_of_base_and_texts_are_compared_wherever_they_lie_and_changed_texts_are_named(run, hf, tmp_path):
    base, data = hf("A"), text(tmp_path / "data")
    notes = text(tmp_path / "x" / "notes", "A rain in spring, a storm in autumn, snow in winter. ", "train")
    settings = (PERPLEXITY, "--model", GPTQ, "--length", 32)

    def measured(base, data, calibration, *more):
        return run(*settings, "--data", data, "--calibration", calibration, *more, base=base)

    measured(base, data, notes, "--update-baselines").assert_outcomes(passed=1)
    copies = (shutil.copytree(each, tmp_path / "elsewhere" / f"copy of {each.name}") for each in (data, notes))
    measured(shutil.copytree(base, tmp_path / "C" / "hf"), *copies, "--gate", "strict").assert_outcomes(passed=1)

    text(notes, "A rain in autumn, a storm in winter, snow in spring. ", "train")
    found = measured(base, data, notes)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*the calibration text changed: notes had the digest *, notes has *record it again*"])
    found.stdout.no_fnmatch_line("*perplexity*regressed*")

    text(data, "A lazy dog jumps over the quick brown fox, twice a week. ")
    found = measured(base, data, notes)
    found.stdout.fnmatch_lines(["*the data changed: data had the digest *, data has *"])


def test_a_text_that_cannot_be_read_is_refused_before_anything_is_measured(run, pytester, tmp_path):
    notes = text(tmp_path / "notes", "Some text. ", "train")
    (notes / "more.jsonl").write_text("{}")

    found = run(SIZE, "--model", GPTQ, "--calibration", notes)

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*more.jsonl:1: calibration needs an object with the field text or content on each *"])
    assert not (pytester.path / ".bench").exists()
