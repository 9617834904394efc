"""Robustness of answers: more chunks beside the right one, the right one elsewhere, or missing.

Beyond [E]. Answers are greedy, and of at most 16 tokens.
"""

from math import fsum

from bench.measure.rag import overlap
from bench.measure.rag.records import DistractedReading, UnanswerableReading
from bench.metrics.registry import metric


@metric("rag.distracted_f1", unit="share", better="higher", kind="sampled", of="rag_distracted", rel=0.1, floor=0.05)
def distracted_f1(reading: DistractedReading) -> float:
    """SQuAD's token F1 where the chunk with the answer stands among the best-ranked chunks of other documents."""
    return fsum(reading.f1) / len(reading.f1)


@metric("rag.distracted_tokens", unit="tokens", better="neither", kind="deterministic", of="rag_distracted")
def distracted_tokens(reading: DistractedReading) -> float:
    """Mean length of the prompt."""
    return fsum(reading.context_tokens) / len(reading.context_tokens)


@metric("rag.abstained", unit="share", better="higher", kind="sampled", of="rag_unanswerable", rel=0.1, floor=0.05)
def abstained(reading: UnanswerableReading) -> float:
    """Share of the answers from a context without the answer that say so, by the phrases of `overlap.ABSTAINS`."""
    return reading.abstentions(reading.without)


@metric("rag.abstained_wrongly", unit="share", better="lower", kind="sampled", of="rag_unanswerable",
        rel=0.1, floor=0.05)  # fmt: skip
def abstained_wrongly(reading: UnanswerableReading) -> float:
    """Share of the answers from a context with the answer that say that there is none."""
    return reading.abstentions(reading.having)


@metric("rag.unanswerable_f1", unit="share", better="neither", kind="sampled", of="rag_unanswerable")
def unanswerable_f1(reading: UnanswerableReading) -> float:
    """SQuAD's token F1 of answers from a context without the answer: right by guessing or from memory."""
    found = zip(reading.without, reading.truths, strict=True)
    return fsum(overlap.squad_f1(said, truths or ("",)) for said, truths in found) / len(reading.without)
