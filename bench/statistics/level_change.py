"""Change points of a series: rank-sum tests of neighbouring windows, with exact probabilities.

For every place in the series, the `width` values before it are compared with as many behind it, for each of WIDTHS,
fewer at the ends: the rank-sum test of Wilcoxon (1945) and Mann and Whitney (1947), two-sided. Narrow windows see a
level that came and went, wide ones a small step that stays. That many windows are looked at is paid for by the union
bound: the p of a series is the sum, over its windows, of the probability that the window alone is as striking as the
most striking one, each from the exact distribution (a window too small to be so striking adds nothing).

So, whatever the noise looks like (bursts, two clock speeds, heavy tails), a series whose values could as well have come
in any other order has a p of at most `level` in at most that share of cases. Values that depend on those before them,
as on a machine that slowly warms up, are not such a series.

Equal values are ordered by chance, with a fixed seed.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

WIDTHS = (5, 10, 20, 40)
LEAST = 2  # values on each side of a place


class Step(NamedTuple):
    """The first place of a new level, and the probability of one so striking in a series that has none."""

    place: int
    p: float


def strongest(values: Sequence[float]) -> Step | None:
    """The most striking place of a series; None where it is too short to have any."""
    import numpy as np

    windows = _windows(len(values))
    if windows is None:
        return None
    order = np.lexsort((np.random.default_rng(len(values)).random(len(values)), np.asarray(values, dtype=float)))
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values))
    larger = np.zeros((len(values) + 1, len(values) + 1), dtype=np.int64)  # pairs (i, j) with value j above value i
    larger[1:, 1:] = (ranks[None, :] > ranks[:, None]).cumsum(0).cumsum(1)
    start, place, end = windows.start, windows.place, windows.end
    sums = larger[place, end] - larger[start, end] - larger[place, place] + larger[start, place]
    alone = windows.probabilities[windows.offset + sums]
    best = int(alone.argmin())
    at = int(np.searchsorted(windows.striking, alone[best] * (1 + 1e-9), side="right"))
    return Step(int(place[best]), min(1.0, float(windows.union[at - 1])))


def steps(values: Sequence[float], level: float) -> list[Step]:
    """All places at which a series moved, in order: the most striking first, then those on its two sides."""
    found = strongest(values)
    if found is None or found.p > level:
        return []
    before, behind = values[: found.place], values[found.place :]
    later = [Step(found.place + each.place, each.p) for each in steps(behind, level)]
    return [*steps(before, level), found, *later]


def cut(probabilities: Sequence[float], level: float) -> float:
    """The largest p that counts among those of many series (Benjamini and Hochberg, 1995); 0 where none does.

    Where no series moved, any is said to have with a probability of at most `level`; where some did, they help each
    other, and the expected share of wrong ones among those named is at most `level`.

    >>> cut([0.004, 0.9, 0.012, 0.5], 0.02), cut([0.02, 0.9], 0.02)
    (0.004, 0.0)
    """
    ordered = sorted(probabilities)
    return max((p for i, p in enumerate(ordered, 1) if p <= level * i / len(ordered)), default=0.0)


class _Windows(NamedTuple):
    start: "np.ndarray"  # of each window: its first value,
    place: "np.ndarray"  # the first of its second half,
    end: "np.ndarray"  # and the first that is no longer in it
    offset: "np.ndarray"  # of its two-sided probabilities, by the rank sum, in
    probabilities: "np.ndarray"
    striking: "np.ndarray"  # every probability that any window can have, in order,
    union: "np.ndarray"  # and the probability that any window has at most it, at most


@functools.lru_cache(maxsize=256)
def _windows(count: int) -> _Windows | None:
    import numpy as np

    spans = {
        (max(0, place - width), place, min(count, place + width))
        for place in range(LEAST, count - LEAST + 1)
        for width in WIDTHS
    }
    if not spans:
        return None
    spans = sorted(spans)
    probabilities, offsets, reached, added, at = [], [], [], [], 0
    for start, place, end in spans:
        both = _two_sided(place - start, end - place)
        possible = np.unique(both)
        probabilities.append(both)
        offsets.append(at)
        reached.append(possible)
        added.append(np.diff(possible, prepend=0.0))
        at += len(both)
    striking = np.concatenate(reached)
    order = striking.argsort(kind="stable")
    columns = np.array(spans).T
    return _Windows(
        *columns,
        np.array(offsets),
        np.concatenate(probabilities),
        striking[order],
        np.concatenate(added)[order].cumsum(),
    )


@functools.lru_cache(maxsize=4096)
def _two_sided(first: int, second: int) -> "np.ndarray":
    """For each number of pairs in which the value of the second window is above: twice the smaller tail, at most 1."""
    import numpy as np

    one = _pairs(first, second)
    low = one.cumsum()
    low = np.minimum(low, low[::-1])  # the distribution is symmetric
    return np.minimum(1.0, 2 * low)


@functools.lru_cache(maxsize=4096)
def _pairs(first: int, second: int) -> "np.ndarray":
    """The distribution of that number where all orders are as likely: the largest value is of either window."""
    import numpy as np

    if first == 0 or second == 0:
        return np.ones(1)
    found = np.zeros(first * second + 1)
    without_last = _pairs(first, second - 1)  # the largest is in the second window: above all of the first
    found[first : first + len(without_last)] += second / (first + second) * without_last
    without_first = _pairs(first - 1, second)
    found[: len(without_first)] += first / (first + second) * without_first
    return found
