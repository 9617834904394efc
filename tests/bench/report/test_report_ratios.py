"""Times and memory in the report: ratios to the base of the same run, laid on one value of it."""

from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_rows import LATENCY, LOAD, PERPLEXITY, SIZE, cells, contents_of, row, table_of

from bench.__main__ import main as command
from bench.metrics import all_metrics
from bench.report import figures
from bench.report.overview import COSTS, Overview
from bench.report.page import page
from bench.report.pull_request import numbers
from bench.report.recommend import Limits, points_of, recommend
from bench.report.tables import tables
from bench.results.journal import Journal

TIMED = {  # metric: table and column
    LATENCY: ("E14", "Latency (ms/tok)"),
    "efficiency.ttft_ms": ("E14", "TTFT (ms)"),
    "efficiency.throughput": ("E14", "Throughput (tok/s)"),
    "efficiency.mfu": ("E14", "MFU (%)"),
    "efficiency.energy_mj_per_token": ("E14", "Energy (mJ/tok)"),
    "efficiency.prefill_ms": ("E14", "Prefill (ms)"),
    "efficiency.decode_ms": ("E14", "Decode (ms/tok)"),
    "efficiency.peak_memory_mb": ("E14", "Memory (MiB)"),
    "efficiency.memory_efficiency": ("E15", "Memory Efficiency"),
    "rag.generation_ms": ("E30", "RAG Gen Time (ms)"),
    "rag.throughput": ("E30", "RAG Throughput (tok/s)"),
}
FAST, SLOW = "nf4", "rtn"  # by ratio; the hour of FAST is a slow one


def measured(metric, recipe, ratio, hour=1.0, *, base=4.0, rounds=10):
    """A row of a recipe whose rounds, and the base's beside them, take so many times longer in its hour."""
    drift = [1 + 0.02 * number for number in range(rounds)]
    theirs = tuple(base * hour * each for each in drift)
    own = tuple(ratio * each for each in theirs)
    return row(metric, median(own), recipe, base_value=median(theirs), samples=own, base_samples=theirs, params=LOAD)


def report(metric=LATENCY, hour=3.0):
    """The base, and two recipes, the faster of which was measured in an hour that was slower by that factor."""
    fastest, slowest = (0.9, 0.5) if all_metrics()[metric].better == "higher" else (0.5, 0.9)
    rows = [row(metric, 4.0, "fp16", params=LOAD, samples=(4.0,) * 10), measured(metric, FAST, fastest, hour),
            measured(metric, SLOW, slowest)]  # fmt: skip
    rows += [row(SIZE, size, recipe, base_value=2.0) for recipe, size in ((FAST, 1.0), (SLOW, 1.1))]
    return rows + [row(PERPLEXITY, 2.0 + at / 10, each) for at, each in enumerate(("fp16", SLOW, FAST))]


def test_every_metric_of_a_time_or_of_a_peak_is_by_ratio_and_nothing_else_is():
    assert {name for name, each in all_metrics().items() if each.by_ratio and each.of not in ("against", "cost")} == {
        *TIMED, "efficiency.speedup", "rag.no_rag_generation_ms", "rag.no_rag_throughput", "rag.retrieval_ms",
        *(f"efficiency.rate_{name}" for name in ("throughput", "ttft_ms", "ttft_p99_ms", "step_ms", "step_p99_ms")),
    }  # fmt: skip


@pytest.mark.parametrize("metric", TIMED)
def test_the_best_is_best_by_ratio_whatever_the_hour(metric):
    number, head = TIMED[metric]
    hour = 1 / 3 if all_metrics()[metric].better == "higher" else 3.0
    rows = report(metric, hour)
    by_value = sorted(rows[1:3], key=lambda each: each.value, reverse=all_metrics()[metric].better == "higher")
    assert [SLOW, FAST] == [each.recipe for each in by_value]

    found = cells(table_of(rows, number, "quantization"))

    assert {"fp16": 4.0, FAST: rows[1].ratio * 4, SLOW: rows[2].ratio * 4} == pytest.approx(
        {recipe: found[recipe][head].value for recipe in found}
    )
    assert [False, True, False] == [found[recipe][head].best for recipe in ("fp16", FAST, SLOW)]


@given(hours=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)))
def test_how_fast_the_machine_was_beside_a_recipe_changes_no_cell(hours):
    def shown(*hours):
        rows = [row(LATENCY, 4.0, "fp16", params=LOAD), *(measured(LATENCY, recipe, ratio, hour) for recipe, ratio, hour
                in zip((FAST, SLOW), (0.5, 0.9), hours, strict=True))]  # fmt: skip
        table = table_of(rows, "E14")
        return [[cell.text for cell in line.cells] for line in table.lines], [line[1].best for line in map(
            lambda line: (line, line.cells[2]), table.lines)]  # fmt: skip

    assert shown(1.0, 1.0) == shown(*hours)


def test_the_interval_is_that_of_the_rounds_ratios_so_that_what_falls_on_both_sides_cancels():
    found = cells(table_of(report(), "E14"))[FAST]["Latency (ms/tok)"]

    assert (found.low, found.value, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_caption_says_which_value_of_the_base_and_how_far_it_was_from_those_of_the_runs():
    [said] = [each for each in table_of(report(), "E14").remarks if "ratio to fp16" in each]

    assert "Latency (ms/tok) 4 (4.36 to 13.08 beside the recipes)" in said
    assert said in numbers(report())[-1] or "Latency (ms/tok) 4 (4.36 to 13.08" in numbers(report())[-1]


def test_without_a_row_of_the_base_the_ratios_lie_on_one_of_the_values_that_were_measured_beside_them():
    found = cells(table_of(report()[1:], "E14"))

    assert found[FAST]["Latency (ms/tok)"].value == pytest.approx(0.5 * found["fp16"]["Latency (ms/tok)"].value)
    assert found[SLOW]["Latency (ms/tok)"].value == pytest.approx(0.9 * found["fp16"]["Latency (ms/tok)"].value)


def test_a_time_without_a_ratio_is_shown_as_measured_and_is_neither_marked_nor_on_a_front_nor_recommended():
    rows = [*report(), row(LATENCY, 0.1, "hqq", params=LOAD), row(SIZE, 1.5, "hqq", base_value=2.0),
            row(PERPLEXITY, 9.0, "hqq")]  # fmt: skip

    table = table_of(rows, "E14")
    cell = cells(table)["hqq"]["Latency (ms/tok)"]

    assert (0.1, False) == (cell.value, cell.best)
    assert cells(table)[FAST]["Latency (ms/tok)"].best
    assert any("Latency (ms/tok): measured without a ratio" in each for each in table.remarks)
    assert "hqq" not in Overview(rows).values(COSTS[1])
    assert "hqq" not in {each.recipe for each in recommend(points_of(rows, "perplexity")[0], Limits(), "latency").taken}


def test_costs_of_compressing_have_no_ratio_and_no_best():
    rows = [row("efficiency.compression_seconds", value, recipe) for recipe, value in ((FAST, 1.0), (SLOW, 2.0))]

    assert not any(cell.best for table in tables([*rows, row(SIZE, 1.0, FAST)]) for line in table.lines
                   for cell in line.cells)  # fmt: skip


def test_front_and_overview_rank_by_ratio():
    table = Overview(report())

    assert {"fp16": 4.0, FAST: 2.0, SLOW: 3.6} == pytest.approx(table.values(COSTS[1]))
    [latency] = [chart for group in figures.fronts(table, dict.fromkeys(("fp16", FAST, SLOW), "a"), "reference")
                 for chart in group["charts"] if chart["cost"] == COSTS[1].head]  # fmt: skip
    assert FAST in latency["best"]
    assert "ratio to fp16" in page(report(), contents_of(report()))


def test_recommend_ranks_and_limits_by_ratio(tmp_path, capsys):
    with Journal(tmp_path / "journal.jsonl", run="r1") as journal:
        for each in report():
            journal.append(each)

    def answer(*options):
        command(["recommend", "--journal", str(tmp_path / "journal.jsonl"), *options])
        return capsys.readouterr().out

    fastest = answer("--fastest")
    assert f"| {FAST} |" in fastest
    assert f"| {SLOW} |" not in fastest
    assert "| 2 |" in fastest
    assert "Latency (ms/tok) 4 (4.36 to 13.08 beside the recipes)" in fastest
    assert f"| {SLOW} " not in answer("--max-latency", "3")


def test_a_row_whose_sides_have_different_numbers_of_rounds_has_no_interval():
    rows = report()
    rows[1] = replace(rows[1], samples=rows[1].samples[:-1])

    assert cells(table_of(rows, "E14"))[FAST]["Latency (ms/tok)"].low is None
