"""The command against baselines: recorded, compared, refused, damaged and broken on purpose."""

import json

import pytest
from commands import FILES, PERPLEXITY, RTN, SIZE
from processes import completed

from bench.gate.digest import sign

pytest_plugins = ["pytester"]


def _baseline(pytester, recipe="rtn-group-size-32"):
    [found] = (pytester.path / "baselines").glob(f"someones-llama-*/{recipe}*.json")
    return found


def test_a_recipe_without_a_baseline_passes_and_is_told_how_to_record_one(run):
    result = run(SIZE, "--model", RTN)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*stored_bytes (B)*", "gate: no baseline to compare 7 rows with; *--update-baselines"])


def test_strict_fails_without_a_baseline(run):
    result = run(SIZE, "--model", RTN, "--gate", "strict")
    result.assert_outcomes(failed=1)


def test_a_recorded_run_passes_and_one_more_stored_byte_fails_with_words(run, pytester):
    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    run(SIZE, "--model", RTN, "--gate", "strict").assert_outcomes(passed=1)
    path = _baseline(pytester)
    recorded = json.loads(path.read_text())
    recorded["rows"]["efficiency.stored_bytes"]["value"] -= 1
    path.write_text(json.dumps(recorded))
    unsigned = run(SIZE, "--model", RTN)
    assert unsigned.ret == pytest.ExitCode.USAGE_ERROR
    unsigned.stderr.fnmatch_lines([f"*is not what was recorded*python -m bench sign *{path.name}*"])
    sign(path)
    result = run(SIZE, "--model", RTN)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*efficiency.stored_bytes regressed*"])


def test_a_run_with_update_does_not_touch_what_it_did_not_measure(run, pytester, text_folder):
    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    run(PERPLEXITY, "--model", RTN, "--data", text_folder, "--length", 32, "--update-baselines").assert_outcomes(
        passed=1
    )
    rows = json.loads(_baseline(pytester).read_text())["rows"]
    assert "efficiency.stored_bytes" in rows
    assert any(key.startswith("quality.perplexity") for key in rows)


def test_losses_and_divergence_are_recorded_by_window_and_gated_by_them(run, pytester, text_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # wide enough for a line for each metric, whoever runs the tests
    divergence = f"{FILES / 'test_quality.py'}::test_divergence"
    settings = (PERPLEXITY, divergence, "--model", RTN, "--data", text_folder, "--length", 32)
    recorded = run(*settings, "--update-baselines")
    recorded.assert_outcomes(passed=2)
    recorded.stdout.re_match_lines([r" +nll .*x  [+-].* \[", r" +perplexity .*x  \[", r" +kl_to_base .*  \+.* \[\+"])
    run(*settings, "--gate", "strict").assert_outcomes(passed=2)

    path = next((pytester.path / "baselines").glob("someones-llama-*/items/*.json"))
    table = json.loads(path.read_text())
    assert 4 == len(table["rows"]) and 1 == len({row["asked"] for row in table["rows"].values()})
    path.write_text(path.read_text().replace('"values": "', '"values": "AAAA', 1))
    damaged = run(*settings)
    assert damaged.ret == pytest.ExitCode.USAGE_ERROR
    damaged.stderr.fnmatch_lines([f"*items*{path.name}*restore it from version control*"])


@pytest.mark.process
def test_programs_that_may_not_be_run_do_not_fail_against_a_baseline_of_a_run_that_ran_them(run):
    scores = [f"{FILES / 'test_quality.py'}::{name}" for name in ("test_task", "test_average")]
    settings = (*scores, "--model", "fp16", "--data", "embedded", "--tasks", "humaneval,hellaswag", "--limit", 2)
    run(*settings, "--allow-code-execution", "--update-baselines", base="reference").assert_outcomes(passed=3)

    unasked = run(*settings, base="reference")

    unasked.assert_outcomes(passed=3)
    unasked.stdout.re_match_lines([r".*HumanEval.*--allow-code-execution"])
    run(*settings, "--allow-code-execution", "--gate", "strict", base="reference").assert_outcomes(passed=3)


def test_a_failed_run_records_nothing(run, pytester):
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    result = run(SIZE, "test_other.py", "--model", RTN, "--update-baselines")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*baselines were not updated*"])
    assert not (pytester.path / "baselines").exists()


def test_what_a_failed_run_did_measure_is_recorded_by_force(run, pytester):
    pytester.makepyfile(test_other="def test_fails():\n    assert False")
    result = run(SIZE, "test_other.py", "--model", RTN, "--update-baselines", "--force-update")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert json.loads(_baseline(pytester).read_text())["context"]["forced"] is True


def test_nothing_is_recorded_from_a_tree_with_changed_files_unless_forced(run, pytester):
    (pytester.path / "method.py").write_text("a = 1")
    for words in ("init -q", "add method.py", "-c user.name=a -c user.email=a@b.example commit -qm a"):
        completed(["git", *words.split()], cwd=pytester.path, check=True)
    (pytester.path / "method.py").write_text("a = 2")

    refused = run(SIZE, "--model", RTN, "--update-baselines")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*1 tracked files differ*(method.py); commit or stash them*--force-update*"])
    assert not (pytester.path / ".bench").exists()

    run(SIZE, "--model", RTN, "--update-baselines", "--force-update").assert_outcomes(passed=1)
    assert json.loads(_baseline(pytester).read_text())["context"]["commit"].endswith("+")


def test_a_vanished_metric_is_missed(run, pytester, monkeypatch):
    from bench.metrics.registry import METRICS

    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    monkeypatch.delitem(METRICS, "efficiency.model_size_gb")
    result = run(SIZE, "--model", RTN)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*efficiency.model_size_gb is in the baseline but was not measured*"])


def test_another_checkpoint_under_the_same_name_does_not_pass(run, pytester, checkpoint, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    run(SIZE, "--model", RTN, "--update-baselines").assert_outcomes(passed=1)
    other = tmp_path / "someones-llama"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = run(SIZE, "--model", RTN, base=other)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*base_hash*"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "baseline"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "schema=99"),
        (lambda text: text.replace('"value": ', '"value": NaN, "was": ', 1), "NaN"),
        (lambda text: text.replace('"rows": {', '"rows": {"efficiency.stored_bytes": {}, ', 1), "stored_bytes"),
    ],
    ids=["not-json", "another-schema", "nan", "duplicate-row"],
)  # fmt: skip
def test_a_damaged_baseline_stops_the_run_before_it_starts(run, pytester, damage, words):
    run(SIZE, "--model", RTN, "--update-baselines")
    path = _baseline(pytester)
    path.write_text(damage(path.read_text()))
    result = run(SIZE, "--model", RTN)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{path.name}*"])
    assert words in result.stderr.str()
