"""The table of orders: made-up results whose comparison is known, and a run of the command on a checkpoint."""

import pytest
from healthy_results import healthy_row
from order_rows import LOSSES, rows_of

from bench.errors import JournalError
from bench.report import orders
from bench.report.orders import CONTROL, ORDERS, RECIPES
from bench.report.tables import tables


def test_the_recipes_are_the_base_each_step_each_pair_and_each_order():
    assert 17 == len(set(RECIPES))
    assert {frozenset(("p", "kd", "nf4"))} == {frozenset(order.split("-")) for order in ORDERS}
    assert {"-".join(order.split("-")[:n]) for order in ORDERS for n in (1, 2, 3)} == set(RECIPES) - {"fp16", CONTROL}


def test_orders_stand_with_the_best_first_and_what_each_step_did():
    rows = rows_of({**LOSSES, "p-kd": 0.45})

    (family,) = orders.families(rows)
    found = orders.compared(rows, family)

    assert ("kd", "nf4", "p") == family
    assert sorted(ORDERS, key=LOSSES.get) == [each.recipe for each in found]
    perplexity = {row.recipe: row.value for row in rows if row.metric == "quality.perplexity"}
    after = {each.recipe: each.after for each in found}
    assert tuple(perplexity[each] for each in ("p", "p-kd", ORDERS[0])) == after[ORDERS[0]]
    assert after["kd-p-nf4"][1] is None


def test_the_table_of_orders_has_the_steps_the_best_order_and_what_was_not_measured():
    table = next(each for each in tables(rows_of({**LOSSES, "p-kd": 0.45})) if each.number == "S4")

    cells = {line.name: [cell.text for cell in line.cells] for line in table.lines}
    assert ["fp16", "kd", "nf4", "p", CONTROL, *sorted(ORDERS, key=LOSSES.get)] == list(cells)
    assert "the best" == cells[ORDERS[0]][-1]
    assert "not measured" == cells["kd-p-nf4"][-2].split(" → ")[1]
    assert table.findings == tuple(orders.findings(rows_of({**LOSSES, "p-kd": 0.45})))
    assert "-m ordering" in table.command


def test_differences_to_the_best_order_are_paired_by_window():
    """Windows differ by 0.6 nat, orders by 0.02 with noise of 0.01: unpaired nothing would be seen."""
    best, *others = orders.compared(rows_of(LOSSES), ("kd", "nf4", "p"))

    assert (ORDERS[0], None, None) == (best.recipe, best.above, best.p)
    for order in others:
        assert order.above.difference == pytest.approx(LOSSES[order.recipe] - 0.5, abs=1e-3)
        assert 0 < order.above.low < order.above.difference < order.above.high
        assert order.p < 0.05


def test_p_values_are_those_of_holm():
    """By hand: 0.001 x 3, then 0.02 x 2, then 0.03 x 1 raised to what stands before it."""

    found = orders._holm({"a": 0.03, "b": 0.001, "c": 0.02})

    assert {"a": 0.04, "b": 0.003, "c": 0.04} == pytest.approx(found)


def test_findings_of_the_paper_that_hold_are_said_to_hold():
    best, early, before_distilling, control = orders.findings(rows_of(LOSSES))

    assert "with one training run each (seed 0): it is; the next, kd-p-nf4, is +0.0100 nat" in best
    assert "Here it loses more: the mean of kd-nf4-p, nf4-p-kd, nf4-kd-p is +0.2000 nat" in early
    assert "it loses more: the mean of p-nf4-kd, nf4-p-kd, nf4-kd-p is +0.0800 nat" in before_distilling
    assert "kd(alpha=0.0), the same training on labels alone, has perplexity" in control
    assert "+0.0500 nat" in control


def test_findings_of_the_paper_that_do_not_hold_are_said_not_to():
    turned = {**LOSSES, **dict(zip(ORDERS, (0.70, 0.72, 0.71, 0.50, 0.52, 0.51), strict=True))}
    alike = {**LOSSES, **dict.fromkeys(ORDERS, 0.5)}

    del turned[CONTROL]
    best, early, _, control = orders.findings(rows_of(turned))
    assert "kd(alpha=0.0), the same training on labels alone, was not measured" in control
    assert "kd-nf4-p is, and p-kd-nf4 +0.2000 nat" in best
    assert "Here it loses less" in early
    assert "no difference is seen" in orders.findings(rows_of(alike))[1]


def test_nothing_is_found_where_an_order_is_missing():
    losses = dict(list(LOSSES.items())[:-1])

    assert [] == orders.findings(rows_of(losses))
    assert [] == orders.families(rows_of({"p-kd": 0.5, "kd-p": 0.5, "p-kd-nf4": 0.5}))


def test_rows_without_results_per_window_are_refused():
    rows = [healthy_row("quality.perplexity", recipe=order, value=2.0) for order in ORDERS]

    with pytest.raises(JournalError, match="has no results per window"):
        orders.compared(rows, ("kd", "nf4", "p"))


def test_a_table_of_orders_without_results_per_window_says_why_they_are_not_compared():
    table = next(each for each in tables([healthy_row("quality.perplexity", recipe=order, value=2.0 + place)
                                          for place, order in enumerate(ORDERS)]) if each.number == "S4")  # fmt: skip

    assert "no results per window" in table.findings[0]
    assert {"cannot be compared"} == {line.cells[-1].text for line in table.lines if line.recipe in ORDERS}
