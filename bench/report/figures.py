"""The figures of the page: charts, each beside a table of the same numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bench.errors import JournalError, MetricError
from bench.report import charts
from bench.report import orders as orderings
from bench.report.cells import choose, number
from bench.report.fronts import front
from bench.report.layout import Column
from bench.report.overview import COSTS, QUALITY, Overview, family, spelled
from bench.results.row import Row

_WITH, _WITHOUT = QUALITY[2], Column(head="F1 without", metric="rag.no_rag_f1", params=QUALITY[2].params)


def fronts(table: Overview, anchors: Mapping[str, str], base: str) -> list[dict[str, Any]]:
    """For each measure of quality the charts against each cost, of the recipes that have both.

    Args:
        anchors: by recipe where its card is.
    """
    found = []
    for quality in QUALITY:
        shown = [chart for cost in COSTS if (chart := _front(table, anchors, quality, cost, base))]
        if shown:
            found.append({"metric": quality.metric, "label": quality.head, "charts": shown})
    return found


def _front(
    table: Overview, anchors: Mapping[str, str], quality: Column, cost: Column, base: str
) -> dict[str, Any] | None:
    xs, ys = table.values(cost), table.values(quality)
    both = [recipe for recipe in anchors if recipe in xs and recipe in ys]
    if not both:
        return None
    higher = table.better(quality) == "higher"
    by = front({recipe: (xs[recipe], -ys[recipe] if higher else ys[recipe]) for recipe in both})
    points = [charts.Point(name=recipe, family=family(recipe), x=xs[recipe], y=ys[recipe], by=by[recipe])
              for recipe in both]  # fmt: skip
    points.sort(key=lambda point: (point.by is not None, point.x))
    title = f"{quality.head} against {cost.head} of {base}"
    return {
        "cost": cost.head, "quality": quality.head, "best": [point.name for point in points if point.by is None],
        "svg": Markup(charts.front(points, x=cost.head, y=quality.head, higher=higher, title=title)),
        "better": f"{'up' if higher else 'down'} and to the left",
        "points": [{"recipe": point.name, "family": point.family, "anchor": anchors[point.name], "by": point.by,
                    "x": number(point.x), "y": number(point.y)} for point in points],
    }  # fmt: skip


def orders(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each set of steps that was taken in several orders what each order loses; the numbers are in table S4."""
    measured = list(choose(Column(head="", metric="quality.perplexity"), (), rows).rows.values())
    found = []
    for steps in orderings.families(measured):
        title = f"Orders of {', '.join(steps)}: loss above that of the best order"
        try:
            compared = orderings.compared(measured, steps)
            said = orderings.findings(measured) if {each.recipe for each in compared} <= set(orderings.ORDERS) else []
        except (JournalError, MetricError) as error:
            found.append({"title": title, "spans": [], "words": [f"They cannot be compared: {error}"]})
            continue
        lines = []
        for order in compared:
            above, perplexity = order.above, f"perplexity {number(order.after[-1])}"
            if above is None:
                place, text = {"value": 0.0, "low": 0.0, "high": 0.0}, f"{perplexity}, the best"
            else:
                place = {"value": above.difference, "low": above.low, "high": above.high}
                text = f"{perplexity}, {above.difference:+.3g} nat"
            lines.append(charts.Span(name=order.recipe, family="orderings", text=text, **place))
        found.append({"title": title, "words": said, **_spans(lines, "nat per token above the best, 95 % interval")})
    return found


def rag(table: Overview, rows: Sequence[Row]) -> dict[str, Any] | None:
    """F1 without and with retrieved text, under the conditions of the overview's; None where they were not measured."""
    condition = table.conditions.get(_WITH, {})
    alike = [row for row in rows if row.metric == _WITHOUT.metric and condition.items() <= row.params.items()]
    without = {recipe: row.value for (recipe, _), row in choose(_WITHOUT, (), alike).rows.items()}
    answers = table.values(_WITH)
    ranked = sorted((recipe for recipe in answers if without.get(recipe) is not None), key=lambda each: -answers[each])
    if not ranked:
        return None
    lines = [charts.Span(name=recipe, family=family(recipe), value=answers[recipe], low=without[recipe],
                         high=answers[recipe], text=f"{number(without[recipe])} → {number(answers[recipe])}")
             for recipe in ranked]  # fmt: skip
    return {
        "title": "Token F1 of answers without and with retrieved text", "condition": spelled(condition),
        "lines": [(recipe, number(without[recipe]), number(answers[recipe])) for recipe in ranked],
        **_spans(lines, "F1", arrow=True),
    }  # fmt: skip


def _spans(lines: Sequence[charts.Span], x: str, *, arrow: bool = False) -> dict[str, Any]:
    strips, scale = charts.spans(lines, x=x, arrow=arrow)
    return {"spans": [(line, Markup(strip)) for line, strip in zip(lines, strips, strict=True)],
            "scale": Markup(scale), "axis": x}  # fmt: skip
