"""The change of a time ratio between two runs: estimate, standard error, confidence level.

What disturbs a round (another process, a stalled processor, a slow clock) makes it slower and never faster, so the
undisturbed rounds are the fastest. A side is summed up by the mean logarithm of the fastest `share` of its rounds. On
recorded noise, where a stall of 50 ms hits four rounds of ten, that scatters a fifth as far as the quotient of medians
(`benchmarks/gate_power.py`). Rounds of both models alternate, so that drift and clocks fall on both and cancel in the
ratio.

The variance is that of the bootstrap over rounds, without drawing any: the mean of the lowest k of a resample is a sum
of the sorted values with random weights, whose covariances depend on the numbers of rounds alone (the idea of Hutson
and Ernst, JRSS B 62 (2000), 89, for any L-estimator; here the covariances are drawn once instead of integrated). The
interval is Student's. Departures: sides are taken to be independent, though neighbours share their disturbances, which
makes the interval wider; rounds are taken to be drawn independently, though bursts are not: the simulation tells what
that costs.

Where a run has two sides, its quotient is also taken from each pair of neighbouring rounds, where what disturbs both
alike cancels before anything is summed up. Of both estimates the surer holds; since there are two to choose from, each
is believed at half the level (ESTIMATES).
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SAMPLES = 5  # of each side, at least
DOUBT = 3  # errors of the change of all rounds
DRAWS = 5_000  # of the weights
PAIRED = 20  # rounds of each of two runs, below which the mean of their pairs is a matter of luck
TRIMMED = 0.2  # of the differences of pairs, at either end
ESTIMATES = 2  # of which the surer holds
SURE = 1e-5  # level at which two estimates are compared for how sure they are


class Shift(NamedTuple):
    """A change as a difference of logarithms, its standard error, and the degrees of freedom of that error."""

    log: float
    error: float
    freedom: int

    def interval(self, level: float) -> tuple[float, float]:
        """Relative changes between which the true one lies, but for `level` on either side."""
        reach = quantile(level, self.freedom) * self.error
        return math.expm1(self.log - reach), math.expm1(self.log + reach)


def shift(
    now: Sequence[Sequence[float]], then: Sequence[Sequence[float]], share: float, *, highest: bool = False
) -> Shift | None:
    """How far the first of `now` has moved from the first of `then`, each over the second where there is one.

    Without `then` how far the first of `now` is from the second. Both sides of one run were taken in turn.

    `share` of the rounds, the lowest or the highest, are looked at. None where a side has fewer than SAMPLES, or some
    that are not positive, next to its largest.
    """
    import numpy as np

    if any(len(side) < SAMPLES or min(side) <= 1e-9 * max(side) for side in (*now, *then)):
        return None
    sign = -1 if highest else 1
    logs = [[sign * np.log(side) for side in run] for run in (now, then)]
    log, error, degrees = moved(*logs, share)
    return Shift(sign * float(log), float(error), int(degrees))


def moved(now: "Sequence[np.ndarray]", then: "Sequence[np.ndarray]", share: float) -> "tuple[Any, Any, Any]":
    """As `shift`, of logarithms (..., n) and the lowest `share`: change, error and degrees of freedom, (...) each.

    Below 1, runs of two sides are also compared pair by pair, and the surer of both estimates holds: that of the
    fastest rounds where disturbances come and go, that of the pairs where they fall on both sides alike (drift, another
    clock), or on every round. Either change is kept within DOUBT errors of that of all rounds: where a process gets
    little of a processor, the fastest of its rounds are a matter of luck that their own scatter does not show.
    """
    import numpy as np

    found = _difference(now, then, share)
    if share == 1:
        return found
    if pairs := _by_pairs(now, then):
        surer = reach(pairs) < reach(found)
        found = tuple(np.where(surer, *each) for each in zip(pairs, found, strict=True))
    change, error, degrees = found
    whole, doubt, _ = _difference(now, then, 1.0)
    return np.clip(change, whole - DOUBT * doubt, whole + DOUBT * doubt), error, degrees


def _difference(now: "Sequence[np.ndarray]", then: "Sequence[np.ndarray]", share: float) -> "tuple[Any, Any, Any]":
    import numpy as np

    (*means,), (*variances,) = zip(*(best(side, share) for side in (*now, *then)), strict=True)
    ratios = [run[0] - sum(run[1:]) if run else 0 for run in (means[: len(now)], means[len(now) :])]
    degrees = freedom(variances, [side.shape[-1] for side in (*now, *then)], share)
    return ratios[0] - ratios[1], np.sqrt(sum(variances)), degrees


def _by_pairs(now: "Sequence[np.ndarray]", then: "Sequence[np.ndarray]") -> "tuple[Any, Any, Any] | None":
    """As `_difference`, by `trimmed`; None where a run has one side or unequal ones, or one of two has few rounds."""
    import numpy as np

    runs = [run for run in (now, then) if run]
    if any(len(run) != 2 or run[0].shape != run[1].shape for run in runs):
        return None
    if then and min(run[0].shape[-1] for run in runs) < PAIRED:
        return None
    (*changes,), (*errors,), (*degrees,) = zip(*(trimmed(*run) for run in runs), strict=True)
    variances = [error**2 for error in errors]
    return changes[0] - sum(changes[1:]), np.sqrt(sum(variances)), welch(variances, degrees)


def trimmed(own: "np.ndarray", other: "np.ndarray") -> "tuple[Any, Any, int]":
    """How far two sides (..., n) that were taken in turn differ: change, error, (...) each, and degrees of freedom.

    The mean of the differences but for the TRIMMED lowest and highest, with the error of the winsorised ones (Tukey and
    McLaughlin, Sankhya A 25 (1963), 331).
    """
    import numpy as np

    differences = np.sort(own - other, -1)
    count = differences.shape[-1]
    cut = int(TRIMMED * count)
    kept = count - 2 * cut
    winsorised = np.clip(differences, differences[..., cut, None], differences[..., -1 - cut, None])
    error = winsorised.std(-1, ddof=1) * math.sqrt(count) / kept
    return differences[..., cut : count - cut].mean(-1), error, kept - 1


def reach(found: "tuple[Any, Any, Any]") -> Any:
    """How far an interval reaches on either side, at the level of a row of a run of a hundred: the less, the surer."""
    import numpy as np

    _, error, degrees = found
    known, places = np.unique(np.asarray(degrees, int), return_inverse=True)
    return np.array([quantile(SURE, int(each)) for each in known])[places].reshape(np.shape(degrees)) * error


def freedom(variances: "Sequence[Any]", counts: Sequence[int], share: float) -> Any:
    """Degrees of freedom (Welch and Satterthwaite) of a sum of variances of sides with so many rounds; at least 1.

    The error of the fastest k rounds rests on about twice as many of them, and on no more than all.
    """
    return welch(variances, [max(1, min(2 * max(1, round(share * count)), count - 1)) for count in counts])


def welch(variances: "Sequence[Any]", degrees: "Sequence[int]") -> Any:
    """Degrees of freedom of a sum of variances that have so many each; at least the fewest."""
    total, squares = sum(variances), sum(v * v / each for v, each in zip(variances, degrees, strict=True))
    return (total * total + 1e-300) / (squares + 1e-300 / min(degrees)) + 1e-9  # whole ones stay so when truncated


def best(logs: "np.ndarray", share: float) -> "tuple[np.ndarray, np.ndarray]":
    """Mean of the lowest `share` (at least one) of each row (..., n), and its variance over resamples; both (...)."""
    import numpy as np

    k, covariance = _weights(logs.shape[-1], share)
    places = len(covariance)
    ordered = np.sort(logs, -1)[..., :places]
    above = ordered - ordered[..., :1]
    return ordered[..., :k].mean(-1), np.maximum(((above @ covariance) * above).sum(-1), 0)


@functools.lru_cache(maxsize=64)
def _weights(count: int, share: float) -> "tuple[int, np.ndarray]":
    """How many values are meant, and the covariances of the weights that a resample gives to the sorted values.

    A resample holds the sorted values multinomially often; the lowest k of it are what fills up first.
    """
    import numpy as np

    k = max(1, round(share * count))
    drawn = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), DRAWS)
    weights = np.diff(np.minimum(drawn.cumsum(1), k), axis=1, prepend=0) / k
    places = int(weights.any(0).nonzero()[0][-1]) + 1
    return k, np.cov(weights[:, :places].T).reshape(places, places)


@functools.lru_cache(maxsize=256)
def quantile(level: float, freedom: int) -> float:
    """The value that Student's t exceeds with probability `level`, below a half.

    >>> round(quantile(0.025, 8), 3), round(quantile(1e-5, 18), 3)
    (2.306, 5.722)
    """
    low, high = 0.0, 1.0
    while _beyond(high, freedom) > level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, freedom) > level else (low, middle)
    return high


def _beyond(t: float, freedom: int) -> float:
    """Probability that Student's t exceeds `t`: finite series for whole degrees of freedom (A&S 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cos if odd else 1.0), 0.0
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos * cos * (i - 1) / i
    inside = 2 / math.pi * (angle + sin * total) if odd else sin * total
    return (1 - inside) / 2
