"""From question and context to prompt and answer.

The embedded reference reads manuals one below the other and then the question, as it was trained to; other models get
an instruction, the context and the question, in their chat template where the tokenizer has one. Without a context the
same question stands alone. A greedy answer is one of many that a model may give; [E] samples (temperature 0.3, top_p
0.9, repetition penalty 1.15, 128 new tokens). Its penalty also makes the tokens of the prompt less likely, the answer
among them, and so works against copying from the context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, DataError
from bench.measure.answering import Answer, Sampling, answer
from bench.measure.rag.pipeline import Asked, Retrieved
from compression.checkpoints.tokens import conversation, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMS = ("reference", "plain")
STOPS = {"reference": ("\n",), "plain": ("\nQuestion:", "\nContext:")}
DECODING = {"greedy": None, "sampled": Sampling()}

_INSTRUCTION = (
    "Answer the question in few words, from the context alone. If the context does not hold the answer, say "
    "that it is unanswerable."
)
_BARE_INSTRUCTION = "Answer the question in few words."


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer: its text without white space around it, and the tokens that were generated; or why there is none.

    `thought` is the thinking that was cut from before it, `finished` unset where that has no end.
    """

    text: str = ""
    tokens: int = 0
    error: str | None = None
    thought: str = ""
    finished: bool = True


def prompt(
    question: str,
    contexts: Sequence[str],
    form: str,
    tokenizer: "PreTrainedTokenizerFast",
    template: Mapping[str, Any] | None = None,
) -> str:
    """All that the model reads before it answers; without contexts, the question alone.

    `template` are arguments of the tokenizer's chat template.
    """
    if form == "reference":
        return "".join(f"{context}\n" for context in contexts) + f"Q: {question}\nA:"
    told = f"{_INSTRUCTION}\n\nContext:\n" + "\n\n".join(contexts) if contexts else _BARE_INSTRUCTION
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": f"{told}\n\nQuestion: {question}"}]
        return conversation(tokenizer, messages, template, add_generation_prompt=True)
    return f"{told}\n\nQuestion: {question}\nAnswer:"


def prompts(
    found: Retrieved,
    asked: Sequence[Asked],
    tokenizer: "PreTrainedTokenizerFast",
    template: Mapping[str, Any] | None = None,
    *,
    rag: bool,
) -> list[str]:
    """The prompts of questions with their contexts, or without any."""
    form = found.collection.form
    contexts = [found.contexts(each) if rag else () for each in asked]
    return [prompt(each.question.text, context, form, tokenizer, template)
            for each, context in zip(asked, contexts, strict=True)]  # fmt: skip


def ask(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str],
    *,
    form: str,
    new_tokens: int,
    decoding: str = "greedy",
    seed: int = 0,
) -> list[Said]:
    """Answers in the order of the prompts. One that fails has its error; the others go on, each by itself then.

    Raises:
        BenchError: every prompt fails; the error of the first.
    """
    wanted = {"new_tokens": new_tokens, "stops": STOPS[form], "sampling": DECODING[decoding]}
    try:
        found = answer(model, tokenizer, texts, seed=seed, **wanted)
        return [_said(each) for each in found]
    except BenchError as error:
        first = error
    said = []
    for place, text in enumerate(texts):
        try:
            [one] = answer(model, tokenizer, [text], seed=1_000_003 * (seed + 1) + place, **wanted)
            said.append(_said(one))
        except BenchError as error:
            said.append(Said(error=f"{type(error).__name__}: {error}"))
    if all(each.error for each in said):
        raise first
    return said


def _said(one: Answer) -> Said:
    return Said(text=one.text.strip(), tokens=one.tokens, thought=one.thought, finished=one.finished)


def check_lengths(
    found: Retrieved, tokenizer: "PreTrainedTokenizerFast", positions: int | None, new_tokens: int
) -> None:
    """Raises DataError for a chunk that by itself, with the answer, is longer than the model's context."""
    if positions is None:
        return
    used = sorted({hit.chunk for asked in found.asked for hit in asked.hits})
    for place in used:
        chunk = found.chunks[place]
        count = len(encode(tokenizer, chunk.text))
        if count + new_tokens > positions:
            raise DataError(
                f"a chunk of document {chunk.document!r} (characters {chunk.begin} to {chunk.end}) has {count} tokens, "
                f"and {new_tokens} are to be answered: more than the {positions} positions of the model; cut smaller "
                "chunks with --chunking tokens --chunk-size N"
            )
