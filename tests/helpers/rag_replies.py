"""Replies to one question of RAG."""

from bench.measure.rag.prompts import Said
from bench.metrics.rag_answers import Replies


def said(*answers, question="Which price has it?", truths=("42 coins",), context="It costs 42 coins.", bare=()):
    """One question with these answers, one for each seed."""
    return Replies(
        id="1", question=question, prompt=f"{context}\n{question}", truths=tuple(truths), context=context,
        rag=tuple(Said(text=text, tokens=3) for text in answers),
        bare=tuple(Said(text=text, tokens=3) for text in bare),
    )  # fmt: skip
