"""What a run says below its table: failures whole, what was not compared as a count, and the verdict last."""

import re
from types import SimpleNamespace

import pytest
from report_rows import LATENCY, LOAD, PERPLEXITY, SIZE, row

from bench.gate.recording import recorded, write
from bench.gate.verdicts import verdicts
from bench.session.summary import ending, lines

HERE, THERE = "cpu-amd-epyc-f25m1-avx2-1t", "cpu-intel-xeon-f6m207-avx512-1t"
COMMAND = "pytest bench -m efficiency --update-baselines"
RECIPES = ["nf4", *(f"rtn(bits={bits},group_size={size})" for bits in (2, 3, 4, 8) for size in (16, 32, 64, 128))]


def rows_of(recipes, device, *, size=15_728_640.0, latency=2.1):
    for recipe in recipes:
        yield row("efficiency.stored_bytes", size, recipe, device=device, base_value=50_331_648.0)
        yield row(PERPLEXITY, 2.7, recipe, device=device)
        yield row(LATENCY, latency, recipe, device=device, base_value=3.0, params=LOAD)
        yield row("efficiency.decode_ms", latency, recipe, device=device, base_value=3.0, params=LOAD)


def run_of(rows, before=(), *, mode="auto", update=False, tmp_path="nowhere"):
    """A run on HERE with these rows, and `before` recorded on the device of its rows."""
    before, rows = list(before), list(rows)
    context = {"base_hash": None, "data_hash": None, "torch": "2.0", "commit": None}
    there = before[0].device if before else HERE
    known = {each.new.recipe: each.new for each in recorded(tmp_path, before, context, there)}
    baselines = {each.recipe: known.get(each.recipe) for each in rows}
    found = verdicts(
        rows, baselines, mode="off" if update else mode, fingerprint=HERE, context=context, command=COMMAND
    )
    options = SimpleNamespace(gate=mode, update=update, command="pytest bench", baselines="baselines",
                              record_command=COMMAND)  # fmt: skip
    by_row, verdicts_of = ({(each.recipe, each.key): each for each in all_} for all_ in (rows, found))
    return SimpleNamespace(
        rows=by_row, verdicts=verdicts_of,
        kernels={}, notes={}, steps={}, proposals=[], baselines=baselines, fingerprint=HERE, options=options,
        source=SimpleNamespace(label="reference"), journal=SimpleNamespace(path="journal.jsonl"),
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 17])
def test_on_another_processor_one_line_with_a_count_says_what_was_not_compared(count):
    recipes = RECIPES[:count]
    run = run_of(rows_of(recipes, HERE), rows_of(recipes, THERE))

    *said, verdict = ending(run)

    assert [f"record a baseline of the {2 * count} rows that have none here with: {COMMAND}"] == said
    assert verdict == (
        f"gate: {2 * count} passed, 0 failed, {2 * count} not comparable "
        "(recorded on another processor; `-v` lists them)"
    )
    listed = [line for line in ending(run, verbose=True) if "not compared: measured on" in line]
    assert 2 * count == len(listed) == len(set(listed))
    assert all(HERE in line and THERE in line for line in listed)


def test_on_the_recorded_processor_nothing_is_said_of_what_was_not_compared():
    run = run_of(rows_of(RECIPES, HERE), rows_of(RECIPES, HERE))

    assert ["gate: 68 passed, 0 failed"] == ending(run) == ending(run, verbose=True)


def test_another_number_of_threads_is_said_with_the_setting_that_compares_them():
    run = run_of(rows_of(["nf4"], HERE), rows_of(["nf4"], HERE.replace("-1t", "-8t")))

    assert "(recorded with 8 threads: set OMP_NUM_THREADS=8; `-v` lists them)" in ending(run)[-1]


def test_rows_that_are_not_comparable_for_several_reasons_are_counted_by_each():
    more = row("efficiency.sparsity", 0.5, "nf4", device=HERE)
    run = run_of([*rows_of(["nf4"], HERE), more], rows_of(["nf4"], THERE))

    assert "3 not comparable (2 recorded on another processor, 1 not in the baseline; `-v`" in ending(run)[-1]


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("count", [1, 17])
def test_every_failure_is_whole_and_names_metric_baseline_now_and_tolerance(count, verbose):
    recipes = RECIPES[:count]
    run = run_of(rows_of(recipes, HERE, size=15_728_641.0), rows_of(recipes, THERE))

    *said, verdict = ending(run, verbose=verbose)

    assert [
        f"FAILED {recipe}: efficiency.stored_bytes regressed: baseline 15728640, now 15728641 B "
        "(+6.36e-06 %, tolerance +0 %)"
        for recipe in recipes
    ] == [line for line in said if line.startswith("FAILED")]
    assert verdict.startswith(f"gate FAILED: {count} passed, {count} failed ({count} regressed), {2 * count} not")


def test_strict_says_once_per_recipe_what_it_fails_for_want_of_a_baseline_here():
    run = run_of(rows_of(RECIPES, HERE), rows_of(RECIPES, THERE), mode="strict")

    said = [line for line in ending(run) if line.startswith("FAILED")]

    assert RECIPES == [line.removeprefix("FAILED ").partition(": ")[0] for line in said]
    assert all("efficiency.decode_ms" in line and "efficiency.latency_ms" in line for line in said)
    assert all(f"record this device with `{COMMAND}`" in line for line in said)
    assert "gate FAILED: 34 passed, 34 failed (34 not comparable)" == ending(run)[-1]


def test_a_measurement_that_failed_is_one_line_for_all_of_its_metrics():
    failed = [
        row(metric, None, "nf4", device=HERE, status="failed", reason="OSError: no room", params=LOAD)
        for metric in (LATENCY, "efficiency.decode_ms")
    ]

    *said, verdict = ending(run_of(failed, rows_of(["nf4"], HERE)))

    assert 1 == len([line for line in said if "OSError: no room" in line])
    assert "2 failed (2 invalid)" in verdict


def test_without_any_baseline_there_is_one_line_with_the_command_that_records_one():
    run = run_of(rows_of(RECIPES, HERE))

    assert [f"gate: no baseline to compare 68 rows with; record one with: {COMMAND}"] == ending(run)
    assert 1 + 68 == len(ending(run, verbose=True))


def test_strict_fails_without_any_baseline():
    run = run_of(rows_of(["nf4"], HERE), mode="strict")

    assert "gate FAILED: 0 passed, 4 failed (4 no baseline)" == ending(run)[-1]


@pytest.mark.parametrize("verbose", [False, True])
def test_of_many_improvements_three_are_printed_and_the_rest_counted(verbose):
    run = run_of(rows_of(RECIPES, HERE, size=15_728_000.0), rows_of(RECIPES, HERE))

    *said, verdict = ending(run, verbose=verbose)

    assert (17 if verbose else 3) == sum("record it" in line for line in said)
    assert ("and 14 more improved (-v lists them)" in said) == (not verbose)
    assert "gate: 51 passed, 0 failed, 17 improved" == verdict


def test_what_fails_besides_the_rows_fails_the_gate_and_is_said_once():
    run = run_of(rows_of(["nf4"], HERE, size=16e6), rows_of(["nf4"], HERE))
    [failed] = [each.words for each in run.verdicts.values() if each.fails]

    *said, verdict = ending(run, [failed, "--report out: no room"])

    assert [f"FAILED {failed}", "FAILED --report out: no room"] == said
    assert "gate FAILED: 3 passed, 2 failed (1 regressed, 1 besides)" == verdict


def test_a_gate_that_is_off_says_so():
    assert ["gate: off, nothing was compared"] == ending(run_of(rows_of(["nf4"], HERE), mode="off"))


@pytest.mark.parametrize("verbose", [False, True])
def test_recording_says_counts_and_what_moved_and_new_rows_with_v_alone(tmp_path, verbose):
    run = run_of(rows_of(["nf4"], HERE, size=16e6), update=True)
    new = [*rows_of(["nf4"], HERE, size=16e6), row("efficiency.sparsity", 0.5, "nf4", device=HERE)]
    context = {"base_hash": None, "data_hash": None, "torch": "2.0", "commit": None}
    write(tmp_path, recorded(tmp_path, rows_of(["nf4"], HERE), context, HERE))
    run.proposals = recorded(tmp_path, new, context, HERE)

    said = list(lines(run, verbose=verbose))

    assert "recorded nf4: 1 worse, 1 new, 3 as before" in said
    assert 1 == sum("efficiency.stored_bytes worse: 15728640 -> 16000000 B" in line for line in said)
    assert verbose == any("efficiency.sparsity new" in line for line in said)
    assert ["gate: off while recording; 1 baseline recorded in baselines"] == ending(run)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_run_is_in_groups_in_at_most_four_digits_and_fits_the_terminal(count, width):
    run = run_of(rows_of(RECIPES[:count], HERE, size=15_728_641.0, latency=2.123456), rows_of(RECIPES, HERE))

    shown = list(lines(run, width=width))

    assert max(map(len, shown)) <= width
    groups = [line for line in shown if re.match("[A-Z]", line)]
    assert ["SIZE", "SPEED, batch=1, mode=eager", "PERPLEXITY"] == groups
    assert "15.73 M" in "".join(shown) and "2.123" in "".join(shown)
    assert not re.search(r"\d{5}|\d\.\d{4}", "".join(shown))
    assert shown[:3] == [f"base reference on {HERE}", "journal journal.jsonl", ""]


def test_grids_and_kernels_are_said_with_v_alone():
    run = run_of([row(SIZE, 1.0, recipe) for recipe in ("rtn", "gptq")])
    run.kernels = {"rtn": {"lut4": 56}, "gptq": {"lut4": 56}}

    assert not [line for line in lines(run) if line.startswith(("grids", "kernels"))]
    said = list(lines(run, verbose=True))
    assert "grids: rtn, gptq 4 bits in groups of 128, asymmetric" in said
    assert "kernels: rtn, gptq 56 lut4" in said
