"""Charts as inline SVG, drawn from numbers; colours and type are the page's (its style sheet names the classes).

All are 360 units wide, a phone's width, so that their text is never set smaller than the text around them. What a chart
shows is also in a table or a caption beside it: an `<svg>` here has a title and no other text alternative.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.report.cells import number
from bench.report.escaping import html as escape

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 20, 34
_STRIP = 18  # height of a strip
_LETTER = 5.7  # width of a letter of a label, about


@dataclass(frozen=True, kw_only=True)
class Point:
    """A recipe in a plane; `by` is the recipe that dominates it, None on the front."""

    name: str
    family: str
    x: float
    y: float
    by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """A line of a chart of intervals: a value with its ends, or a change from `low` to `value`."""

    name: str
    family: str
    value: float
    low: float
    high: float
    text: str


def front(points: Sequence[Point], *, x: str, y: str, higher: bool, title: str) -> str:
    """A scatter plot of recipes by cost (x, lower is better) and quality (y); what is dominated is grey and unnamed.

    Args:
        higher: whether a higher y is better. An axis whose largest value is 10 times its least is logarithmic.
    """
    height = 250
    across = _axis([point.x for point in points], _LEFT, WIDTH - _RIGHT)
    up = _axis([point.y for point in points], height - _BOTTOM, _TOP)
    best = sorted((point for point in points if point.by is None), key=lambda point: point.x)
    parts = [_grid(across, up, height), _axis_titles(x, y, height)]
    corners = []
    for before, after in pairwise(best):
        corners += [(before.x, before.y), (after.x, before.y)]
    corners += [(point.x, point.y) for point in best[-1:]]
    if len(best) > 1:
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in corners)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for point in sorted(points, key=lambda point: point.by is None):
        said = f"{point.name}: {x} {number(point.x)}, {y} {number(point.y)}"
        said += ", on the front" if point.by is None else f", dominated by {point.by}"
        mark = f'<circle cx="{across(point.x):.1f}" cy="{up(point.y):.1f}" r="{4.5 if point.by is None else 3}"/>'
        kind = "best" if point.by is None else "dominated"
        parts.append(_marked(point.name, point.family, f"<title>{escape(said)}</title>{mark}", kind))
    taken = [(across(p.x) - 5, up(p.y) - 5, across(p.x) + 5, up(p.y) + 5) for p in best]
    for point in best:
        parts.append(_label(point, across(point.x), up(point.y), taken, height, below=higher))
    return _svg(title, height, parts)


def spans(lines: Sequence[Span], *, x: str, arrow: bool = False) -> tuple[list[str], str]:
    """For each value with its interval a strip of its own, and the scale that all of them share.

    With `arrow` they are changes, from an open mark to a filled one. The words beside a strip are the page's.
    """
    low = min(min(each.low, each.value) for each in lines)
    high = max(max(each.high, each.value) for each in lines)
    near_zero = 0 < low < high - low
    across = _axis([low, high, *([0.0] if near_zero else [])], 8, WIDTH - 8, log=False)
    grid = "".join(
        f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="0" y2="{_STRIP}"/>'
        for tick in across.ticks
    )
    strips, y = [], _STRIP / 2
    for each in lines:
        ends = across(each.low), across(each.high)
        marks = f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>'
        marks += f'<circle class="open" cx="{ends[0]:.1f}" cy="{y}" r="3.5"/>' if arrow else ""
        marks += f'<circle cx="{across(each.value):.1f}" cy="{y}" r="4"/>'
        inside = f'{grid}<g class="span" data-family="{escape(each.family)}">{marks}</g>'
        strips.append(_svg(f"{each.name}: {each.text}", _STRIP, [inside]))
    return strips, _svg(x, 16, [_scale(across, 0, 0)])


@dataclass(frozen=True)
class Axis:
    """From values to places, with values worth a line."""

    place: Callable[[float], float]
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.place(value)


def _axis(values: Iterable[float], start: float, end: float, *, log: bool | None = None) -> Axis:
    """An axis that holds all values with some air, logarithmic if they are positive and far apart."""
    values = list(values)
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and high / low >= 10
    if log:
        low, high = math.log(low), math.log(high)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - air, high + air

    def place(value: float) -> float:
        return start + (end - start) * ((math.log(value) if log else value) - low) / (high - low)

    return Axis(place, _log_ticks(low, high) if log else _ticks(low, high))


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Three to six round numbers between two.

    >>> _ticks(0.0, 1.0)
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    rough = (high - low) / 4.5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 2.5, 5, 10) if unit * each >= 0.95 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{count * step:.10g}") for count in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2, 5, 10 ... between two logarithms, or powers of ten where these are enough."""
    found: list[float] = []
    for factors in ((1,), (1, 2, 5)):
        found = [
            factor * 10.0**power
            for power in range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
            for factor in factors
            if low <= math.log(factor * 10.0**power) <= high
        ]
        if len(found) >= 3:
            break
    every = math.ceil(len(found) / 6) or 1
    return tuple(found[::every])


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    name = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _marked(name: str, family: str, inside: str, kind: str) -> str:
    return f'<g class="{kind}" data-recipe="{escape(name)}" data-family="{escape(family)}">{inside}</g>'


def _grid(across: Axis, up: Axis, height: float) -> str:
    lines = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text class="axis" x="{_LEFT - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        for tick in up.ticks
    )
    return lines + _scale(across, _TOP, height - _BOTTOM)


def _scale(across: Axis, top: float, foot: float) -> str:
    """Lines and numbers of a horizontal axis; numbers that would run into each other are left out."""
    parts, end = [], -math.inf
    for tick in across.ticks:
        x, half = across(tick), len(_short(tick)) * _LETTER / 2
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}"/>')
        if x - half > end and x + half < WIDTH:
            parts.append(f'<text class="axis" x="{x:.1f}" y="{foot + 14}" text-anchor="middle">{_short(tick)}</text>')
            end = x + half + 6
    return "".join(parts)


def _axis_titles(x: str, y: str, height: float) -> str:
    return (
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{height - 4}" text-anchor="end">{escape(x)} →</text>'
        f'<text class="axis" x="{_LEFT}" y="10">↑ {escape(y)}</text>'
    )


def _label(point: Point, x: float, y: float, taken: list, height: float, *, below: bool) -> str:
    """The name of a point where there is room for it beside the names before, else nothing."""
    text = _cut(point.name, 26)
    width = len(text) * _LETTER
    sides = ((7, 4, "start"), (-7, 4, "end"), (7, 15, "start"), (-7, 15, "end"), (7, -8, "start"), (-7, -8, "end"))
    for across, down, anchor in sides if below else (*sides[:2], *sides[4:], *sides[2:4]):
        left = x + across - (width if anchor == "end" else 0)
        box = (left, y + down - 9, left + width, y + down + 2)
        inside = _LEFT < box[0] and box[2] < WIDTH and _TOP + 5 < box[1] and box[3] < height - _BOTTOM
        if inside and not any(_meet(box, other) for other in taken if other != (x - 5, y - 5, x + 5, y + 5)):
            taken.append(box)
            words = f'<text x="{x + across:.1f}" y="{y + down:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
            return _marked(point.name, point.family, words, "name")
    return ""


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"


def _short(value: float) -> str:
    """A number on an axis.

    >>> _short(0.25), _short(2000.0), _short(5e6), _short(0.00001)
    ('0.25', '2000', '5M', '1e-05')
    """
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"
