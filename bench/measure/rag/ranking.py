"""Ranking metrics from the gains of relevant documents, as defined by trec_eval.

A ranking is a sequence of different ids, best first; `gains` maps each relevant id to its gain, above 0. With nothing
relevant every measure is 0. Sources: Manning, Raghavan, Schütze, Introduction to Information Retrieval (2008), chapter
8; nDCG with linear gains is Järvelin and Kekäläinen (2002) as trec_eval computes it. [E] names P@k, R@k, F1@k, MRR and
MAP (table 8).
"""

from collections.abc import Mapping, Sequence
from math import log2

Gains = Mapping[str, float]


def precision_at(k: int, ranking: Sequence[str], gains: Gains) -> float:
    """Share of the first k that is relevant; places that a shorter ranking leaves empty count as not relevant.

    >>> precision_at(4, ["a", "b", "c"], {"a": 1, "c": 1})
    0.5
    """
    return sum(name in gains for name in ranking[:k]) / k


def recall_at(k: int, ranking: Sequence[str], gains: Gains) -> float:
    """Share of what is relevant that is among the first k.

    >>> recall_at(2, ["a", "b", "c"], {"a": 1, "c": 1})
    0.5
    """
    return sum(name in gains for name in ranking[:k]) / len(gains) if gains else 0.0


def f1_at(k: int, ranking: Sequence[str], gains: Gains) -> float:
    """Harmonic mean of precision and recall at k.

    >>> f1_at(1, ["a", "b"], {"a": 1, "c": 1, "d": 1})
    0.5
    """
    hits = sum(name in gains for name in ranking[:k])
    return 2 * hits / (k + len(gains)) if gains else 0.0


def reciprocal_rank(ranking: Sequence[str], gains: Gains) -> float:
    """1 / place of the first relevant one; 0 without one. Its mean over questions is MRR.

    >>> reciprocal_rank(["b", "a"], {"a": 1})
    0.5
    """
    return next((1 / place for place, name in enumerate(ranking, 1) if name in gains), 0.0)


def average_precision(ranking: Sequence[str], gains: Gains) -> float:
    """Mean over all that is relevant of the precision at its place, 0 for what was not found. Its mean is MAP.

    >>> average_precision(["a", "b", "c"], {"a": 1, "c": 1})
    0.8333333333333333
    """
    hits, total = 0, 0.0
    for place, name in enumerate(ranking, 1):
        if name in gains:
            hits += 1
            total += hits / place
    return total / len(gains) if gains else 0.0


def ndcg_at(k: int, ranking: Sequence[str], gains: Gains) -> float:
    """Sum of gain / log2(place + 1) over the first k, divided by that of the best ranking there could be.

    >>> round(ndcg_at(2, ["b", "a"], {"a": 3, "b": 1}), 4)
    0.7967
    """
    best = _discounted(sorted(gains.values(), reverse=True)[:k])
    return _discounted([gains.get(name, 0) for name in ranking[:k]]) / best if best else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / log2(place + 1) for place, gain in enumerate(gains, 1))
