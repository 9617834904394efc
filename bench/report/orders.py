"""Steps in every order: their recipes, and how the orders compare, as in [O], table 1.

`pytest bench -m ordering` measures RECIPES: the base, each step by itself, the control of the one that distils (the
same training on labels alone, which tells what the teacher gives from what more training does), the first two of each
order, and the orders;
what an order loses with each step is in the rows of its beginnings. Any recipes that take the same steps in another
order are compared in the same way, whatever their settings.

Orders are compared by the losses of the same windows of text, paired (`statistics.paired`); of several p-values each is
multiplied as Holm's method has it (Holm 1979, Scandinavian Journal of Statistics 6), so that the chance of any false
finding in a table is at most 5 %.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from bench.errors import JournalError
from bench.results.item_pairs import compare
from bench.results.items import Items
from bench.results.row import NATIVE, Row
from bench.statistics.paired import Difference
from compression import Recipe
from compression.recipes.recipe import UNCOMPRESSED

_STEPS = ("p", "kd", "nf4")

ORDERS = tuple("-".join(order) for order in permutations(_STEPS))
BEGINNINGS = tuple("-".join(two) for two in permutations(_STEPS, 2))
CONTROL = "kd(alpha=0.0)"
RECIPES = (UNCOMPRESSED, *_STEPS, CONTROL, *BEGINNINGS, *ORDERS)

_PERPLEXITY = "quality.perplexity"
_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Order:
    """One order of the steps of a family.

    Attributes:
        after: the perplexity behind each of its steps; None where that beginning was not measured.
        above: the loss (nat per token) above that of the best order; None for the best one.
        p: that of `above` among all orders, by Holm.
    """

    recipe: str
    after: tuple[float | None, ...]
    above: Difference | None
    p: float | None


def _is_perplexity(row: Row) -> bool:
    return row.metric == _PERPLEXITY and row.runtime == NATIVE


def families(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The sets of steps, three or more, that were measured in more than one order; steps as recipes write them."""
    orders: dict[tuple[str, ...], set[str]] = {}
    for recipe in {row.recipe for row in rows if _is_perplexity(row) and row.value is not None}:
        steps = steps_of(recipe)
        if len(set(steps)) == len(steps) >= 3:
            orders.setdefault(tuple(sorted(steps)), set()).add(recipe)
    return sorted(steps for steps, found in orders.items() if len(found) > 1)


def compared(rows: Iterable[Row], family: Sequence[str]) -> list[Order]:
    """The orders of a family, the best first. Raises JournalError for a perplexity without results per window."""
    rows = list(rows)
    orders = _orders(rows, family)
    above = {order: compare(_items(rows, order), _items(rows, orders[0])) for order in orders[1:]}
    values = _holm({order: each.p for order, each in above.items()})
    found = []
    for order in orders:
        steps = steps_of(order)
        beginnings = ["-".join(steps[: count + 1]) for count in range(len(steps))]
        after = tuple(_value(rows, each) for each in beginnings)
        found.append(Order(recipe=order, after=after, above=above.get(order), p=values.get(order)))
    return found


def findings(rows: Iterable[Row]) -> list[str]:
    """Whether what [O] found holds here: p-kd-nf4 is the best order, and those that quantize before pruning are worst.

    And whether quantizing before distilling is what costs, which [O] does not tell apart; and what the teacher gives
    beyond the training. Empty where these orders were not all measured. All is of one training of each order, whose
    seed is named: another seed may turn what lies close.
    """
    rows = list(rows)
    if not set(ORDERS) <= {row.recipe for row in rows if _is_perplexity(row) and row.items is not None}:
        return []
    best, *others = _orders(rows, _STEPS)
    theirs = ORDERS[0]
    seeds = sorted({row.seed for row in rows if row.recipe in ORDERS})
    said = f"[O]: {theirs} is the best order. Here, with one training run each (seed {', '.join(map(str, seeds))}): "
    if best == theirs:
        apart = compare(_items(rows, others[0]), _items(rows, best))
        said += f"it is; the next, {others[0]}, is {_words(apart)} above it"
    else:
        said += f"{best} is, and {theirs} {_words(compare(_items(rows, theirs), _items(rows, best)))} above it"
    return [
        said,
        f"[O]: quantizing before pruning loses most. Here {_early(rows, 'p')}",
        f"Quantizing before distilling: {_early(rows, 'kd')}",
        _control(rows),
    ]


def _control(rows: Sequence[Row]) -> str:
    """What of a perplexity below the base's is the teacher's, and what is that of the training itself."""
    what = f"{CONTROL}, the same training on labels alone"
    if _row(rows, CONTROL) is None or _row(rows, "kd") is None:
        return f"{what}, was not measured: the teacher's share of kd's perplexity is unknown."
    apart = compare(_items(rows, CONTROL), _items(rows, "kd"))
    return (
        f"{what}, has perplexity {_value(rows, CONTROL):.4g}, {_words(apart)} above kd's; only that difference is "
        "due to the teacher."
    )


def controls(steps: Iterable[str]) -> list[str]:
    """Of the steps that learn from a teacher the same training on labels alone.

    >>> controls(("p", "kd(epochs=1)", "nf4"))
    ['kd(alpha=0.0,epochs=1)']
    """
    taught = (step for text in steps for step in Recipe.parse(text).steps if step.method.teacher)
    return [str(replace(step, method=replace(step.method, alpha=0.0))) for step in taught]  # type: ignore[type-var]


def _early(rows: Sequence[Row], step: str) -> str:
    """Whether orders that quantize before a step lose more than the others, on average."""
    early = [order for order in ORDERS if steps_of(order).index("nf4") < steps_of(order).index(step)]
    late = [order for order in ORDERS if order not in early]
    apart = compare(_mean(rows, early), _mean(rows, late))
    seen = "it loses more" if apart.difference > 0 else "it loses less"
    if apart.p >= _LEVEL:
        seen = "no difference is seen"
    return f"{seen}: the mean of {', '.join(early)} is {_words(apart)} above that of {', '.join(late)}"


def steps_of(recipe: str) -> tuple[str, ...]:
    """The steps of a recipe, each as recipes write it."""
    return tuple(map(str, Recipe.parse(recipe).steps))


def _orders(rows: Sequence[Row], family: Sequence[str]) -> list[str]:
    """The recipes of a family that were measured, the lowest perplexity first."""
    found = {row.recipe: row.value for row in rows if _is_perplexity(row) and row.value is not None}
    return sorted((each for each in found if sorted(steps_of(each)) == sorted(family)), key=lambda each: found[each])


def _row(rows: Sequence[Row], recipe: str) -> Row | None:
    return next((row for row in rows if row.recipe == recipe and _is_perplexity(row)), None)


def _value(rows: Sequence[Row], recipe: str) -> float | None:
    row = _row(rows, recipe)
    return None if row is None else row.value


def _items(rows: Sequence[Row], recipe: str) -> Items:
    row = _row(rows, recipe)
    if row is None or row.items is None:
        raise JournalError(f"the perplexity of {recipe} has no results per window in this journal; measure it again")
    return row.items


def _mean(rows: Sequence[Row], recipes: Sequence[str]) -> Items:
    """Losses of each window, the mean over recipes."""
    found = [_items(rows, recipe) for recipe in recipes]
    values = [sum(values) / len(found) for values in zip(*(each.values for each in found), strict=True)]
    return Items(found[0].hashes, tuple(values), "real")


def _holm(found: Mapping[str, float]) -> dict[str, float]:
    """Each p-value as it is among all of them."""
    corrected, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(found.items(), key=lambda pair: pair[1])):
        least = max(least, min(1.0, p * (len(found) - rank)))
        corrected[name] = least
    return corrected


def _words(apart: Difference) -> str:
    return f"{apart.difference:+.4f} nat [{apart.low:+.4f}, {apart.high:+.4f}] (p {apart.p:.2g})"
