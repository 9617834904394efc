"""The power of the paired tests, with fewer trials than `benchmarks/power.py`, from the same recorded results."""

import numpy as np
import pytest
from scripts import benchmark

from bench.gate.verdicts import LEVEL

power = benchmark("power")


@pytest.fixture(scope="module")
def pairs():
    return power.transitions(power.recorded())


def test_the_recorded_answers_are_of_a_model_that_knows_and_flips(pairs):
    answers = power.recorded()

    assert {2000} == {len(each) for each in answers.values()}
    assert 0.8 < answers[power.BASE].mean() < 0.97
    assert {(True, False), (False, True), (True, True), (False, False)} == set(map(tuple, pairs.tolist()))


@pytest.mark.parametrize(("flipped", "loss"), [(0.06, 0.01), (0.06, 0.0), (0.03, 0.03)])
def test_drawn_pairs_flip_and_lose_what_the_line_says(pairs, flipped, loss):
    probabilities = power.weights(pairs, flipped, loss)
    before, after = pairs.T

    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[before != after].sum() == pytest.approx(flipped)
    assert (probabilities * before).sum() - (probabilities * after).sum() == pytest.approx(loss)


def test_counts_of_each_kind_scatter_as_those_of_pairs_drawn_one_by_one(pairs):
    draw, probabilities = np.random.default_rng(0), power.weights(pairs, 0.06, 0.01)
    drawn = pairs[draw.choice(len(pairs), (300, 2000), p=probabilities)]
    net = (drawn[:, :, 0].astype(int) - drawn[:, :, 1]).sum(1)

    assert net.mean() == pytest.approx(20, abs=4 * (120 / 300) ** 0.5)
    assert net.var() == pytest.approx(2000 * (0.06 - 0.01**2), rel=0.35)


def test_a_loss_of_one_per_cent_is_seen_where_six_flip_and_by_no_unpaired_test(pairs):
    seen = power.simulate(pairs, flipped=0.06, loss=0.01, items=10_000, trials=1000)

    assert seen["paired"] >= 0.9
    assert seen["one-sided"] >= seen["paired"]
    assert seen["unpaired"] < 0.5, "negative control: what the pairs are for"
    assert seen["gain"] == 0


def test_without_a_loss_hardly_any_trial_raises_an_alarm(pairs):
    seen = power.simulate(pairs, flipped=0.06, loss=0.0, items=10_000, trials=1000)

    assert seen["paired"] + seen["gain"] <= LEVEL + 3 * (LEVEL / 1000) ** 0.5
    assert seen["paired"] > 0, "a test that never raises one would pass, too"


def test_the_more_flip_the_less_is_seen(pairs):
    curve = [power.simulate(pairs, flipped=f, loss=0.01, items=10_000, trials=300)["paired"] for f in (0.03, 0.1, 0.3)]

    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0.95 and 0.6 < curve[1] < 0.85 and curve[2] < 0.4


def test_a_shift_of_a_hundredth_of_a_nat_is_seen_over_a_hundred_windows():
    losses = [np.array(power.stored.load(power.FOLDER, name)["quality.nll"].values) for name in ("fp16", "nf4")]
    seen, none = (power.simulate_losses(*losses, shift=shift, windows=100, trials=200) for shift in (0.01, 0.0))

    assert seen["paired"] > 0.7 > 0.2 > seen["unpaired"]
    assert none["paired"] <= 0.03
