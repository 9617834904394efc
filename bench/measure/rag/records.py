"""Records of RAG: answers, contexts, rankings and times, as the metrics read them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from statistics import median, pstdev
from typing import TYPE_CHECKING

from bench.errors import NotAvailable
from bench.measure.decoding import thinking_in
from bench.measure.rag import overlap
from bench.results.items import Items, hashes_of

if TYPE_CHECKING:
    from bench.measure.rag.prompts import Said


@dataclass(frozen=True, kw_only=True)
class Replies:
    """The answers to one question.

    Attributes:
        prompt: with the context, as the model read it.
        truths: what is right; the first is the reference.
        context: the text that was retrieved.
        rag: answers with the context, one for each seed.
        bare: answers without, one for each seed; empty where none were asked for.
    """

    id: str
    question: str
    prompt: str
    truths: tuple[str, ...]
    context: str
    rag: "tuple[Said, ...]"
    bare: "tuple[Said, ...]" = ()


@dataclass(frozen=True)
class AnswersReading:
    """The answers to all questions under one way of decoding."""

    replies: tuple[Replies, ...]

    def each(self, of: Callable[[str, Replies], float], *, bare: bool = False) -> tuple[float, ...]:
        """A measure of each question: the mean over its answers."""
        return tuple(
            fsum(of(said.text, one) for said in (one.bare if bare else one.rag)) / len(one.bare if bare else one.rag)
            for one in self.replies
        )

    def mean(self, of: Callable[[str, Replies], float], *, bare: bool = False) -> float:
        return fsum(self.each(of, bare=bare)) / len(self.replies)

    def spread(self, of: Callable[[str, Replies], float]) -> float:
        """Standard deviation over the seeds of the mean over the questions."""
        seeds = range(len(self.replies[0].rag))
        return pstdev(fsum(of(one.rag[n].text, one) for one in self.replies) / len(self.replies) for n in seeds)

    @property
    def remark(self) -> str | None:
        """What a reader of the scores must know, or None."""
        return thinking_in(said for one in self.replies for said in (*one.rag, *one.bare)).remark

    @cached_property
    def items(self) -> Mapping[str, Items]:
        """By metric, for paired comparisons: the value of each question, told by its prompt and its answers."""
        hashes = hashes_of([one.prompt, one.truths] for one in self.replies)
        once = "binary" if len(self.replies[0].rag) == 1 else "real"
        kinds = {"rag.f1": (token_f1, "real"), "rag.squad_f1": (squad_f1_of, "real"),
                 "rag.exact_match": (token_exact, once),
                 "rag.squad_exact_match": (squad_exact_of, once), "rag.contains": (contains_truth, once)}  # fmt: skip
        return {name: Items(hashes, self.each(of), kind) for name, (of, kind) in kinds.items()}


def token_f1(answer: str, one: Replies) -> float:
    return overlap.f1(overlap.tokens(answer), overlap.tokens(one.truths[0]))


def token_exact(answer: str, one: Replies) -> float:
    return float(overlap.exact(answer, one.truths[0]))


def squad_f1_of(answer: str, one: Replies) -> float:
    return overlap.squad_f1(answer, one.truths)


def squad_exact_of(answer: str, one: Replies) -> float:
    return float(overlap.squad_exact(answer, one.truths))


def contains_truth(answer: str, one: Replies) -> float:
    return float(overlap.contains(answer, one.truths))


@dataclass(frozen=True)
class SimilarityReading:
    """BERTScore F1 of each answer with its reference."""

    values: tuple[float, ...]


SUFFICIENT = 0.8  # share of the answer's tokens that a context must hold ([E], table 9)
KS = (1, 3, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What one question was given.

    Attributes:
        answer: the reference.
        chunks: texts, best first.
        scores: of the chunks, as the retriever gives them.
        relevant: whether each chunk is from a relevant document; None where nobody has judged.
    """

    question: str
    answer: str
    chunks: tuple[str, ...]
    scores: tuple[float, ...]
    relevant: tuple[bool, ...] | None = None

    @property
    def text(self) -> str:
        return "\n\n".join(self.chunks)


@dataclass(frozen=True, kw_only=True)
class ContextReading:
    """The contexts of all questions."""

    contexts: tuple[Context, ...]

    def mean(self, of: Callable[[Context], float]) -> float:
        return fsum(map(of, self.contexts)) / len(self.contexts)


@dataclass(frozen=True, kw_only=True)
class RankingReading:
    """Rankings of different ids, best first, and the gain of each relevant id.

    Ids are those of judged documents, or, for [E]'s relevance by tokens, of chunks with 30 % of the answer's tokens.
    """

    rankings: tuple[Sequence[str], ...]
    gains: tuple[Mapping[str, float], ...]

    def mean(self, of: Callable[[Sequence[str], Mapping[str, float]], float]) -> float:
        return fsum(map(of, self.rankings, self.gains)) / len(self.rankings)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One question: seconds of its search; seconds and generated tokens of the answers with and without a context."""

    retrieval_s: float
    rag_s: float
    rag_tokens: int
    bare_s: float = 0.0
    bare_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class SpeedReading:
    """All timed questions."""

    questions: tuple[Timed, ...]

    def each(self) -> "list[SpeedReading]":
        """One reading per question."""
        return [SpeedReading(questions=(one,)) for one in self.questions]

    def median(self, of: Callable[[Timed], float]) -> float:
        return median(map(of, self.questions))


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
            raise NotAvailable(f"abstentions are recognised by English phrases, and {self.foreign} is not in English")
        return sum(map(overlap.abstains, answers)) / len(answers)
