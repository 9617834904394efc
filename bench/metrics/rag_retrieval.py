"""Quality of a question's context and of the ranking it comes from ([E], tables 8, 9, 28, 29).

None of these depends on the model that answers. The texts are compared by [E]'s tokens (`rag.overlap`); a mean is
over the questions.
"""

from collections.abc import Callable
from functools import partial
from math import fsum
from statistics import pstdev

from bench.measure.rag import overlap, ranking
from bench.measure.rag.records import KS, SUFFICIENT, Context, ContextReading, RankingReading
from bench.metrics.registry import metric


@metric("rag.context_sufficiency", unit="share", better="higher", kind="deterministic", of="rag_context")
def context_sufficiency(reading: ContextReading) -> float:
    """Share of questions whose context holds the answer, or 80 % of its tokens ([E], tables 8 and 9).

    The published code of [E] counts the share of tokens below 80 % too; its text, and this, do not.
    """
    return reading.mean(lambda c: overlap.sufficient(c.answer, c.text, SUFFICIENT))


@metric("rag.context_precision", unit="share", better="higher", kind="deterministic", of="rag_context")
def context_precision(reading: ContextReading) -> float:
    """[E]'s: share of the question's tokens that are in the context; precision proper is `context_precision_judged`."""
    return reading.mean(lambda c: overlap.share(overlap.tokens(c.question), overlap.tokens(c.text)))


@metric("rag.context_coverage", unit="share", better="higher", kind="deterministic", of="rag_context")
def context_coverage(reading: ContextReading) -> float:
    """Share of the answer's tokens that are in the context ([E], table 8)."""
    return reading.mean(lambda c: overlap.share(overlap.tokens(c.answer), overlap.tokens(c.text)))


@metric("rag.context_coverage_normalised", unit="share", better="higher", kind="deterministic", of="rag_context")
def context_coverage_normalised(reading: ContextReading) -> float:
    """`context_coverage` over SQuAD's tokens: without the punctuation that hides the last word of every sentence."""
    return reading.mean(lambda c: overlap.squad_share(c.answer, c.text))


@metric("rag.retrieval_consistency", unit="score", better="neither", kind="deterministic", of="rag_context")
def retrieval_consistency(reading: ContextReading) -> float:
    """Standard deviation over the questions of the mean score of their chunks, as the code of [E] takes it."""
    return pstdev(map(_score, reading.contexts))


@metric("rag.retrieval_score", unit="score", better="neither", kind="deterministic", of="rag_context")
def retrieval_score(reading: ContextReading) -> float:
    """Mean over the questions of the mean score of their chunks ([E], table 28); the scale is the retriever's."""
    return reading.mean(_score)


@metric("rag.chunks_retrieved", unit="chunks", better="neither", kind="deterministic", of="rag_context")
def chunks_retrieved(reading: ContextReading) -> float:
    """Chunks in a context: top_k, or fewer where others do not reach the threshold ([E], table 28)."""
    return reading.mean(lambda c: len(c.chunks))


@metric("rag.context_length", unit="words", better="neither", kind="deterministic", of="rag_context")
def context_length(reading: ContextReading) -> float:
    """Words of a context ([E], table 28)."""
    return reading.mean(lambda c: len(overlap.tokens(c.text)))


def _score(context: Context) -> float:
    return fsum(context.scores) / len(context.scores) if context.scores else 0.0


@metric("rag.context_precision_judged", unit="share", better="higher", kind="deterministic", of="rag_judged_context")
def context_precision_judged(reading: ContextReading) -> float:
    """Share of the retrieved chunks that come from a relevant document; 0 for an empty context."""
    return reading.mean(lambda c: sum(c.relevant or ()) / len(c.chunks) if c.chunks else 0.0)


def _ranked(name: str, title: str, of: Callable[..., float]) -> None:
    """Declare the mean of a measure of one ranking."""

    def mean(reading: RankingReading) -> float:
        return reading.mean(of)

    mean.__doc__ = title
    metric(f"rag.{name}", unit="share", better="higher", kind="deterministic", of="rag_ranking")(mean)


for _k in KS:
    _ranked(f"precision_at_{_k}", f"Share of the first {_k} that is relevant.", partial(ranking.precision_at, _k))
    _ranked(f"recall_at_{_k}", f"Share of what is relevant in the first {_k}.", partial(ranking.recall_at, _k))
    _ranked(f"f1_at_{_k}", f"Harmonic mean of precision and recall at {_k}.", partial(ranking.f1_at, _k))
_ranked("mrr", "Mean of 1 / place of the first relevant one.", ranking.reciprocal_rank)
_ranked("map", "Mean average precision, over at most 1,000 places.", ranking.average_precision)
_ranked("ndcg_at_10", "Discounted gain of the first 10 / that of the best ranking.", partial(ranking.ndcg_at, 10))
