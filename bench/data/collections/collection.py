"""A collection for RAG: documents, questions and judgements of relevance."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Self

from bench.data.collections.chunking import Chunking
from bench.data.scripts import is_english
from bench.errors import DataError, OptionError
from bench.results.row import Input


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text with an id of its own. An empty text stays in the collection, but nothing of it can be found."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        answers: what is right, in alternative words; the first is the reference where a metric takes only one.
        gains: gain of each relevant document by its id, above 0; empty where nobody has judged.
        answerable: False for a question that the documents do not answer, as SQuAD 2.0 has them.
        part: of the set that it is from, from the whole to the smallest: article, paragraph; empty for a list.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    gains: Mapping[str, int] = field(default_factory=dict, hash=False)
    answerable: bool = True
    part: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Documents and questions that fit each other.

    Attributes:
        name: what it is, for people.
        digest: SHA-256 (hex) of the bytes read.
        named: whether the suite calls it so; else it is the name of a file.
        answered: whether its questions have answers; sets for information retrieval have judgements alone.
        form: the form of its prompts, one of `answers.FORMS`.
        chunking: how its documents are cut unless something else is asked for.
        drawn: its questions stand in an order that was drawn when it was made; the first are a sample of it.

    Raises:
        DataError: no documents or no questions, an id that is there twice, a question without an answer, or a judgement
            about a document that is not there.
    """

    name: str
    digest: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]
    answered: bool = True
    form: str = "plain"
    chunking: Chunking = field(default_factory=Chunking)
    drawn: bool = False
    named: bool = False

    @property
    def read(self) -> Input:
        """What it is in the key and among the inputs of a row."""
        return Input(self.name, self.digest, self.named)

    def __post_init__(self) -> None:
        if not any(document.text.strip() for document in self.documents):
            raise DataError(
                f"{self.name}: its {len(self.documents)} documents contain no text; give documents with text"
            )
        if not self.questions:
            raise DataError(f"{self.name} has no questions; give at least one")
        for what, things in (("documents", self.documents), ("questions", self.questions)):
            if twice := _twice(thing.id for thing in things):
                raise DataError(f"{self.name}: {what} share an id: {_few(twice)}; every id must be unique")
        if empty := [question.id for question in self.questions if not question.text.strip()]:
            raise DataError(f"{self.name}: the text of the questions {_few(empty)} is empty")
        if self.answered and (
            bare := [q.id for q in self.questions if q.answerable and not any(map(_said, q.answers))]
        ):
            raise DataError(
                f"{self.name}: the questions {_few(bare)} have no answer; add one, or mark them as is_impossible"
            )
        known = {document.id for document in self.documents}
        for question in self.questions:
            if unknown := sorted(question.gains.keys() - known):
                raise DataError(
                    f"{self.name}: question {question.id!r} is judged on the documents {_few(unknown)}, which are not "
                    f"among the {len(known)} there are"
                )
            if wrong := {document: gain for document, gain in question.gains.items() if gain <= 0}:
                raise DataError(f"{self.name}: question {question.id!r}: gains must be above 0, not {wrong}")

    @cached_property
    def english(self) -> bool:
        """Whether its documents and questions are English, for measures that know no other language."""
        return is_english([each.text for each in (*self.documents[:500], *self.questions[:500])])

    @property
    def judged(self) -> bool:
        """Whether every answerable question has relevant documents."""
        return all(question.gains for question in self.questions if question.answerable)

    def take(self, count: int | None, seed: int = 0) -> Self:
        """The collection with `count` of its questions, spread over its parts (see `spread`); None takes all.

        Fewer questions under the same seed are the first of more.

        Raises:
            OptionError: fewer than one, or more than there are.
        """
        if count is not None and not 1 <= count <= len(self.questions):
            raise OptionError(
                f"--num-questions must be from 1 to {len(self.questions)}, the questions of {self.name}, not {count}"
            )
        questions = self.questions if self.drawn else spread(self.questions, seed)
        return replace(self, questions=tuple(questions[:count]))


def spread(questions: Sequence[Question], seed: int, depth: int = 0) -> list[Question]:
    """All questions in a drawn order of which every beginning is spread over the parts of the set.

    One of each article in turn, and within an article one of each paragraph. The order is that of hashes of the seed
    and the names: the same on every machine, wherever a question stands in the file.
    """

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{depth}/{name}".encode()).digest()

    parts: dict[str, list[Question]] = {}
    for question in questions:
        parts.setdefault(question.part[depth] if depth < len(question.part) else "", []).append(question)
    if parts.keys() <= {""}:
        return sorted(questions, key=lambda question: drawn(question.id))
    orders = [spread(parts[name], seed, depth + 1) for name in sorted(parts, key=drawn)]
    return [each for turn in zip_longest(*orders) for each in turn if each is not None]


def _said(answer: str) -> bool:
    return bool(answer.strip())


def _twice(ids: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(ids).items() if count > 1]


def _few(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
