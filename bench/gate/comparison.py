"""Compares one row with its recorded value. Which rows are compared, and by which function here, is
decided in `bench.gate.comparability`."""

import math
from dataclasses import replace
from typing import NamedTuple

from bench.gate.entry import Entry
from bench.gate.words import apart, percent, relative, shown
from bench.metrics import Metric
from bench.results import item_pairs
from bench.results.row import Row
from bench.statistics import paired
from bench.statistics.timing_change import ESTIMATES, SAMPLES, shift

AGAINST = "against"  # the measurement whose rows are compared with those of a commit, taken in turn with them
BASE = "fp16"  # the recipe that ratios refer to
EXACT = 1e-9  # relative: what printing and summing in another order may change
ELSEWHERE = 1e-3  # relative: what another device or version of torch may change in a deterministic number
ELSEWHERE_PAIRED = 1e-4  # relative: what another device moved in no measurement; see docs/methodology/gate-items.md
LEVEL = 0.01  # an unchanged run raises an alarm, or looks better, at most so often
FEWEST = 8  # reals: the signs of 7 differences are alike by chance in 2 of 128 cases
ROUNDED = 1e-5  # relative: what recording samples with 6 digits may change
MORE = (4, 10)  # times the usual rounds, taken one after the other where a verdict is not sure
LOOKS = len(MORE)  # at which a change can be believed: the second of two that see it, or the last

_WORST_LAST = ("pass", "improved", "inconclusive", "regressed")


def one_sided(level: float, checks: int) -> float:
    """What either side of an interval may take of a row's level: in each of its checks, at each look, by each estimate.

    `checks` are the numbers of the row that are compared (`checks_of`), each of which can raise the alarm.
    """
    return level / 2 / checks / LOOKS / ESTIMATES


def checks_of(metric: Metric, *, ratio: bool) -> list[tuple[float, bool]]:
    """The tolerance of each number of a timed row that is compared, and whether that is the ratio to the base.

    `ratio` says whether the row has one: else the value alone is compared.
    """
    checks = [(metric.rel, True)] if ratio else [(metric.rel, False)] if metric.rel_absolute is None else []
    return checks if metric.rel_absolute is None else [*checks, (metric.rel_absolute, False)]


class Finding(NamedTuple):
    """An outcome and its words, before the mode decides whether it fails."""

    outcome: str
    words: str
    always_fails: bool = False
    cause: str = ""  # why it was not compared, in a few words that rows have in common
    records: bool = False  # whether a baseline that is recorded here makes it comparable


def compare_values(row: Row, entry: Entry, metric: Metric, allowed: float, level: float) -> Finding:
    """The value against the recorded one, up to `allowed`; where results per item differ, what they say stands by."""
    check = _check("", entry.value, row.value, row.unit, allowed, row.value - entry.value, metric)
    differ = entry.items and row.value != entry.value
    return _conclude(row, metric, [check], f"; item by item {_paired(row, entry, metric, level)[1]}" if differ else "")


def compare_across_dtypes(row: Row, entry: Entry, metric: Metric) -> Finding:
    """The value against one computed in another dtype, with the metric's `rel` and `dtype_floor` as tolerances.

    Rounding in 16 bits moves most items in the same direction, so a paired test cannot tell it from a loss.
    """
    loose = replace(metric, floor=max(metric.floor, metric.dtype_floor))
    allowed = max(metric.rel, ELSEWHERE)
    check = _check("", entry.value, row.value, row.unit, allowed, row.value - entry.value, loose)
    now, then = (each.compute_dtype or "the stored dtype" for each in (row, entry))
    floor = f", at least {loose.floor:.3g} {row.unit}" if loose.floor else ""
    words = f"; computed in {now}, the baseline in {then}: tolerance {100 * allowed:.3g} %{floor}"
    return _conclude(row, loose, [check], words)


def compare_items(row: Row, entry: Entry, metric: Metric, level: float) -> Finding:
    """The paired test of this run's items against the baseline's."""
    found, said = _paired(row, entry, metric, level)
    sampled = metric.kind == "sampled"
    allowed = metric.rel if sampled else ELSEWHERE
    least = metric.floor if sampled else max(metric.floor, ELSEWHERE_PAIRED * abs(entry.value))
    change = relative(entry.value, row.value)
    worse = {"lower": row.value > entry.value, "higher": row.value < entry.value, "neither": False}[metric.better]
    if abs(row.value - entry.value) <= least:
        outcome = "pass"
    elif found.p <= level and metric.better != "neither":
        outcome = "regressed" if worse else "improved"
    else:
        outcome = "inconclusive" if worse and abs(change) > allowed else "pass"
    words = (
        f"{_moved_from(entry.value, row.value)} {row.unit} ({percent(change)}); item by item {said}, a change at "
        f"p <= {level:.2g}"
    )
    return _conclude(row, metric, [Finding(outcome, words)])


def _paired(row: Row, entry: Entry, metric: Metric, level: float) -> tuple[paired.Difference, str]:
    found = item_pairs.compare(row.items, entry.items, level=level)
    return found, paired.words(found, "nat" if metric.of_items == "exp" else row.unit)


def compare_timed(row: Row, entry: Entry, metric: Metric, level: float) -> Finding:
    wanted = checks_of(metric, ratio=row.ratio is not None and entry.ratio is not None)
    tail = one_sided(level, len(wanted))
    checks = [_check_timed(row, entry, metric, allowed, tail, to_base=to_base) for allowed, to_base in wanted]
    return _conclude(row, metric, checks, _moved(row, entry))


def _check_timed(row: Row, entry: Entry, metric: Metric, allowed: float, tail: float, *, to_base: bool) -> Finding:
    now, then = ((each.samples, each.base_samples) if to_base else (each.samples,) for each in (row, entry))
    if metric.of == AGAINST:
        now, then = (*now, *then), ()
    moved = shift(now, then, metric.best, highest=metric.better == "higher")
    interval = moved.interval(tail) if moved else None
    if row.samples and entry.samples and min(map(len, (*now, *then))) < SAMPLES:  # too few to be sure of anything
        interval = (-math.inf, math.inf)
    return _check(
        f"ratio to {BASE} " if to_base else "",
        *((entry.ratio, row.ratio) if to_base else (entry.value, row.value)),
        "" if to_base else row.unit,
        allowed,
        abs(entry.value) * math.expm1(moved.log) if moved else row.value - entry.value,
        metric,
        math.expm1(moved.log) if moved else None,
        interval,
        1 - 2 * tail,
    )


def _check(
    label: str,
    then: float,
    now: float,
    unit: str,
    allowed: float,
    difference: float,
    metric: Metric,
    estimate: float | None = None,
    interval: tuple[float, float] | None = None,
    sure: float = 1.0,
) -> Finding:
    """One number against what it was. `difference` is that of the values, or what `estimate` makes of it.

    `estimate` is the change by the rounds of both, and `interval` that in which it lies with probability `sure`.
    """
    change = relative(then, now)
    sign = {"lower": "+", "higher": "-", "neither": "±"}[metric.better]
    words = f"{label}{_moved_from(then, now)} {unit}".rstrip() + f" ({percent(change)}"
    if estimate is not None:
        change = estimate
        words += f", by rounds {percent(change)}"
    low, high = interval or (change, change)
    if math.isfinite(low) and low < high:
        words += f", {100 * sure:.6g} % interval {percent(low)} to {percent(high)}"
    words += f", tolerance {sign}{100 * allowed:.3g} %)"
    if metric.better == "higher":
        change, low, high = -change, -high, -low
    if abs(difference) <= metric.floor or (estimate is not None and abs(estimate) <= ROUNDED):
        outcome = "pass"
    elif metric.better == "neither":
        outcome = "regressed" if abs(change) > allowed and metric.kind in ("counted", "deterministic") else "pass"
    elif change > allowed:
        outcome = "regressed" if low > allowed else "inconclusive"
    else:
        outcome = "improved" if high < -allowed else "pass"
    return Finding(outcome, words)


def _moved_from(then: float, now: float) -> str:
    return "baseline {}, now {}".format(*apart(then, now))


def _conclude(row: Row, metric: Metric, checks: list[Finding], moved: str = "") -> Finding:
    outcome = max((check.outcome for check in checks), key=_WORST_LAST.index)
    words = "; ".join(check.words for check in checks if check.outcome == outcome)
    advice = {
        "improved": "; better than the baseline: record it, or later losses hide behind it",
        "inconclusive": "; beyond the tolerance, but with too few or too scattered samples to be sure: measure more",
    }.get(outcome, "")
    return Finding(outcome, f"{row.recipe}: {row.key} {outcome}: {words}{moved}{advice}")


def _moved(row: Row, entry: Entry) -> str:
    """Which of the two sides changed, in words: a ratio alone does not tell."""
    if row.base_value is None or entry.base_value is None or row.recipe == BASE:
        return ""
    own, base = (abs(relative(*pair)) for pair in ((entry.value, row.value), (entry.base_value, row.base_value)))
    mover = row.recipe if own >= 2 * base else BASE if base >= 2 * own else "both"
    return (
        f"; {row.recipe} {shown(entry.value, row.value, row.unit)}, "
        f"{BASE} {shown(entry.base_value, row.base_value, row.unit)}: {mover} moved"
    )
