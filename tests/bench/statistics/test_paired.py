"""Paired statistics: against scipy, slow obvious code, their laws, and a simulation of what they promise."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from healthy_results import items
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bench.errors import MetricError
from bench.results import item_pairs
from bench.results.items import Items, hashes_of
from bench.statistics import paired

counts = st.integers(0, 60)
differences = st.lists(st.floats(-5, 5), min_size=1, max_size=40)


def binary(bits):
    return Items(hashes_of(range(len(bits))), bits, "binary")


def real(values):
    return Items(hashes_of(range(len(values))), values, "real")


@st.composite
def pairs(draw):
    """Two results of the same items."""
    now = draw(items())
    value = st.sampled_from([0.0, 1.0]) if now.kind == "binary" else st.floats(-1e6, 1e6, width=32)
    return now, Items(now.hashes, draw(st.lists(value, min_size=len(now), max_size=len(now))), now.kind)


# --- the tests of significance ----------------------------------------------------------------------------------------


@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_the_flips(lost, gained):
    two_sided, worse = (
        scipy.stats.binomtest(lost, lost + gained, 0.5, alternative=side).pvalue if lost + gained else 1.0
        for side in ("two-sided", "greater")
    )

    assert paired.mcnemar(lost, gained) == pytest.approx(two_sided, rel=1e-9)
    assert paired.mcnemar(lost, gained, "worse") == pytest.approx(worse, rel=1e-9)


def test_mcnemar_of_thousands_of_flips_neither_overflows_nor_loses_its_tail():
    for lost, gained in ((3000, 2000), (5200, 5000), (40, 0)):
        expected = scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue
        assert paired.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


@given(differences.filter(lambda d: len(d) <= 10))
@example([2.0, 1e-8])
def test_the_permutation_of_few_items_goes_through_all_signs(d):
    exact = [Fraction(x) for x in d]
    observed = abs(sum(exact))
    sums = [abs(sum(s * x for s, x in zip(signs, exact, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(d))]  # fmt: skip
    expected = sum(each >= observed for each in sums) / len(sums)
    near = Fraction(1, 10**9) * sum(map(abs, exact))  # floats cannot tell what is nearer than that
    assume(all(each == observed or abs(each - observed) > near for each in sums))

    assert paired.permutation(d) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
@pytest.mark.parametrize("count", [12, 60])
def test_the_permutation_agrees_with_scipy(shift, count):
    d = np.random.default_rng(count).normal(shift, 1, count)
    expected = scipy.stats.permutation_test(
        (d, np.zeros(count)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip

    assert paired.permutation(d) == pytest.approx(expected, abs=4 * math.sqrt(max(expected, 1e-3) / paired.RESAMPLES))


@pytest.mark.parametrize("count", [20, 100])
def test_the_bootstrap_agrees_with_scipy(count):
    d = np.random.default_rng(count).exponential(1, count)
    expected = scipy.stats.bootstrap(
        (d,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval

    assert paired.bootstrap(d) == pytest.approx(tuple(expected), abs=0.1 * d.std() / math.sqrt(count))


@given(differences)
@settings(max_examples=20)
def test_the_bootstrap_in_chunks_is_that_of_a_plain_loop(d):
    ordered, turned = paired._canonical(d)
    places = np.random.default_rng(0).integers(0, len(d), (200, len(d)))
    low, high = np.quantile([np.mean([ordered[i] for i in row]) for row in places], [0.025, 0.975])

    assert paired.bootstrap(d, resamples=200) == pytest.approx((-high, -low) if turned else (low, high), abs=1e-12)


def test_resamples_do_not_exist_at_once_and_the_chunk_changes_only_what_is_drawn(monkeypatch):
    d = np.random.default_rng(0).normal(0.1, 1, 200)
    whole = paired.permutation(d), paired.bootstrap(d)
    monkeypatch.setattr(paired, "CHUNK", 1000)
    chunked = paired.permutation(d), paired.bootstrap(d)

    assert chunked[0] == pytest.approx(whole[0], abs=0.02)
    assert chunked[1] == pytest.approx(whole[1], abs=0.01)


# --- laws -------------------------------------------------------------------------------------------------------------


@given(pairs())
def test_swapping_the_two_turns_the_sign_and_nothing_else(pair):
    now, then = pair
    forth, back = item_pairs.compare(now, then), item_pairs.compare(then, now)

    assert (forth.difference, forth.low, forth.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert (forth.p, forth.flipped, forth.items) == (back.p, back.flipped, back.items)


@given(pairs(), st.randoms())
def test_the_order_of_the_items_changes_nothing(pair, order):
    places = list(range(len(pair[0])))
    order.shuffle(places)
    mixed = [Items([i.hashes[k] for k in places], [i.values[k] for k in places], i.kind) for i in pair]

    assert item_pairs.compare(*pair) == item_pairs.compare(*mixed)


@given(pairs())
def test_the_difference_is_that_of_the_means_and_lies_in_its_interval(pair):
    now, then = pair
    found = item_pairs.compare(now, then)

    assert found.difference == pytest.approx(now.mean - then.mean, abs=1e-6 * max(map(abs, now.values + then.values)))
    assert 0 < found.p <= 1
    assert found.low <= found.high
    if now.kind == "binary":
        assert found.low <= found.difference <= found.high
        changed = sum(a != b for a, b in zip(now.values, then.values, strict=True))
        assert found.flipped == changed / len(now)
    else:
        assert found.flipped is None


@given(items())
def test_an_unchanged_model_differs_by_nothing_and_never_significantly(each):
    found = item_pairs.compare(each, each)

    assert (found.difference, found.p) == (0, 1)
    assert found.low <= 0 <= found.high


@given(pairs())
def test_other_items_or_another_kind_are_not_compared(pair):
    now, then = pair
    other = Items(hashes_of(["another", *range(len(then) - 1)]), then.values, then.kind)

    with pytest.raises(MetricError, match="the items differ"):
        item_pairs.compare(now, other)
    with pytest.raises(MetricError, match="the items were real, and are binary now"):
        item_pairs.compare(binary([0]), replace(binary([0]), kind="real"))


def test_words_say_how_many_items_are_the_same():
    assert "2 of 3 now and 2 then are the same" in item_pairs.mismatch(binary([1, 1, 1]), binary([1, 0]))
    assert item_pairs.mismatch(binary([1, 1]), binary([0, 1])) is None


# --- what they promise, by simulation ---------------------------------------------------------------------------------

TRIALS = 400


def bernoulli(draw, shares, count):
    """Flips of `count` items: -1 lost, +1 gained, 0 neither, with these probabilities."""
    return draw.choice([-1, 0, 1], p=[shares[0], 1 - sum(shares), shares[1]], size=count)


def test_p_values_of_nothing_are_at_most_as_often_small_as_they_say():
    draw = np.random.default_rng(0)
    flips = [bernoulli(draw, (0.05, 0.05), 300) for _ in range(TRIALS)]
    shares = {
        "mcnemar": [paired.mcnemar(int((d < 0).sum()), int((d > 0).sum())) for d in flips],
        "permutation": [paired.permutation(draw.standard_t(3, 40), resamples=999) for _ in range(TRIALS)],
    }

    for name, p in shares.items():
        for level in (0.05, 0.2, 0.5):
            share = np.mean(np.array(p) <= level)
            assert share <= level + 3 * math.sqrt(level * (1 - level) / TRIALS), name
            assert share >= 0.5 * level or name == "mcnemar"  # that one is exact, and discrete: below its level


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(1)
    covered = {"share": 0, "few": 0, "bootstrap": 0}
    for _ in range(TRIALS):
        d = bernoulli(draw, (0.06, 0.03), 400)
        low, high = paired.share_interval(int((d < 0).sum()), int((d > 0).sum()), 400)
        covered["share"] += low <= -0.03 <= high
        d = bernoulli(draw, (0.01, 0.005), 100)
        low, high = paired.share_interval(int((d < 0).sum()), int((d > 0).sum()), 100)
        covered["few"] += low <= -0.005 <= high
        low, high = paired.bootstrap(draw.gamma(2, 1, 100), resamples=800)
        covered["bootstrap"] += low <= 2 <= high

    for name, count in covered.items():
        assert 0.91 <= count / TRIALS <= (1 if name == "few" else 0.98), name


def test_an_interval_that_ignores_the_pairs_is_far_too_wide_to_see_a_small_loss():
    """Negative control: the same data, unpaired."""
    draw = np.random.default_rng(2)
    then = draw.random(2000) < 0.75
    lost, gained = draw.random(2000) < 0.02, draw.random(2000) < 0.01
    now = (then & ~lost) | (~then & gained)
    found = item_pairs.compare(binary(now), binary(then))

    unpaired = 1.96 * math.sqrt(now.var() / 2000 + then.var() / 2000)
    assert found.high - found.low < unpaired
    assert abs(found.difference) < unpaired
    assert found.p < 0.05
