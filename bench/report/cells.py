"""Cells of tables: which row a cell shows, its number, its interval, and why it is empty."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.metrics import all_metrics
from bench.report.layout import Column
from bench.results.row import MEASURED, NATIVE, RUNTIME, Param, Row
from compression.recipes.recipe import UNCOMPRESSED

SHARES = frozenset({"share", "fraction", "score"})  # units of what is from 0 to 1
GIVEN = ("calibration", "teacher", "downstream")  # parameters that belong to a recipe, not to the measurement

Way = tuple[Param | None, ...]  # values of the parameters by which a recipe has several lines
Conditions = tuple[tuple[str, Param], ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown: the number, with its interval, or in words why there is none.
        value: the number in the unit of the column's head; None where there is none.
        low: lower end of its 95 % interval; None where it has none.
        high: the upper end.
        best: whether it is the best of the compressed models in its column.
        ranked: whether it can be compared with others of its column (see `is_ranked`).
        note: the place, from 1, of what must be known of it in the table's `notes`.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    best: bool = False
    ranked: bool = True
    note: int | None = None


def number(value: float) -> str:
    """Four significant digits; whole numbers in full.

    >>> number(13109504.0), number(0.123456), number(1234.5678)
    ('13109504', '0.1235', '1235')
    """
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics, alike from both ends, that holds the median in at least 95 %.

    Free of any assumption but that the samples are independent; None for fewer than 6, which no pair does it for.

    >>> median_interval((4.0, 1.0, 2.0, 3.0, 6.0, 5.0))
    (1.0, 6.0)
    """
    count, below, place = len(samples), 0.5 ** len(samples), 0
    if below > 0.025:
        return None
    while below + math.comb(count, place + 1) * 0.5**count <= 0.025:
        place += 1
        below += math.comb(count, place) * 0.5**count
    ordered = sorted(samples)
    return ordered[place], ordered[count - 1 - place]


def interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of a row's value, in its unit, from what it was measured on; None where that says none.

    Of results per item it is that of the paired difference to the base, laid on the base's value: where it leaves that
    value out, the two differ. Of repeated measurements it is that of their median, and holds the value in any case: a
    ratio of medians need not be near the median of the rounds' ratios.
    """
    if row.paired is not None and row.base_value is not None:
        low, high = row.paired["low"], row.paired["high"]
        metric = all_metrics().get(row.metric)
        if metric is not None and metric.of_items == "exp":
            return row.base_value * math.exp(low), row.base_value * math.exp(high)
        low, high = row.base_value + low, row.base_value + high
        if row.unit in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        return low, high
    between = median_interval(row.samples)
    if between is None or row.value is None:
        return between
    return min(between[0], row.value), max(between[1], row.value)


def of_one_model(rows: Sequence[Row]) -> list[Row]:
    """The rows, of each recipe those of one model alone: with what its newest row was calibrated on and learnt from."""
    given = {row.recipe: _given(row) for row in rows}
    return [row for row in rows if _given(row) == given[row.recipe]]


def _given(row: Row) -> Conditions:
    return tuple((name, row.params[name]) for name in GIVEN if name in row.params)


def with_base(rows: Sequence[Row]) -> list[Row]:
    """The rows of one model for each recipe, and before them some of the uncompressed base, for what was measured of it
    beside a recipe alone."""
    rows = of_one_model(rows)
    have = {(row.metric, _conditions(row)) for row in rows if row.recipe == UNCOMPRESSED}
    found = {}
    for row in rows:
        place = row.metric, _conditions(row)
        if row.base_value is not None and row.recipe != UNCOMPRESSED and place not in have:
            found[place] = replace(
                row, recipe=UNCOMPRESSED, value=row.base_value, samples=row.base_samples,
                base_value=None, ratio=None, base_samples=(), items=None, paired=None,
            )  # fmt: skip
    return [*found.values(), *rows]


def _conditions(row: Row, besides: Iterable[str] = ()) -> Conditions:
    left_out = {*GIVEN, *besides}
    return tuple((name, value) for name, value in row.params.items() if name not in left_out)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows of a column, all measured under the same conditions, by recipe and way.

    Attributes:
        rows: times and memory as multiples of one value of the base (`BaseValue`).
        conditions: by way.
        other: recipes that have been measured under other conditions only, by way.
        left_out: rows under other conditions.
    """

    rows: Mapping[tuple[str, Way], Row]
    conditions: Mapping[Way, Conditions]
    other: frozenset[tuple[str, Way]]
    left_out: int
    bases: Mapping[Way, "BaseValue"]


@dataclass(frozen=True, kw_only=True)
class BaseValue:
    """The value of the uncompressed base that ratios are laid on, and the range of those that they were taken to."""

    value: float
    low: float
    high: float


def by_ratio(chosen: Mapping[Column, Chosen]) -> str | None:
    """What the times and memory of columns are multiples of, in words; None where nothing is a multiple."""
    said = []
    for column, choice in chosen.items():
        for way, base in choice.bases.items():
            value, low, high = (number(column.scale * each) for each in (base.value, base.low, base.high))
            of = f", {', '.join(map(str, way))}" if len(choice.bases) > 1 else ""
            range_ = f" ({low} to {high} beside the recipes)" if low != high else ""
            said.append(f"{column.head}{of} {value}{range_}")
    if not said:
        return None
    return f"Each recipe's ratio to {UNCOMPRESSED}, measured in the same run, times one value of it: {'; '.join(said)}."


def is_ranked(row: Row) -> bool:
    """Whether the row's value can be compared with those of other recipes.

    A time or a peak of memory is one of the hour in which it was measured: without its ratio to the base of the same
    run it stands for itself.
    """
    metric = all_metrics().get(row.metric)
    return metric is None or not metric.by_ratio or row.recipe == UNCOMPRESSED or row.ratio is not None


def on_one_base(rows: Mapping[str, Row]) -> tuple[dict[str, Row], BaseValue | None]:
    """Rows of one metric under the same conditions by recipe: times and memory as ratio x one value of the base.

    That is the value of the base's own row, else the last one beside a recipe; None where nothing is a multiple of it.
    """
    beside = {recipe: row for recipe, row in rows.items() if _has_ratio(row)}
    if not beside:
        return dict(rows), None
    values = [row.base_value for row in beside.values() if row.base_value is not None]
    own = rows.get(UNCOMPRESSED)
    value = values[-1] if own is None or own.value is None else own.value
    laid = {recipe: _scaled(row, value) for recipe, row in beside.items()}
    return {**rows, **laid}, BaseValue(value=value, low=min(values), high=max(values))


def _has_ratio(row: Row) -> bool:
    metric = all_metrics().get(row.metric)
    return metric is not None and metric.by_ratio and row.value is not None and row.ratio is not None


def _scaled(row: Row, value: float) -> Row:
    """The row as if its base had had that value; its samples are the ratios of the rounds, which were taken in turn."""
    samples: tuple[float, ...] = ()
    if len(row.samples) == len(row.base_samples) and all(row.base_samples):
        samples = tuple(value * own / base for own, base in zip(row.samples, row.base_samples, strict=True))
    return replace(row, value=row.ratio * value, base_value=value, samples=samples, base_samples=())


def choose(column: Column, by: Sequence[str], rows: Sequence[Row]) -> Chosen:
    """The rows of a column: for each way those under the conditions that the most recipes were measured under.

    Rows of engines count where recipes have a line for each runtime, and there alone.
    Among equals the conditions of the newest row. Where a recipe has no value under them its newest row without a value
    stands, which says why; one that failed stands also in place of an older value.
    """
    meant = [row for row in rows if row.metric == column.metric and set(column.params) <= set(row.params.items())]
    meant = [row for row in meant if RUNTIME in by or row.runtime == NATIVE]
    ways: dict[Way, dict[Conditions, dict[str, tuple[int, Row]]]] = {}
    empty: dict[tuple[str, Way], tuple[int, Row]] = {}
    for place, row in enumerate(meant):
        way = tuple(row.runtime if name == RUNTIME else row.params.get(name) for name in by)
        if row.status in MEASURED:
            conditions = _conditions(row, (*by, *(name for name, _ in column.params)))
            ways.setdefault(way, {}).setdefault(conditions, {})[row.recipe] = (place, row)
        else:
            empty[row.recipe, way] = (place, row)
    found: dict[tuple[str, Way], Row] = {}
    conditions_of, other, left_out = {}, set(), 0
    for way, groups in ways.items():
        conditions, group = max(groups.items(), key=lambda pair: (len(pair[1]), max(at for at, _ in pair[1].values())))
        conditions_of[way] = conditions
        left_out += sum(len(each) for key, each in groups.items() if key != conditions)
        other |= {(recipe, way) for each in groups.values() for recipe in each if recipe not in group}
        for recipe, (place, row) in group.items():
            failed_at, failure = empty.get((recipe, way), (-1, row))
            found[recipe, way] = failure if failed_at > place and failure.status != "not_available" else row
    for key, (_, row) in empty.items():
        found.setdefault(key, row)
    bases = {}
    for way in conditions_of:
        laid, base = on_one_base({recipe: row for (recipe, of), row in found.items() if of == way})
        found |= {(recipe, way): row for recipe, row in laid.items()}
        bases |= {way: base} if base else {}
    apart = frozenset(other - set(found))
    return Chosen(rows=found, conditions=conditions_of, other=apart, left_out=left_out, bases=bases)


@dataclass
class Notes:
    """What cells refer to, each once, by its place from 1."""

    texts: list[str] = field(default_factory=list)

    def place(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def cell_of(column: Column, row: Row, notes: Notes, spread: Row | None = None) -> Cell:
    """The cell of a row, in the unit of the column."""

    def shown(value: float) -> float:
        if column.increase:
            return 100 * (value / (value if row.base_value is None else row.base_value) - 1)
        return column.scale * value

    note = notes.place(row.remark) if row.remark else None
    if row.value is None:
        return Cell(text=row.status.replace("_", " "), note=note)
    value, between = shown(row.value), interval(row)
    facts = {"value": value, "ranked": is_ranked(row), "note": note}
    text = number(value) + (" est." if row.status == "estimated" else "")
    if spread is not None and spread.value is not None:
        text += f" ± {number(column.scale * spread.value)}"
    if between is None:
        return Cell(text=text, **facts)
    low, high = map(shown, between)
    return Cell(text=f"{text} [{number(low)}, {number(high)}]", low=low, high=high, **facts)


def mark_best(lines: Mapping[Any, Sequence[Cell]], better: Sequence[str]) -> dict[Any, tuple[Cell, ...]]:
    """The cells of several lines, in each column the best marked; none where all are alike, or no way is better.

    What is not ranked neither is marked nor keeps another from it.
    """
    found = {name: list(cells) for name, cells in lines.items()}
    for place, direction in enumerate(better):
        ranked = [cells[place] for cells in found.values() if cells[place].ranked]
        values = [cell.value for cell in ranked if cell.value is not None]
        if direction == "neither" or len(set(values)) < 2:
            continue
        best = min(values) if direction == "lower" else max(values)
        for cells in found.values():
            if cells[place].ranked and cells[place].value == best:
                cells[place] = replace(cells[place], best=True)
    return {name: tuple(cells) for name, cells in found.items()}
