"""How far a quotient of medians is known: an interval from the samples of both sides, without resampling them whole."""

import functools
import math
import random
from statistics import median

SAMPLES = 5  # of each side, at least, for an interval
RESAMPLES = 1000
TAIL = 25  # resamples left out at each end: 95 % of 1000 remain


def spread(*quotients: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[float, float] | None:
    """Where the product of quotients of medians lies with 95 % confidence, as factors of the observed product.

    The percentile bootstrap of `RESAMPLES` seeded resamples of each side; None where a side has too few samples, or
    some that are not positive, next to its largest.
    """
    sides = [side for quotient in quotients for side in quotient]
    if any(len(side) < SAMPLES or min(side) <= 1e-9 * max(side) for side in sides):
        return None
    products = [1.0] * RESAMPLES
    for number, side in enumerate(sides):
        ordered, middle = sorted(side), median(side)
        factors = [(ordered[i] + ordered[j]) / 2 / middle for i, j in _median_places(len(side), number)]
        combine = float.__truediv__ if number % 2 else float.__mul__
        products = list(map(combine, products, factors))
    products.sort()
    return products[TAIL], products[-1 - TAIL]


@functools.lru_cache(maxsize=64)
def _median_places(count: int, seed: int) -> list[tuple[int, int]]:
    """For each resample of `count` sorted values with replacement: the two places between which its median lies.

    A resample picks the values at `floor(count * u)` for uniform u, so its median is picked by the middle order
    statistics of `count` uniform numbers. These are drawn directly, at most two numbers instead of `count`: the lower
    from Beta(k, count + 1 - k), the upper as the least of the count - k that lie above it.
    """
    numbers = random.Random(seed)
    lower = (count + 1) // 2
    places = []
    for _ in range(RESAMPLES):
        u = v = numbers.betavariate(lower, count + 1 - lower)
        if count % 2 == 0:
            v = u + (1 - u) * (1 - (1 - numbers.random()) ** (1 / (count - lower)))
        places.append((min(math.floor(count * u), count - 1), min(math.floor(count * v), count - 1)))
    return places
