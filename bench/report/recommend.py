"""Recommends a method: of those measured, the ones on the Pareto front that stay within the limits.

    python -m bench recommend --max-gb 4 --max-quality-loss 2%

Nothing is predicted. The front is that of stored size and loss of quality, and of latency where a limit or `--fastest`
asks for it: methods that no other one beats in any of them without being worse in another. The loss is a share of the
uncompressed base's quality: of its mean accuracy, or by how much its perplexity is exceeded. A latency is the method's
ratio to the base of the same run, times one value of the base; without a ratio it is not known.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.errors import OptionError
from bench.report.cells import Chosen, choose, is_ranked, number, with_base
from bench.report.escaping import markdown
from bench.report.fronts import front
from bench.report.layout import Column
from bench.results.row import NATIVE, RUNTIME, Param, Row
from compression.recipes.recipe import UNCOMPRESSED

BASELINES = Path("baselines")
QUALITY = {  # name: the column, and the loss of a value beside the base's
    "accuracy": Column(head="Accuracy", metric="quality.average_accuracy"),
    "perplexity": Column(head="Perplexity", metric="quality.perplexity"),
}
SIZE = Column(head="Size (GiB)", metric="efficiency.model_size_gb")
LATENCY = Column(head="Latency (ms/tok)", metric="efficiency.latency_ms", params=(("mode", "eager"), ("batch", 1)))
COSTS = (
    SIZE, LATENCY,
    Column(head="Memory (MiB)", metric="efficiency.peak_memory_mb", params=(("batch", 1),)),
    Column(head="Energy (mJ/tok)", metric="efficiency.energy_mj_per_token", params=(("batch", 1),)),
    Column(head="Compression Time (s)", metric="efficiency.compression_seconds"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a method may cost at most; None: no limit."""

    size: float | None = None  # GiB
    loss: float | None = None  # share of the base's quality
    latency: float | None = None  # ms for a generated token

    def of(self, point: "Point") -> list[tuple[float, float]]:
        """Each limit with what the method has."""
        pairs = ((self.size, point.size), (self.loss, point.loss), (self.latency, point.latency))
        return [(limit, value) for limit, value in pairs if limit is not None and value is not None]

    def excess(self, point: "Point") -> float:
        """By how much the worst limit is exceeded, as a share of it; 0 within all.

        A limit of the loss, which may be 0, counts as one percent at least.
        """
        whole = Limits(size=self.size, latency=self.latency, loss=None if self.loss is None else max(self.loss, 0.01))
        shares = zip(self.of(point), whole.of(point), strict=True)
        return max((max(0.0, value - limit) / share for (limit, value), (share, _) in shares), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured of one method."""

    recipe: str
    size: float  # GiB
    loss: float  # share of the base's quality; below 0 the method is better
    latency: float | None  # ms for a generated token: ratio to the base x one value of the base
    costs: Mapping[str, float]  # by head of COSTS, as shown

    def coordinates(self, timed: bool) -> tuple[float, ...]:
        """Lower is better in each."""
        return (self.size, self.loss, self.latency) if timed and self.latency is not None else (self.size, self.loss)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The methods to take, the best first; where there are none, what comes nearest to the limits."""

    taken: tuple[Point, ...]
    nearest: Point | None
    front: tuple[str, ...]
    considered: int


def points_of(rows: Sequence[Row], quality: str) -> tuple[list[Point], list[str]]:
    """The methods of which size and quality are known, and those of which they are not."""
    rows = with_base(rows)

    def values(column: Column, among: Callable[[Row], bool] = lambda row: True) -> dict[str, float]:
        found = choice_of(column, rows).rows
        return {recipe: row.value for (recipe, _), row in found.items() if row.value is not None and among(row)}

    latencies = values(LATENCY, is_ranked)
    costs = {column.head: values(column) for column in COSTS}
    scores = values(QUALITY[quality])
    base = scores.get(UNCOMPRESSED)
    points, left = [], []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        size, score = costs[SIZE.head].get(recipe), scores.get(recipe)
        if size is None or score is None or not base:
            left.append(recipe)
            continue
        loss = score / base - 1 if quality == "perplexity" else 1 - score / base
        known = {head: of[recipe] for head, of in costs.items() if recipe in of}
        points.append(Point(recipe=recipe, size=size, loss=loss, latency=latencies.get(recipe), costs=known))
    return points, left


def on_runtime(rows: Sequence[Row], runtime: str) -> list[Row]:
    """What an engine served, as if it were what runs here, and of the rest what no engine changes: size and cost.

    Raises:
        OptionError: nothing was measured on that engine.
    """
    found = [replace(row, params=_as_native(row)) for row in rows if row.runtime == runtime != NATIVE]
    if not found:
        there = ", ".join(sorted({row.runtime for row in rows}))
        raise OptionError(f"--runtime {runtime}: nothing was measured on it; measured on: {there}. Measure with "
                          f"pytest bench --runtime {runtime}")  # fmt: skip
    return [row for row in rows if row.of in ("artefact", "cost")] + found


def _as_native(row: Row) -> dict[str, Param]:
    """The parameters of a row as they would be without an engine."""
    mode = {"mode": "eager"} if row.of == "generation" else {}
    return {name: value for name, value in row.params.items() if name != RUNTIME} | mode


def choice_of(column: Column, rows: Sequence[Row]) -> Chosen:
    return choose(column, (), with_base([row for row in rows if row.metric == column.metric]))


def recommend(points: Sequence[Point], limits: Limits, prefer: str = "loss") -> Answer:
    """The methods on the front within the limits, in order of `prefer`: "loss", "size" or "latency".

    Latency counts where it is limited or preferred; a method whose latency is not known is then left out.
    """
    timed = limits.latency is not None or prefer == "latency"
    points = [point for point in points if not timed or point.latency is not None]
    by = front({point.recipe: point.coordinates(timed) for point in points})
    best = sorted((point for point in points if by[point.recipe] is None), key=lambda point: getattr(point, prefer))
    taken = tuple(point for point in best if not limits.excess(point))
    nearest = min(best, key=limits.excess) if best and not taken else None
    return Answer(taken=taken, nearest=nearest, front=tuple(each.recipe for each in best), considered=len(points))


def share(text: str) -> float:
    """A loss as it is written: `2%` or `0.02`. Raises ArgumentTypeError for anything else, `2` included."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 and not (text.endswith("%") and value >= 0):
        raise argparse.ArgumentTypeError(
            f"the share must be a percentage such as 2%, or a number such as 0.02, not {text!r}"
        )
    return value


def lines(answer: Answer, limits: Limits, quality: str) -> list[str]:
    """The answer in words and a table."""
    asked = [
        text
        for limit, text in (
            (limits.size, f"at most {limits.size} GiB"),
            (limits.loss, f"a loss of at most {100 * (limits.loss or 0):g} %"),
            (limits.latency, f"at most {limits.latency} ms/token"),
        )
        if limit is not None
    ]
    within = " and ".join(asked) or "no limit"
    said = [f"{answer.considered} methods were measured; on the front: {', '.join(answer.front)}."]
    if answer.taken:
        return [*said, f"Within {within}:", "", *_table(answer.taken, quality)]
    if answer.nearest is None:
        return [*said, f"Nothing was measured of which it is known whether it meets {within}."]
    over = f"{100 * limits.excess(answer.nearest):.3g} % beyond the limit that it misses most"
    return [*said, f"Nothing measured meets {within}. Nearest is {answer.nearest.recipe}, {over}:", "",
            *_table([answer.nearest], quality)]  # fmt: skip


def _table(points: Sequence[Point], quality: str) -> list[str]:
    heads = [f"Quality loss: {quality} (%)", *(column.head for column in COSTS)]
    found = [f"| Method | {' | '.join(heads)} |", f"|:---|{'---:|' * len(heads)}"]
    for point in points:
        costs = [number(point.costs[c.head]) if c.head in point.costs else "not measured" for c in COSTS]
        found.append(f"| {markdown(point.recipe)} | {100 * point.loss:.3g} | {' | '.join(costs)} |")
    return found
