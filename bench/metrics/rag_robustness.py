"""What else a context can be: with more chunks beside the right one, the right one elsewhere, or not there at all.

Beyond [E]. Answers are greedy, and of at most 16 tokens.
"""

from dataclasses import dataclass
from math import fsum

from bench.errors import NotAvailable
from bench.measure.rag import overlap
from bench.metrics.registry import metric


@dataclass(frozen=True, kw_only=True)
class DistractedReading:
    """Answers from the chunk with the answer among so many others, with that chunk at the start, middle or end.

    `remark` is what a reader of the score must know, or None.
    """

    f1: tuple[float, ...]  # SQuAD's, of each question
    context_tokens: tuple[int, ...]
    distractors: int
    gold: str
    remark: str | None = None

    @property
    def params(self) -> dict[str, int | str]:
        return {"distractors": self.distractors, "gold": self.gold, "asked": len(self.f1)}


@metric("rag.distracted_f1", unit="share", better="higher", kind="sampled", of="rag_distracted", rel=0.1, floor=0.05)
def distracted_f1(reading: DistractedReading) -> float:
    """SQuAD's token F1 where the chunk with the answer stands among the best-ranked chunks of other documents."""
    return fsum(reading.f1) / len(reading.f1)


@metric("rag.distracted_tokens", unit="tokens", better="neither", kind="deterministic", of="rag_distracted")
def distracted_tokens(reading: DistractedReading) -> float:
    """Mean length of the prompt."""
    return fsum(reading.context_tokens) / len(reading.context_tokens)


@dataclass(frozen=True, kw_only=True)
class UnanswerableReading:
    """Answers to questions from contexts without the answer, and to the same number from contexts with it.

    `truths` are the right answers that the former do not hold; empty for questions that have none anywhere. `foreign`
    is the name of a set that is not English, whose abstentions cannot be told.
    """

    without: tuple[str, ...]
    truths: tuple[tuple[str, ...], ...]
    having: tuple[str, ...]
    remark: str | None = None
    foreign: str | None = None

    def abstentions(self, answers: tuple[str, ...]) -> float:
        """The share of abstentions. Raises NotAvailable for a set that is not English."""
        if self.foreign is not None:
            raise NotAvailable(f"abstentions are told by English phrases, and {self.foreign} is not in English")
        return sum(map(overlap.abstains, answers)) / len(answers)


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
