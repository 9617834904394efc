"""Tables of orders: for steps taken in several orders, the effect of each step and the best order."""

from collections.abc import Callable, Iterable

from bench.errors import JournalError, MetricError
from bench.report import orders as orderings
from bench.report.cells import Cell, Chosen, Notes, cell_of, number
from bench.report.layout import ORDERED, Column
from bench.report.table import NOT_MEASURED, Line, Table
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED


def orders(choose: Callable[[Column], Chosen], command: Callable[..., str]) -> list[Table]:
    """For each set of steps that were taken in several orders: what each step did, and which order is the best."""
    perplexity, size, ratio = (
        choose(Column(head="", metric=metric))
        for metric in ("quality.perplexity", "efficiency.model_size_gb", "efficiency.compression_ratio")
    )
    measured = list(perplexity.rows.values())
    found = []
    for place, family in enumerate(orderings.families(measured)):
        try:
            compared = {each.recipe: _order(each) for each in orderings.compared(measured, family)}
            said = orderings.findings(measured) if set(compared) <= set(orderings.ORDERS) else []
        except (JournalError, MetricError) as error:
            taken = [row.recipe for row in measured if sorted(orderings.steps_of(row.recipe)) == sorted(family)]
            compared = dict.fromkeys(taken, (Cell(text="cannot be compared"),) * 2)
            said = [f"The orders cannot be compared: {error}"]
        lines = []
        beside = [UNCOMPRESSED, *family, *orderings.controls(family)]
        for recipe in [*beside, *compared]:
            cells = [
                _cell_of(choice.rows.get((recipe, ())), scale)
                for choice, scale in ((size, 1024.0), (ratio, 1.0), (perplexity, 1.0))
            ]
            cells += compared.get(recipe, (Cell(text="does not apply"),) * 2)
            lines.append(Line(name=recipe, recipe=recipe, cells=tuple(cells)))
        recipes = [*beside, *beginnings(compared), *compared]
        found.append(Table(
            number=f"S{4 + place}", title=f"Orders of {', '.join(family)}", family=ORDERED, lines=tuple(lines),
            columns=("Size (MiB)", "Compression Ratio (x)", "Perplexity", "Perplexity after each step",
                     "Above the best (nat/tok)"),
            findings=tuple(said), command=command(["ordering"], recipes),
        ))  # fmt: skip
    return found


def beginnings(recipes: Iterable[str]) -> list[str]:
    found = ["-".join(steps[:count]) for steps in map(orderings.steps_of, recipes) for count in range(2, len(steps))]
    return list(dict.fromkeys(found))


def _cell_of(row: Row | None, scale: float) -> Cell:
    if row is None:
        return Cell(text=NOT_MEASURED)
    return cell_of(Column(head="", metric=row.metric, scale=scale), row, Notes())


def _order(order: orderings.Order) -> tuple[Cell, Cell]:
    """What each step did, and the loss above the best order."""
    steps = " → ".join(NOT_MEASURED if value is None else number(value) for value in order.after)
    if order.above is None:
        return Cell(text=steps), Cell(text="the best", value=0.0, best=True)
    above = order.above
    text = f"{above.difference:+.4f} [{above.low:+.4f}, {above.high:+.4f}], p {order.p:.2g}"
    return Cell(text=steps), Cell(text=text, value=above.difference, low=above.low, high=above.high)
