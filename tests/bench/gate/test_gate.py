"""The gate: what passes, what fails, and in which words."""

import time
from dataclasses import replace

import pytest
from healthy_results import (
    CONTEXT,
    ELSEWHERE,
    FINGERPRINT,
    HEALTHY_METRICS,
    gated,
    healthy_row,
    healthy_rows,
    judged,
    metrics_and_rows,
    recorded,
    timed_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from saboteurs import BROKEN_RESULTS, scaled

from bench.errors import OptionError
from bench.gate import verdicts


@settings(deadline=None)
@given(metrics_and_rows(), st.sampled_from(["auto", "strict"]))
def test_a_row_passes_against_itself(case, mode):
    metric, row = case

    verdict = judged(row, row, mode=mode, metrics={metric.name: metric})

    assert (verdict.outcome, verdict.fails) == ("pass", False)


@settings(deadline=None)
@given(metrics_and_rows(), st.floats(1.001, 10))
def test_what_is_worse_beyond_every_tolerance_never_passes_and_what_is_better_never_regresses(case, excess):
    metric, row = case
    factor = (1 + max(metric.rel, metric.rel_absolute or 0, 0.001)) * excess
    if metric.better == "higher":
        factor = (1 - max(metric.rel, metric.rel_absolute or 0, 0.001)) / excess
    value = row.value * factor
    worse = replace(
        row,
        value=value,
        ratio=None if row.ratio is None else value / row.base_value,
        samples=tuple(each * factor for each in row.samples),
    )
    exact = metric.kind in ("counted", "deterministic")

    forth = judged(worse, row, metrics={metric.name: metric}).outcome
    back = judged(row, worse, metrics={metric.name: metric}).outcome

    if metric.better == "neither":
        assert {"regressed" if exact else "pass"} == {forth, back}
    else:
        assert forth in ("regressed", "inconclusive")
        assert back in ("improved", "pass")
        if not row.samples:
            assert forth == "regressed"


@pytest.mark.parametrize("saboteur", BROKEN_RESULTS, ids=lambda each: each.__name__)
def test_broken_results_fail(saboteur):
    found = gated(saboteur(healthy_rows()), healthy_rows(seed=7))

    assert [each.words for each in found if each.fails]


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_of_the_same_thing_pass_with_noise_of_a_few_per_cent(seed):
    found = gated(
        healthy_rows(noise=0.03, seed=1000 + 2 * seed), healthy_rows(noise=0.03, seed=2 * seed), mode="strict"
    )

    assert {"pass"} == {each.outcome for each in found}


def test_a_regression_names_metric_baseline_now_tolerance_and_the_side_that_moved():
    before = healthy_row(value=2.1, base_value=2.3, params={"batch": 1})
    verdict = judged(replace(before, value=3.0, ratio=3.0 / 2.29, base_value=2.29), before)

    assert verdict.outcome == "regressed"
    assert verdict.words == (
        "nf4: efficiency.decode_ms[batch=1] regressed: "
        "ratio to fp16 baseline 0.913, now 1.31 (+43.5 %, tolerance +15 %); "
        "baseline 2.1, now 3 ms/token (+42.9 %, tolerance +25 %); "
        "nf4 2.1 -> 3 ms/token (+42.9 %), fp16 2.3 -> 2.29 ms/token (-0.435 %): nf4 moved"
    )


@pytest.mark.parametrize(
    ("own", "base", "mover"), [(1.4, 1.0, "nf4 moved"), (1.06, 0.7, "fp16 moved"), (1.4, 1.4, "both moved")]
)
def test_the_side_that_moved_is_named(own, base, mover):
    assert mover in judged(scaled(timed_row(), own, base), timed_row()).words


def test_one_byte_is_seen_in_the_words():
    before = healthy_row("efficiency.stored_bytes", value=15_728_640.0)

    assert "baseline 15728640, now 15728641 B" in judged(replace(before, value=15_728_641.0), before).words


def test_scattered_samples_make_a_verdict_inconclusive_which_does_not_fail():
    before = timed_row(noise=0.4, seed=1)
    after = scaled(before, 1.2)

    for mode in ("auto", "strict"):
        verdict = judged(after, before, mode=mode)
        assert (verdict.outcome, verdict.fails) == ("inconclusive", False)
    assert f"{100 * (1 - 2 * verdicts.one_sided(verdicts.LEVEL, checks=2)):.6g} % interval" in verdict.words
    assert judged(scaled(timed_row(), 1.2), timed_row()).outcome == "regressed"


def test_what_is_below_the_floor_is_no_change():
    metric = replace(HEALTHY_METRICS["efficiency.decode_ms"], floor=0.5)
    before = healthy_row(value=1.0)

    outcomes = [
        judged(replace(before, value=value), before, metrics={metric.name: metric}).outcome for value in (1.5, 1.6, 0.6)
    ]
    assert outcomes == ["pass", "regressed", "pass"]


def test_an_improvement_fails_only_in_strict_mode_and_asks_to_be_recorded():
    auto, strict = (judged(scaled(timed_row(), 0.7), timed_row(), mode=mode) for mode in ("auto", "strict"))

    assert (auto.outcome, auto.fails, strict.fails) == ("improved", False, True)
    assert "record it" in auto.words


@pytest.mark.parametrize("saboteur", BROKEN_RESULTS, ids=lambda each: each.__name__)
def test_nothing_fails_when_the_gate_is_off(saboteur):
    assert not [each for each in gated(saboteur(healthy_rows()), healthy_rows(), mode="off") if each.fails]


def test_when_the_gate_is_off_what_is_invalid_is_still_said():
    lost = replace(timed_row(), value=None, ratio=None, status="failed", reason="the kernel crashed")

    verdict = judged(lost, timed_row(), mode="off")

    assert (verdict.outcome, verdict.fails) == ("invalid", False)
    assert "the kernel crashed" in verdict.words


def test_an_unknown_mode_is_refused_with_the_modes_there_are():
    with pytest.raises(OptionError, match="must be one of auto, strict, off, not 'lax'"):
        judged(timed_row(), timed_row(), mode="lax")


def test_more_rounds_are_taken_until_nothing_is_inconclusive_and_a_change_was_seen_twice():
    passing, unsure, slower, faster = (
        replace(judged(timed_row(), timed_row()), outcome=each)
        for each in ("pass", "inconclusive", "regressed", "improved")
    )

    assert verdicts.enough_rounds([passing], [])
    assert verdicts.enough_rounds([slower, passing], [slower, unsure])
    assert not verdicts.enough_rounds([unsure], [unsure])
    assert not verdicts.enough_rounds([slower], [])
    assert not verdicts.enough_rounds([slower], [faster])
    assert not verdicts.enough_rounds([replace(slower, key="another")], [slower])


def test_more_recorded_rows_lower_the_level_of_each_and_results_per_item_have_their_own_half():
    rows = healthy_rows()
    alone = verdicts.levels([recorded(rows[:1])], FINGERPRINT, CONTEXT)
    whole = verdicts.levels([recorded(rows)], FINGERPRINT, CONTEXT)

    assert alone == (verdicts.LEVEL / 2, verdicts.LEVEL / 2)
    assert whole == (verdicts.LEVEL / 4, verdicts.LEVEL / 2)
    assert verdicts.levels([recorded(rows), None, recorded(rows)], FINGERPRINT, CONTEXT).timed == verdicts.LEVEL / 8
    assert verdicts.levels([recorded(rows)], FINGERPRINT, ELSEWHERE).items == verdicts.LEVEL / 4


def test_judging_a_row_takes_less_than_adding_a_million_numbers():
    row, before = timed_row(), recorded([timed_row(seed=1)])
    judged(row, before)
    costs, measures = [], []
    for _ in range(20):
        start = time.process_time()
        judged(row, before)
        costs.append(time.process_time() - start)
        start = time.process_time()
        sum(range(1_000_000))
        measures.append(time.process_time() - start)

    assert min(costs) < min(measures)
