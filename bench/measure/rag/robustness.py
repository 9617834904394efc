"""Robustness to context: additional chunks, the right one in another place, or no right one.

The right chunk of a question is the best-ranked one that is from a relevant document and holds the answer; distractors
are the best-ranked chunks of other documents, in the order of the ranking.
"""

from collections.abc import Sequence
from dataclasses import replace

from bench.errors import NotAvailable
from bench.measure.decoding import thinking_in
from bench.measure.rag import overlap
from bench.measure.rag.pipeline import Asked, Retrieved
from bench.measure.rag.prompts import Said, ask, prompt, prompts
from bench.measure.rag.readings import Reader
from bench.measure.rag.records import DistractedReading, UnanswerableReading
from bench.measure.rag.retrieval import Hit
from compression.checkpoints.tokens import encode

QUESTIONS = 32  # at most: the grid has seven places
NEW_TOKENS = 16
GRID = [(0, "only"), (4, "start"), (4, "end"), *((count, "middle") for count in (2, 4, 8, 16))]


def right_chunk(found: Retrieved, asked: Asked) -> int | None:
    """The chunk with the answer, by its place among all; None where no ranked one has it."""
    for chunk in asked.ranking:
        one = found.chunks[chunk]
        if one.document in asked.question.gains and any(overlap.holds(one.text, a) for a in asked.question.answers):
            return chunk
    return None


def others(found: Retrieved, asked: Asked) -> list[int]:
    """Ranked chunks of documents that are not relevant, best first."""
    return [chunk for chunk in asked.ranking if found.chunks[chunk].document not in asked.question.gains]


def around(right: int, distractors: Sequence[int], gold: str) -> list[int]:
    """A context: the right chunk before, amid or behind the others.

    >>> around(0, [1, 2, 3, 4], "middle")
    [1, 2, 0, 3, 4]
    """
    at = {"only": 0, "start": 0, "middle": len(distractors) // 2, "end": len(distractors)}[gold]
    return [*distractors[:at], right, *distractors[at:]]


def distracted(found: Retrieved, reader: Reader, count: int, gold: str) -> DistractedReading:
    """Answers from contexts with `count` distractors and the right chunk at `gold`.

    Raises:
        NotAvailable: without judgements or answers, or where no question has so many distractors in its ranking.
        BenchError: no prompt can be answered, as where all are longer than the model's context.
    """
    able = _able(found)
    able = [(each, right) for each, right in able if len(others(found, each)) >= count][:QUESTIONS]
    if not able:
        raise NotAvailable(
            f"no question of {found.collection.name} has {count} chunks of other documents in its ranking"
        )
    form = found.collection.form
    texts = []
    for asked, right in able:
        context = around(right, others(found, asked)[:count], gold)
        texts.append(prompt(asked.question.text, [found.chunks[c].text for c in context], form, reader.tokenizer,
                            reader.template))  # fmt: skip
    said = ask(reader.model, reader.tokenizer, texts, form=form, new_tokens=NEW_TOKENS)
    return DistractedReading(
        f1=tuple(overlap.squad_f1(s.text, asked.question.answers) for s, (asked, _) in zip(said, able, strict=True)),
        context_tokens=tuple(len(encode(reader.tokenizer, text)) for text in texts),
        distractors=count,
        gold=gold,
        remark=thinking_in(said).remark,
    )


def unanswerable(found: Retrieved, reader: Reader) -> UnanswerableReading:
    """Answers where the context does not hold any: to questions that have none, or else without the right document.

    Raises:
        NotAvailable: the set has neither unanswerable questions nor judgements.
    """
    top_k = found.setup.top_k
    able = [each for each, _ in _able(found)][:QUESTIONS]
    none = [each for each in found.asked if not each.question.answerable and not each.error][:QUESTIONS]
    if not none:
        none = [replace(each, hits=tuple(Hit(chunk, 0.0) for chunk in others(found, each)[:top_k])) for each in able]
    form = found.collection.form

    def answers(asked: Sequence[Asked]) -> list[Said]:
        texts = prompts(found, asked, reader.tokenizer, reader.template, rag=True)
        return ask(reader.model, reader.tokenizer, texts, form=form, new_tokens=NEW_TOKENS)

    without, having = answers(none), answers(able)
    return UnanswerableReading(
        without=tuple(said.text for said in without),
        truths=tuple(each.question.answers for each in none),
        having=tuple(said.text for said in having),
        remark=thinking_in([*without, *having]).remark,
        foreign=None if found.collection.english else found.collection.name,
    )


def _able(found: Retrieved) -> list[tuple[Asked, int]]:
    """Questions whose right chunk is known, with it."""
    if not (found.collection.answered and found.collection.judged):
        raise NotAvailable(
            f"{found.collection.name} does not say which chunk holds the answer: it has no judgements or no answers"
        )
    able = [(each, right) for each in found.answerable if (right := right_chunk(found, each)) is not None]
    if not able:
        raise NotAvailable(f"no ranking of {found.collection.name} has a relevant chunk that holds the answer")
    return able
