"""Time per question: retrieval, and answers with and without a context ([E], tables 12, 30).

One question at a time, base and compressed model in turn, from the prompt as a text to the answer as a text, the device
synchronised before and after. A figure is the median over the questions, where [E] takes the mean. Answers end where
the model ends them, so that a model which does not stop takes longer; throughput is per token.
"""

from bench.measure.rag.records import SpeedReading
from bench.metrics.registry import metric


@metric("rag.retrieval_ms", unit="ms", better="lower", kind="timing", of="rag_speed",
        rel=0.5, rel_absolute=1.0, floor=0.5)  # fmt: skip
def retrieval_ms(reading: SpeedReading) -> float:
    """Search for the context of one question, encoding it included; the same for every recipe of a run."""
    return reading.median(lambda q: 1e3 * q.retrieval_s)


@metric("rag.generation_ms", unit="ms", better="lower", kind="timing", of="rag_speed",
        rel=0.25, rel_absolute=0.5, floor=2.0)  # fmt: skip
def generation_ms(reading: SpeedReading) -> float:
    """An answer with the retrieved context, the context's processing included."""
    return reading.median(lambda q: 1e3 * q.rag_s)


@metric("rag.throughput", unit="tokens/s", better="higher", kind="timing", of="rag_speed",
        rel=0.2, rel_absolute=0.35, floor=0.5)  # fmt: skip
def throughput(reading: SpeedReading) -> float:
    """Tokens of an answer with context / its time."""
    return reading.median(lambda q: q.rag_tokens / q.rag_s)


@metric("rag.retrieval_share", unit="%", better="neither", kind="timing", of="rag_speed")
def retrieval_share(reading: SpeedReading) -> float:
    """Retrieval / (retrieval + generation with context)."""
    return 100 * reading.median(lambda q: q.retrieval_s / (q.retrieval_s + q.rag_s))


@metric("rag.no_rag_generation_ms", unit="ms", better="lower", kind="timing", of="no_rag_speed",
        rel=0.25, rel_absolute=0.5, floor=2.0)  # fmt: skip
def no_rag_generation_ms(reading: SpeedReading) -> float:
    """An answer to the question alone."""
    return reading.median(lambda q: 1e3 * q.bare_s)


@metric("rag.no_rag_throughput", unit="tokens/s", better="higher", kind="timing", of="no_rag_speed",
        rel=0.2, rel_absolute=0.35, floor=0.5)  # fmt: skip
def no_rag_throughput(reading: SpeedReading) -> float:
    """Tokens of an answer without context / its time."""
    return reading.median(lambda q: q.bare_tokens / q.bare_s)


@metric("rag.generation_speedup", unit="x", better="neither", kind="timing", of="no_rag_speed")
def generation_speedup(reading: SpeedReading) -> float:
    """Time without context / time with it, of the same question ([E], table 12); below 1, as a context costs time."""
    return reading.median(lambda q: q.bare_s / q.rag_s)
