"""Results per item of two runs, or of a model and its base, compared item by item (`statistics.paired`)."""

import math

from bench.errors import MetricError
from bench.results.items import Items
from bench.statistics.paired import RESAMPLES, Difference, bootstrap, mcnemar, permutation, share_interval


def mismatch(now: Items, then: Items) -> str | None:
    """Why two sets of results cannot be paired, in words; None where they can."""
    if now.kind != then.kind:
        return f"the items were {then.kind}, and are {now.kind} now"
    if now.asked != then.asked:
        common = len(set(now.hashes) & set(then.hashes))
        return (
            f"the items differ: {common} of {len(now)} now and {len(then)} then are the same; the data, the prompts or "
            "the limit changed"
        )
    return None


def compare(now: Items, then: Items, *, seed: int = 0, level: float = 1 / RESAMPLES) -> Difference:
    """Results against earlier ones, or of a compressed model against its base. Raises MetricError for other items.

    Where no drawn signs reach the observed difference, so many are drawn that p can be below `level`. Swapping the two
    turns the signs of difference and interval, and leaves p.
    """
    import numpy as np

    if why := mismatch(now, then):
        raise MetricError(f"results cannot be paired: {why}")
    differences = np.array(now.values) - np.array(then.values)
    if now.kind == "binary":
        lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
        low, high = share_interval(lost, gained, len(now))
        p, flipped = mcnemar(lost, gained), (lost + gained) / len(now)
    else:
        low, high = bootstrap(differences, seed=seed)
        p, flipped = permutation(differences, seed=seed), None
        if level < p <= 1 / RESAMPLES:
            p = permutation(differences, seed=seed, resamples=math.ceil(2 / level))
    mean = math.fsum(differences) / len(now)
    return Difference(items=len(now), difference=mean, low=low, high=high, p=p, flipped=flipped)
