"""The interval of a change between two runs: against resampling the plain way, against scipy."""

import math
import random
import statistics
from statistics import median

import numpy as np
import pytest
import scipy.stats
from healthy_results import timed_row
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics.timing_change import TRIMMED, _difference, _weights, quantile, shift, trimmed


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
    runs = [[np.log(side) for side in run] for run in ((now, base_now), (then, base_then))]
    log, error, _ = _difference(*runs, share)

    assert log == pytest.approx(best(now) - best(base_now) - best(then) + best(base_then))
    assert error == pytest.approx(statistics.stdev(plain), rel=0.06)


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


@pytest.mark.parametrize("count", [5, 10, 45, 100])
@pytest.mark.parametrize("level", [0.025, 1e-4])
def test_the_interval_by_pairs_is_that_of_the_trimmed_mean(count, level):
    numbers = np.random.default_rng(count)
    own, other = numbers.standard_t(2, (2, 3, count))

    change, error, degrees = trimmed(own, other)

    reach = quantile(level, degrees) * error
    expected = [
        scipy.stats.mstats.trimmed_mean_ci(each, limits=(TRIMMED, TRIMMED), alpha=2 * level) for each in own - other
    ]
    np.testing.assert_allclose(np.stack([change - reach, change + reach], -1), expected, rtol=1e-6)


def test_pairs_tell_a_slower_side_where_hardly_a_round_is_undisturbed():
    numbers = np.random.default_rng(0)
    shared = np.exp(numbers.normal(0, 0.2, 40)).tolist()
    own, other = ([factor * each * math.exp(numbers.normal(0, 0.01)) for each in shared] for factor in (1.05, 1.0))

    together = shift((own, other), (), 0.15)
    low, high = together.interval(1e-5)
    apart = shift((own,), (other,), 0.15).interval(1e-5)

    assert 0.03 < low < 0.05 < high < 0.07
    assert high - low < 0.2 * (apart[1] - apart[0])


@given(st.floats(-0.3, 0.3), st.floats(0, 0.2), st.integers(0, 99), st.integers(0, 2**31))
def test_what_the_machine_does_to_both_sides_of_a_run_is_not_taken_for_their_difference(drift, step, at, seed):
    numbers = np.random.default_rng(seed)
    shared = drift * np.arange(100) / 100 + step * (np.arange(100) >= at)
    own, other = (np.exp(shared + centre + abs(numbers.normal(0, 0.01, 100))) for centre in (0.05, 0.0))

    moved = shift((own.tolist(), other.tolist()), (), 0.15)

    assert abs(moved.log - 0.05) < 0.02
    assert moved.error < 0.01
