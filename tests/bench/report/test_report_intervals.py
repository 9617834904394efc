"""Intervals in the cells of the report: of medians, of results per item."""

import math
import random

import pytest
from report_rows import F1, PERPLEXITY, cells, row, table_of

from bench.metrics import all_metrics
from bench.report.cells import interval, median_interval
from bench.results.item_pairs import compare
from bench.results.items import Items, hashes_of


@pytest.mark.parametrize(("count", "low", "high"), [(6, 0, 5), (8, 0, 7), (9, 1, 7), (10, 1, 8), (20, 5, 14)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count, low, high):
    """Order statistics from tables of the sign test (Conover, Practical Nonparametric Statistics, table A3)."""
    samples = tuple(float(each) for each in random.Random(0).sample(range(count), count))

    assert (low, high) == median_interval(samples)


def test_five_samples_say_too_little_of_a_median():
    assert median_interval((1.0, 2.0, 3.0, 4.0, 5.0)) is None


def paired_row(metric, own, base, **facts):
    """A row with results per item on both sides; its value is what the metric is of their mean."""
    hashes = hashes_of(range(len(own)))
    now, then = Items(hashes, own, "real"), Items(hashes, base, "real")
    of = math.exp if all_metrics()[metric].of_items == "exp" else float
    return row(metric, of(now.mean), base_value=of(then.mean), items=now, paired=compare(now, then).to_json(), **facts)


def test_an_interval_from_results_per_item_is_that_of_the_difference_at_the_bases_value():
    draw = random.Random(0)
    base = [draw.uniform(0, 2) for _ in range(40)]
    found = paired_row(PERPLEXITY, [value + 0.1 + draw.gauss(0, 0.01) for value in base], base)

    low, high = interval(found)

    assert low < found.value < high
    assert high - low < 0.02 * found.value  # windows differ by far more than the models
    assert found.base_value < low


def test_an_increase_has_its_interval_in_percent():
    base = [0.5] * 20
    table = table_of([paired_row(PERPLEXITY, [0.5 + math.log(1.1)] * 20, base)], "E21")
    cell = cells(table)["nf4"]["Perplexity Increase (%)"]

    assert (cell.value, cell.low, cell.high) == pytest.approx((10, 10, 10), abs=1e-4)
    assert 0 == cells(table)["fp16"]["Perplexity Increase (%)"].value


def test_a_share_has_no_interval_beyond_0_and_1():
    found = paired_row(F1, [0.0] * 12, [1.0] * 2 + [0.0] * 10, params={"decoding": "greedy"})

    low, high = interval(found)

    assert 0 <= low <= high <= 1
