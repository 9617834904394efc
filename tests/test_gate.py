"""The gate and its baselines: what passes, what fails, and in which words."""

import math
import random
import statistics
import time
from dataclasses import replace
from statistics import median

import pytest
import scipy.stats
from healthy_results import (
    ANSWERS,
    CONTEXT,
    FINGERPRINT,
    HEALTHY_METRICS,
    OTHER_MACHINE,
    healthy_row,
    healthy_rows,
    item_row,
    judged,
    metrics_and_rows,
    recorded,
    timed_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from saboteurs import (
    BROKEN_ITEMS,
    BROKEN_RESULTS,
    every_window_loses_half_a_thousandth,
    lose,
    other_questions_are_asked,
    results_per_item_vanish,
    scaled,
    with_items,
)

from bench import gate
from bench._errors import OptionError
from bench._shift import _weights, quantile, shift
from bench.gate import Verdict, judge, missing, verdicts
from bench.items import Items, hashes_of
from bench.rows import Row


def gated(rows: list[Row], before: list[Row], *, mode="auto", context=CONTEXT) -> list[Verdict]:
    return verdicts(
        rows,
        {"nf4": recorded(before)},
        mode=mode,
        fingerprint=FINGERPRINT,
        context=context,
        metrics=HEALTHY_METRICS,
    )


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


ELSEWHERE = CONTEXT | {"torch": "2.14.0"}  # where what is deterministic is no longer compared exactly


@pytest.mark.parametrize("saboteur", BROKEN_ITEMS, ids=lambda each: each.__name__)
def test_a_loss_that_the_tolerance_misses_is_seen_item_by_item_and_not_without_items(saboteur):
    before, after = healthy_rows(), saboteur(healthy_rows())
    seen = [each for each in gated(after, before, context=ELSEWHERE) if each.fails]

    assert ["regressed"] == [each.outcome for each in seen]
    assert "item by item" in seen[0].words and "95 % interval" in seen[0].words
    bare = [[replace(row, items=None) for row in rows] for rows in (after, before)]
    assert not any(each.fails for each in gated(*bare, context=ELSEWHERE))
    assert not any(each.fails for each in gated(before, before, context=ELSEWHERE, mode="strict"))
    improved = [each.outcome for each in gated(before, after, context=ELSEWHERE, mode="strict") if each.fails]
    assert ["improved"] == improved


def test_as_many_answers_won_as_lost_pass():
    after = with_items(healthy_rows(), "quality.accuracy", lambda values: lose(values, 60, 60))

    assert {"pass"} == {each.outcome for each in gated(after, healthy_rows(), mode="strict")}


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_another_device_passes_and_a_shift_below_its_floor_too(seed):
    numbers = random.Random(seed)
    noisy = with_items(healthy_rows(), "quality.nll", lambda each: [value + numbers.gauss(0, 3.5e-4) for value in each])
    shifted = with_items(healthy_rows(), "quality.nll", lambda each: [value * 1.00005 for value in each])

    for rows in (noisy, shifted):
        assert {"pass"} == {each.outcome for each in gated(rows, healthy_rows(), context=ELSEWHERE, mode="strict")}


def test_a_loss_beyond_the_tolerance_that_so_few_items_cannot_show_is_inconclusive():
    def few(right):
        return item_row("quality.accuracy", Items(hashes_of(range(20)), [k < right for k in range(20)], "binary"))

    verdict = judged(few(15), few(18))

    assert (verdict.outcome, verdict.fails) == ("inconclusive", False)
    assert "0.9 -> 0.75 fraction (-16.7 %)" in verdict.words and "p 0.25, 15 % flipped" in verdict.words
    assert "regressed" == judged(few(8), few(18)).outcome


def test_fewer_reals_than_any_test_can_be_sure_of_are_compared_by_tolerance():
    def few(factor, count):
        return item_row(
            "quality.nll", Items(hashes_of(range(count)), [factor * k for k in range(1, count + 1)], "real")
        )

    outcomes = [judged(few(1.0005, n), few(1, n), context=ELSEWHERE).outcome for n in (7, 8)]

    assert ["pass", "regressed"] == outcomes
    assert "regressed" == judged(few(1.002, 7), few(1, 7), context=ELSEWHERE).outcome


def test_a_baseline_without_items_is_compared_by_tolerance_as_before():
    before = replace(item_row("quality.accuracy", ANSWERS), items=None)
    after = with_items([item_row("quality.accuracy", ANSWERS)], "quality.accuracy", lambda each: lose(each, 20, 0))[0]

    assert "pass" == judged(after, before).outcome
    assert "regressed" == judged(replace(after, value=0.97 * before.value, items=None), before).outcome


@pytest.mark.parametrize("saboteur", [other_questions_are_asked, results_per_item_vanish], ids=lambda s: s.__name__)
def test_other_items_than_the_recorded_are_not_comparable_and_fail_in_words(saboteur):
    (found,) = [each for each in gated(saboteur(healthy_rows()), healthy_rows()) if each.fails]

    assert "not_comparable" == found.outcome
    assert ("0 of now 2000" in found.words) or ("no results per item" in found.words)
    assert "--update-baselines" in found.words


def test_where_values_are_compared_exactly_the_words_still_say_what_the_items_show():
    after = every_window_loses_half_a_thousandth(healthy_rows())
    (found,) = [each for each in gated(after, healthy_rows()) if each.fails]

    assert "allowed +1e-07 %" in found.words and "item by item" in found.words


@pytest.mark.parametrize("name", ["base_hash", "data_hash"])
def test_a_changed_checkpoint_or_changed_data_fails_and_says_what_changed(name):
    found = gated(healthy_rows(), healthy_rows(), context=CONTEXT | {name: "other"})

    assert all(each.fails and each.outcome == "not_comparable" for each in found)
    assert "was 'd1'" in found[0].words or "was 'b1'" in found[0].words
    assert "is 'other'" in found[0].words


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
        "ratio to fp16 0.913 -> 1.31 (+43.5 %, allowed +15 %); 2.1 -> 3 ms/token (+42.9 %, allowed +25 %); "
        "nf4 2.1 -> 3 ms/token (+42.9 %), fp16 2.3 -> 2.29 ms/token (-0.435 %): nf4 moved"
    )


@pytest.mark.parametrize(
    ("own", "base", "mover"), [(1.4, 1.0, "nf4 moved"), (1.06, 0.7, "fp16 moved"), (1.4, 1.4, "both moved")]
)
def test_the_side_that_moved_is_named(own, base, mover):
    assert mover in judged(scaled(timed_row(), own, base), timed_row()).words


def test_one_byte_is_seen_in_the_words():
    before = healthy_row("efficiency.stored_bytes", value=15_728_640.0)

    assert "15728640 -> 15728641" in judged(replace(before, value=15_728_641.0), before).words


def test_scattered_samples_make_a_verdict_inconclusive_which_does_not_fail():
    before = timed_row(noise=0.4, seed=1)
    after = scaled(before, 1.2)

    for mode in ("auto", "strict"):
        verdict = judged(after, before, mode=mode)
        assert (verdict.outcome, verdict.fails) == ("inconclusive", False)
    assert f"{100 * (1 - gate.LEVEL / gate.LOOKS):.6g} % interval" in verdict.words
    assert judged(scaled(timed_row(), 1.2), timed_row()).outcome == "regressed"


def test_what_is_below_the_floor_is_no_change():
    metric = replace(HEALTHY_METRICS["efficiency.decode_ms"], floor=0.5)
    before = healthy_row(value=1.0)

    outcomes = [
        judged(replace(before, value=value), before, metrics={metric.name: metric}).outcome for value in (1.5, 1.6, 0.6)
    ]
    assert outcomes == ["pass", "regressed", "pass"]


@pytest.mark.parametrize(
    ("torch", "machine", "factor", "outcome"),
    [
        ("2.13.0", FINGERPRINT, 1 + 1e-12, "pass"),
        ("2.13.0", FINGERPRINT, 1.0001, "regressed"),
        ("2.13.0", FINGERPRINT, 0.9999, "improved"),
        ("2.14.0", FINGERPRINT, 1.0001, "pass"),
        ("2.13.0", OTHER_MACHINE, 1.0001, "pass"),
        ("2.13.0", OTHER_MACHINE, 1.002, "regressed"),
    ],
)
def test_a_deterministic_number_is_exact_on_one_device_and_torch_and_to_a_thousandth_elsewhere(
    torch, machine, factor, outcome
):
    before = healthy_row("quality.perplexity", value=13.0)
    now = replace(before, value=13.0 * factor, device=machine)

    assert outcome == judged(now, before, context=CONTEXT | {"torch": torch}).outcome


def test_a_timing_of_another_device_is_not_compared_and_both_devices_are_named():
    now = replace(timed_row(), device=OTHER_MACHINE)

    auto, strict = (judged(now, timed_row(), mode=mode) for mode in ("auto", "strict"))

    assert (auto.outcome, auto.fails, strict.fails) == ("not_comparable", False, True)
    assert FINGERPRINT in auto.words
    assert OTHER_MACHINE in auto.words


def test_an_estimate_is_not_compared_with_a_measurement():
    estimate = replace(timed_row(), status="estimated", reason="no counter on this machine")

    verdict = judged(estimate, timed_row())

    assert (verdict.outcome, verdict.fails) == ("not_comparable", False)
    assert "no counter on this machine" in verdict.words


@pytest.mark.parametrize(("mode", "fails"), [("auto", False), ("strict", True)])
@pytest.mark.parametrize(
    ("baseline", "outcome"),
    [(None, "no_baseline"), (recorded([healthy_row("rag.f1", value=0.5)]), "new")],
    ids=["no_baseline", "new"],
)
def test_what_is_not_recorded_names_the_command_that_records_it(mode, fails, baseline, outcome):
    verdict = judge(
        timed_row(),
        baseline,
        mode=mode,
        fingerprint=FINGERPRINT,
        context=CONTEXT,
        command="pytest bench --model nf4 --update-baselines",
        metrics=HEALTHY_METRICS,
    )

    assert (outcome, fails) == (verdict.outcome, fails)
    assert "`pytest bench --model nf4 --update-baselines`" in verdict.words


def test_an_improvement_fails_only_in_strict_mode_and_asks_to_be_recorded():
    auto, strict = (judged(scaled(timed_row(), 0.7), timed_row(), mode=mode) for mode in ("auto", "strict"))

    assert (auto.outcome, auto.fails, strict.fails) == ("improved", False, True)
    assert "record it" in auto.words


@pytest.mark.parametrize("changed", ["better", "unit", "kind"])
def test_a_metric_that_was_redefined_since_the_baseline_fails(changed):
    other = {"better": "higher", "unit": "s/token", "kind": "memory"}[changed]
    metric = replace(HEALTHY_METRICS["efficiency.decode_ms"], **{changed: other})
    row = healthy_row(**({changed: other} if changed != "kind" else {}))

    verdict = judge(
        row,
        recorded([healthy_row()]),
        mode="auto",
        fingerprint=FINGERPRINT,
        context=CONTEXT,
        metrics={metric.name: metric},
    )

    assert (verdict.outcome, verdict.fails) == ("not_comparable", True)
    assert other in verdict.words


@pytest.mark.parametrize("saboteur", BROKEN_RESULTS, ids=lambda each: each.__name__)
def test_nothing_fails_when_the_gate_is_off(saboteur):
    assert not [each for each in gated(saboteur(healthy_rows()), healthy_rows(), mode="off") if each.fails]


def test_when_the_gate_is_off_what_is_invalid_is_still_said():
    lost = replace(timed_row(), value=None, ratio=None, status="failed", reason="the kernel crashed")

    verdict = judged(lost, timed_row(), mode="off")

    assert (verdict.outcome, verdict.fails) == ("invalid", False)
    assert "the kernel crashed" in verdict.words


def test_an_unknown_mode_is_refused_with_the_modes_there_are():
    with pytest.raises(OptionError, match="'lax' must be one of auto, strict, off"):
        judged(timed_row(), timed_row(), mode="lax")


def test_a_vanished_metric_is_missing_but_other_parameters_or_measurements_are_not():
    baseline = recorded(
        [
            timed_row(),
            healthy_row("efficiency.throughput", value=9.0, params=timed_row().params),
            healthy_row(params={"batch": 8}),
            healthy_row("rag.f1", value=0.7),
        ]
    )

    found = missing([timed_row()], baseline, FINGERPRINT)

    assert [(each.outcome, each.fails) for each in found] == [("missing", True)]
    assert found[0].key.startswith("efficiency.throughput[")
    assert "--update-baselines" in found[0].words
    assert missing([timed_row()], baseline, OTHER_MACHINE) == []
    assert missing([replace(timed_row(), recipe="llm_int8")], baseline, FINGERPRINT) == []


def test_data_hashes_may_be_a_table_by_kind_of_measurement():
    table = CONTEXT | {"data_hash": {"perplexity": "p", "rag": "r"}}
    before = [healthy_row("quality.perplexity"), healthy_row("rag.f1", value=0.5), timed_row()]
    baseline = recorded(before, context=table)
    changed = table | {"data_hash": {"perplexity": "p", "rag": "other"}}

    outcomes = [judged(row, baseline, context=changed).outcome for row in before]

    assert outcomes == ["pass", "not_comparable", "pass"]


def test_more_rounds_are_taken_until_nothing_is_inconclusive_and_a_change_was_seen_twice():
    passing, unsure, slower, faster = (
        replace(judged(timed_row(), timed_row()), outcome=each)
        for each in ("pass", "inconclusive", "regressed", "improved")
    )

    assert gate.decided([passing], [])
    assert gate.decided([slower, passing], [slower, unsure])
    assert not gate.decided([unsure], [unsure])
    assert not gate.decided([slower], [])
    assert not gate.decided([slower], [faster])
    assert not gate.decided([replace(slower, key="another")], [slower])


def test_more_recorded_rows_lower_the_level_of_each_and_results_per_item_have_their_own_half():
    rows = healthy_rows()
    alone = gate.levels([recorded(rows[:1])], FINGERPRINT, CONTEXT)
    whole = gate.levels([recorded(rows)], FINGERPRINT, CONTEXT)

    assert alone == (gate.LEVEL / 2, gate.LEVEL / 2)
    assert whole == (gate.LEVEL / 4, gate.LEVEL / 2)
    assert gate.levels([recorded(rows), None, recorded(rows)], FINGERPRINT, CONTEXT).timed == gate.LEVEL / 8
    assert gate.levels([recorded(rows)], FINGERPRINT, ELSEWHERE).items == gate.LEVEL / 4


# --- The interval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share"), [(5, 0.2), (10, 0.2), (11, 0.5), (20, 1.0)])
def test_estimate_and_error_agree_with_resampling_the_plain_way(count, share):
    numbers = random.Random(count)
    now, then, base_now, base_then = ([math.exp(numbers.gauss(0, 0.1)) for _ in range(count)] for _ in range(4))
    k = max(1, round(share * count))

    def best(samples):
        return statistics.mean(math.log(each) for each in sorted(samples)[:k])

    def resampled(samples):
        return best(numbers.choices(samples, k=count))

    plain = [resampled(now) - resampled(base_now) - resampled(then) + resampled(base_then) for _ in range(20_000)]
    found = shift((now, base_now), (then, base_then), share)

    assert found.log == pytest.approx(best(now) - best(base_now) - best(then) + best(base_then))
    assert found.error == pytest.approx(statistics.stdev(plain), rel=0.06)


@given(st.floats(0.5, 2), st.lists(st.floats(0.9, 1.1), min_size=5, max_size=30))
def test_a_side_that_is_all_slower_has_moved_by_just_that(factor, samples):
    slower = [factor * each for each in samples]

    assert shift((slower,), (samples,), 0.2).log == pytest.approx(math.log(factor), abs=1e-9)
    assert shift((slower, slower), (samples, samples), 0.2).log == pytest.approx(0, abs=1e-9)
    high = shift(([1 / each for each in slower],), ([1 / each for each in samples],), 0.2, highest=True)
    assert high.log == pytest.approx(-math.log(factor), abs=1e-9)


def test_stalls_in_six_rounds_of_ten_move_the_median_and_not_the_undisturbed_rounds():
    clean = [1.0, 1.01, 1.02, 1.03, 1.0, 1.01, 1.02, 1.03, 1.0, 1.01]
    stalled = [each + 0.18 * (place % 10 in (1, 3, 6, 7, 8, 9)) for place, each in enumerate(clean)]

    assert median(stalled) / median(clean) > 1.15
    assert abs(shift((stalled,), (clean,), 0.2).log) < 0.02


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 9, 18, 88, 157])
@pytest.mark.parametrize("level", [0.025, 1e-3, 1e-5])
def test_quantiles_agree_with_scipy(level, freedom):
    assert quantile(level, freedom) == pytest.approx(scipy.stats.t.isf(level, freedom), rel=1e-6)


def test_the_interval_is_the_same_every_time():
    row, before = timed_row(), timed_row(seed=1)
    _weights.cache_clear()
    first = shift((row.samples,), (before.samples,), 0.2)
    _weights.cache_clear()

    assert first == shift((row.samples,), (before.samples,), 0.2)


@pytest.mark.parametrize("samples", [(1.0,) * 4, (1.0, 1.0, 1.0, 1.0, 0.0), (-1.0,) * 5, (5e-324, *(1e308,) * 5)])
def test_too_few_samples_or_some_that_are_not_positive_give_no_interval(samples):
    assert shift((samples,), ((1.0,) * 5,), 0.2) is None


def test_judging_a_row_takes_a_few_milliseconds():
    row, before = timed_row(), recorded([timed_row(seed=1)])
    judged(row, before)
    costs = []
    for _ in range(20):
        start = time.process_time()
        judged(row, before)
        costs.append(time.process_time() - start)

    assert min(costs) < 0.02


def unavailable(row):
    return replace(
        row, value=None, ratio=None, base_value=None, samples=(), base_samples=(), status="not_available", reason="no X"
    )


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_what_cannot_be_had_here_says_so_and_passes_where_nothing_is_recorded(mode):
    rows = healthy_rows()

    found = gated([*rows[1:], unavailable(rows[0])], rows[1:], mode=mode)

    (verdict,) = [each for each in found if each.key == rows[0].key]
    assert (verdict.outcome, verdict.fails) == ("not_comparable", False)
    assert "no X" in verdict.words


def test_what_the_baseline_has_may_not_become_unavailable():
    rows = healthy_rows()

    (verdict,) = [each for each in gated([*rows[1:], unavailable(rows[0])], rows) if each.fails]

    assert verdict.key == rows[0].key
    assert "the baseline has it" in verdict.words


def test_what_is_not_available_is_not_recorded(tmp_path):
    rows = healthy_rows()

    gate.update(tmp_path, [unavailable(rows[0]), *rows[1:]], CONTEXT, FINGERPRINT, metrics=HEALTHY_METRICS)

    baseline = gate.Baseline.find(tmp_path, rows[0].base, rows[0].recipe)
    kept = {key for section in baseline.sections.values() for key in section.rows}
    assert kept == {row.key for row in rows[1:]}
