"""`python -m bench history`: which metrics changed over the stored runs, and at which commit.

A series is one row (base, recipe, device, metric and parameters) over the runs of a journal, or one benchmark over the
files that `--benchmark-autosave` left (`benchmark.median_s`, seconds of a round). Of rows with a ratio to the base of
the same run the ratio is followed, which a slower machine does not move; what slows both is seen in the rows of fp16.
Counts and deterministic numbers moved wherever they differ from the run before; for all else see `level_change`. A
step is named by the first run behind it, with what else differed between that run and the one before.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.commands.arguments import journal_option
from bench.errors import BenchError, JournalError
from bench.gate.words import arrow, percent, relative
from bench.machine import git as repository
from bench.metrics import all_metrics
from bench.results.bases import Identity, names
from bench.results.row import MEASURED
from bench.results.runs import runs_of
from bench.statistics.level_change import cut, steps, strongest
from compression import CompressionError, Recipe, split_recipes
from compression.files.strict_json import at_least, finite, path_option, strict_json
from compression.files.terminal import printable

LEVEL = 0.01  # the chance that any series is named where none moved
SAME = 1e-9  # relative: what is not a change of a deterministic number
WATCHED = ("torch", "python", "data_hash", "seed", "driver")  # named beside a step where they differ


@dataclass(frozen=True, slots=True)
class Point:
    """One row of one run."""

    time: float  # seconds since the epoch
    commit: str | None  # 12 digits
    value: float
    context: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One row over all runs that have it, oldest first."""

    base: str
    recipe: str
    device: str
    key: str
    unit: str
    better: str
    exact: bool  # whether any difference is a change
    floor: float  # in `unit`: no smaller difference is one
    points: tuple[Point, ...]

    @property
    def metric(self) -> str:
        """The key without its parameters."""
        return self.key.partition("[")[0]

    @property
    def values(self) -> list[float]:
        """The value of each point."""
        return [each.value for each in self.points]


@dataclass(frozen=True, kw_only=True)
class Move:
    """A series that moved: the point at which it did, and the level on both sides, up to the next step."""

    series: Series
    place: int  # of the first point of the new level
    then: float
    now: float
    runs: tuple[int, int]  # points of either level
    p: float | None  # None where any difference is a change

    @property
    def direction(self) -> str:
        """Better, worse, or moved where neither direction is."""
        if self.series.better == "neither":
            return "moved"
        return "better" if (self.now < self.then) == (self.series.better == "lower") else "worse"

    def words(self, subjects: Mapping[str, str] | None = None) -> str:
        """What moved, by how much, since which commit, and what else was different."""
        before, first = self.series.points[self.place - 1], self.series.points[self.place]
        share = percent(relative(self.then, self.now))
        number = f"{arrow(self.then, self.now)} {self.series.unit}".rstrip()
        said = f"{self.series.recipe}: {self.series.key} {self.direction}: {number} ({share})"
        if first.commit is None or before.commit is None:
            said += f" on {_day(first.time)}, of no known commit"
        elif first.commit == before.commit:
            said += f" on {_day(first.time)}, within commit {first.commit}: not the code"
        else:
            subject = (subjects or {}).get(first.commit)
            said += f" at commit {first.commit}" + (f" ({subject})" if subject else "")
            said += f", {_day(first.time)}; the run before was of {before.commit}"
        said += f"; {self.runs[0]} runs before, {self.runs[1]} since"
        said += "" if self.p is None else f", p {self.p:.2g}"
        others = [
            f"{name} {before.context.get(name)!r} -> {first.context.get(name)!r}"
            for name in WATCHED
            if before.context.get(name) != first.context.get(name)
        ]
        return said + (f"; also different: {', '.join(others)}" if others else "")


def moves(series: Iterable[Series], level: float = LEVEL) -> list[Move]:
    """Every step of every series, the latest first.

    Where no series moved, any is named with a probability of at most `level`, however many there are, if the values of
    each could as well have come in any other order; see `bench.statistics.level_change.cut`.
    """
    series = list(series)
    tried = {
        number: found.p for number, each in enumerate(series) if not each.exact if (found := strongest(each.values))
    }
    allowed = cut(list(tried.values()), level)
    found = []
    for number, each in enumerate(series):
        if each.exact:
            found += _levels(each, [(place, None) for place in _differences(each)])
        elif tried.get(number, 1.0) <= allowed:
            found += _levels(each, steps(each.values, allowed))
    return sorted(found, key=lambda each: -each.series.points[each.place].time)


def _differences(series: Series) -> list[int]:
    values = series.values
    return [
        place
        for place in range(1, len(values))
        if abs(values[place] - values[place - 1]) > max(series.floor, SAME * abs(values[place - 1]))
    ]


def _levels(series: Series, places: Sequence[tuple[int, float | None]]) -> list[Move]:
    """The steps with the medians of the levels that they part; those not above the metric's floor are none."""
    bounds = [0, *(place for place, _ in places), len(series.points)]
    found = []
    for number, (place, p) in enumerate(places, 1):
        before, behind = series.values[bounds[number - 1] : place], series.values[place : bounds[number + 1]]
        then, now = median(before), median(behind)
        if abs(now - then) > series.floor:
            runs = (len(before), len(behind))
            found.append(Move(series=series, place=place, then=then, now=now, runs=runs, p=p))
    return found


def of_journal(path: str | Path) -> list[Series]:
    """The series of a journal. Raises JournalError where it cannot be read."""
    series: dict[tuple[str, ...], tuple[dict[str, Any], list[Point]]] = {}
    metrics = all_metrics()
    for run in runs_of(path, apart=True):
        contexts: dict[str, Mapping[str, Any]] = {}  # by kind of measurement: one for all of its rows
        for row in run.rows:
            if row.status not in MEASURED:
                continue
            metric = metrics.get(row.metric)
            exact = metric is not None and metric.kind in ("counted", "deterministic")
            as_ratio = row.ratio is not None and not exact
            # rows that were measured without the base are a series of their own: their numbers are no ratios
            key = (row.base, row.recipe, row.device, row.key, "ratio" if as_ratio else "value")
            if row.of not in contexts:
                data = run.context.get("data_hash")
                data = data.get(row.of) if isinstance(data, dict) else data
                contexts[row.of] = {name: run.context.get(name) for name in WATCHED} | {"data_hash": data}
            point = Point(run.time, run.commit, row.ratio if as_ratio else row.value, contexts[row.of])
            facts = {
                "unit": "of fp16" if as_ratio else row.unit,
                "better": row.better,
                "exact": exact,
                "floor": 0.0 if as_ratio or metric is None else metric.floor,
            }
            series.setdefault(key, (facts, []))[1].append(point)
    return _named(series)


def of_storage(folder: str | Path) -> list[Series]:
    """The series of a storage of pytest-benchmark, one for each benchmark. Raises JournalError for a damaged file."""
    files = []
    for path in Path(folder).glob("*/*.json"):
        try:
            table = strict_json(path.read_text(encoding="utf-8"))
            when = datetime.fromisoformat(table["datetime"]).timestamp()
            commit = table["commit_info"].get("id")
            machine = " ".join(str(table["machine_info"].get(name)) for name in ("node", "machine"))
            benchmarks = [(each, finite(each["stats"]["median"])) for each in table["benchmarks"]]
            for each in table["benchmarks"]:
                info = dict(each.get("extra_info") or {})
                texts = [info.get(name) or "" for name in ("recipe", "base", "base_hash", "device")]
                texts += [each["name"], each["fullname"], each.get("group") or "", commit or ""]
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"{texts} must be texts")
            python = table["machine_info"].get("python_version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise JournalError(f"{path} is not a result of pytest-benchmark: {error}; remove it") from None
        files.append((when, commit and commit[:12], machine, python, benchmarks))
    called = names(_base_of(each) for *_, benchmarks in files for each, _ in benchmarks)
    series: dict[tuple[str, ...], tuple[dict[str, Any], list[Point]]] = {}
    facts = {"unit": "s", "better": "lower", "exact": False, "floor": 0.0}
    for when, commit, machine, python, benchmarks in sorted(files, key=lambda each: each[0]):
        for each, value in benchmarks:
            info = each.get("extra_info") or {}
            name, group = info.get("recipe") or each["fullname"], each.get("group")
            device = info.get("device") or machine
            key = (called[_base_of(each)], name, device, f"benchmark.median_s[{group or each['name']}]")
            series.setdefault(key, (facts, []))[1].append(Point(when, commit, value, {"python": python}))
    return _named(series)


def _base_of(benchmark: Mapping[str, Any]) -> Identity:
    info = benchmark.get("extra_info") or {}
    return str(info.get("base")), info.get("base_hash")


def _named(series: Mapping[tuple[str, ...], tuple[dict[str, Any], list[Point]]]) -> list[Series]:
    return [
        Series(base=base, recipe=recipe, device=device, key=key, points=tuple(points), **facts)
        for (base, recipe, device, key, *_), (facts, points) in series.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Name the commits at which metrics moved: `python -m bench history`."""
    parser = argparse.ArgumentParser(prog="python -m bench history", description=main.__doc__.partition(":")[0])
    journal_option(parser)
    parser.add_argument(
        "--storage", type=path_option, default=Path(".benchmarks"), metavar="DIR", help="of pytest-benchmark"
    )
    parser.add_argument(
        "--metric", help="metric names, with or without group, separated by commas; also prints the runs"
    )
    parser.add_argument("--model", metavar="RECIPES", help="these recipes only, separated by commas")
    parser.add_argument("--base", help="this base only")
    parser.add_argument("--last", type=int, default=100, help="number of past runs; default 100")
    parser.add_argument("--level", type=float, default=LEVEL, help=f"false-alarm rate; default {LEVEL}")
    options = parser.parse_args(arguments)
    if not 0 < options.level < 1:
        parser.error(f"--level must be above 0 and below 1, not {options.level:g}")
    at_least("--last", options.last, 1, parser.error)
    try:
        series = [
            *(of_journal(options.journal) if options.journal.exists() else []),
            *(of_storage(options.storage) if options.storage.is_dir() else []),
        ]
        recipes = options.model and {Recipe.parse(text).text for text in split_recipes(options.model)}
    except (BenchError, CompressionError) as error:
        parser.error(str(error))
    if not series:
        parser.error(
            f"neither {options.journal} nor {options.storage} holds results; run pytest bench, with "
            "--benchmark-autosave for the latter"
        )
    names = options.metric and options.metric.split(",")
    series = [
        replace(each, points=each.points[-options.last :])
        for each in series
        if options.base in (None, each.base)
        and (not recipes or each.recipe in recipes)
        and (not names or each.metric in names or each.metric.partition(".")[2] in names)
    ]
    if not series:
        parser.error("no stored result matches these metrics, recipes and bases")
    _print(series, moves(series, options.level), options.level, listed=bool(names))


def _print(series: Sequence[Series], found: Sequence[Move], level: float, listed: bool) -> None:
    moved = {id(each.series) for each in found}
    longest = max(len(each.points) for each in series)
    print(
        f"{len(series)} series of up to {longest} runs, {len(moved)} changed; false-alarm rate at most "
        f"{100 * level:g} %"
    )
    subjects = repository.subjects() if found else {}
    for each in found:
        print(printable(each.words(subjects)))
    if not listed:
        return
    for each in series:
        print("\n" + printable(f"{each.recipe}: {each.key} ({each.unit}) of {each.base} on {each.device}"))
        places = {move.place for move in found if move.series is each}
        for number, point in enumerate(each.points):
            print(f"  {_day(point.time)}  {point.commit or '-':12}  {point.value:.6g}{'  moved' * (number in places)}")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
