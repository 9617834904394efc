"""The gate item by item: a loss that the tolerance misses, noise that is none, items that are others."""

import random
from dataclasses import replace

import pytest
from healthy_results import ANSWERS, ELSEWHERE, gated, healthy_rows, item_row, judged
from saboteurs import (
    BROKEN_ITEMS,
    every_window_loses_half_a_thousandth,
    lose,
    other_questions_are_asked,
    results_per_item_vanish,
    with_items,
)

from bench.results.items import Items, hashes_of


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
    assert "baseline 0.9, now 0.75 fraction (-16.7 %)" in verdict.words and "p 0.25, 15 % flipped" in verdict.words
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
    assert ("0 of 2000 now" in found.words) or ("no results per item" in found.words)
    assert "--update-baselines" in found.words


def test_where_values_are_compared_exactly_the_words_still_say_what_the_items_show():
    after = every_window_loses_half_a_thousandth(healthy_rows())
    (found,) = [each for each in gated(after, healthy_rows()) if each.fails]

    assert "tolerance +1e-07 %" in found.words and "item by item" in found.words
