"""Paired statistics: two sets of results on the same items, compared item by item.

What two models have in common, easy and hard items, cancels in the differences; an unpaired test of two accuracies
keeps it as noise (`benchmarks/power.py` shows what that costs).

| kind   | test of "the two are exchangeable", two-sided     | 95 % interval of the difference of means               |
| ------ | ------------------------------------------------- | ------------------------------------------------------ |
| binary | exact McNemar: binomial test of those that flip   | Agresti and Min, Statistics in Medicine 24 (2005), 729 |
| real   | sign-flip permutation of the differences          | percentile bootstrap over items                        |

McNemar's test is taken exactly and not as mid-p: its level is then at most what it says, which a gate promises; mid-p
comes nearer to it on average, and beyond it at times. It is two-sided because the gate judges both directions by it: a
loss and a gain are each declared at half of the level. The permutation test is exact up to the number of draws, and
counts the observed signs among them, so no p-value is 0 (Phipson and Smyth 2010). Up to EXACT items all signs are gone
through. Agresti and Min's interval adds half an item to each of the four cells; unlike a bootstrap it does not shrink
to a point where nothing flipped.

Items are taken to be drawn independently: questions of one document, or windows of one text, are less than that.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 9_999  # of signs, so that the least p-value is 1e-4
BOOTSTRAPS = 4_000
EXACT = 13  # items of which all signs are gone through: 8,192
Z = 1.959964  # 97.5 % of the normal distribution
CHUNK = 2**22  # numbers of resamples that exist at once


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean over items now, less what it was then."""

    items: int
    difference: float  # in the unit of the items
    low: float  # of its 95 % interval
    high: float
    p: float  # two-sided
    flipped: float | None  # share of the items that went from right to wrong or back; None for reals

    def to_json(self) -> dict[str, float]:
        """The fields that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@functools.lru_cache(maxsize=4096)
def mcnemar(lost: int, gained: int, alternative: str = "two-sided") -> float:
    """Exact p-value that so many items are lost and gained where each is as likely (McNemar 1947).

    Two-sided, or that of at least so many lost: "worse". 9 lost and 1 gained, 11 of 1024 cases on either side:

    >>> round(mcnemar(9, 1), 6), round(11 * 2 / 1024, 6)
    (0.021484, 0.021484)
    """
    import numpy as np

    flipped = lost + gained
    fewest = {"two-sided": min(lost, gained), "worse": gained}[alternative]
    places = np.arange(fewest)
    logs = np.concatenate([[0.0], np.log((flipped - places) / (places + 1)).cumsum()])  # of the binomial coefficients
    tail = float(np.exp(logs - flipped * math.log(2)).sum())
    return min(1.0, tail * (2 if alternative == "two-sided" else 1))


def share_interval(lost: int, gained: int, items: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / items: Wald's with half an item more in each cell (Agresti and Min 2005).

    >>> low, high = share_interval(0, 0, 500)
    >>> round(low, 4), round(high, 4)
    (-0.0039, 0.0039)
    """
    lost_, gained_, items_ = lost + 0.5, gained + 0.5, items + 2
    centre = (gained_ - lost_) / items_
    half = Z * math.sqrt(lost_ + gained_ - (gained_ - lost_) ** 2 / items_) / items_
    return max(-1.0, centre - half), min(1.0, centre + half)


def permutation(differences: "Sequence[float] | np.ndarray", *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the mean of paired differences (n,), whose signs are equally likely if nothing changed."""
    import numpy as np

    d, _ = _canonical(differences)
    n = len(d)
    reached = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if n <= EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs(d.sum() - 2 * bits @ d) >= reached).mean())
    draw, hits, left = np.random.default_rng(seed), 0, resamples
    while left:
        rows = min(left, max(1, CHUNK // n))
        bits = np.unpackbits(draw.integers(0, 256, (rows, -(-n // 8)), dtype=np.uint8), axis=1, count=n)
        hits += int((np.abs(d.sum() - 2 * (bits @ d)) >= reached).sum())
        left -= rows
    return (1 + hits) / (1 + resamples)


def bootstrap(
    differences: "Sequence[float] | np.ndarray", *, seed: int = 0, resamples: int = BOOTSTRAPS
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences (n,), over items."""
    import numpy as np

    d, turned = _canonical(differences)
    n, draw, means = len(d), np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(1, CHUNK // n)):
        places = draw.integers(0, n, (min(step, resamples - start), n))
        means.append(d[places].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
    return (-high, -low) if turned else (low, high)


def _canonical(differences: "Sequence[float] | np.ndarray") -> "tuple[np.ndarray, bool]":
    """The differences in order, and whether with signs turned: neither order nor direction may change what is drawn."""
    import numpy as np

    d = np.sort(np.asarray(differences, dtype=float))
    turned = -d[::-1]
    first = (turned - d).nonzero()[0][:1]
    return (turned, True) if len(first) and turned[first[0]] > d[first[0]] else (d, False)


def words(difference: Difference | dict[str, Any], unit: str = "") -> str:
    """A difference, its interval and what else is known, in words.

    >>> words(Difference(items=500, difference=-0.01, low=-0.018, high=-0.002, p=0.0041, flipped=0.06))
    '-0.01, 95 % interval -0.018 to -0.002, 500 items, p 0.0041, 6 % flipped'
    """
    d = difference if isinstance(difference, Difference) else Difference(**{"flipped": None, **difference})
    said = (
        f"{d.difference:+.3g}{' ' * bool(unit)}{unit}, 95 % interval {d.low:+.3g} to {d.high:+.3g}, {d.items} items, "
    )
    return said + f"p {d.p:.2g}" + (f", {100 * d.flipped:.3g} % flipped" if d.flipped is not None else "")
