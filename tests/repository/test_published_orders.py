"""The orders of methods that their papers publish hold on SmolLM2, as its committed baselines have it."""

import pytest
from scripts import benchmark

orders = benchmark("smollm2_orders")


def test_every_published_order_holds():
    found = orders.perplexities()

    assert set(orders.RECIPES) == set(found)
    assert [] == orders.broken(found)


@pytest.mark.parametrize(("better", "worse", "factor"), orders.ORDERS)
def test_two_methods_the_other_way_round_are_noticed(better, worse, factor):
    found = orders.perplexities()
    found[better], found[worse] = found[worse], found[better]

    assert any(said.startswith(f"{better} ") for said in orders.broken(found))
