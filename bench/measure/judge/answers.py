"""The answering run: every question with its paragraph as context, as [O] asks SQuAD's.

[O]'s code draws 200 new tokens at temperature 0.7 and asks 1,000 questions; so is it here, with the numbers that a draw
uses fixed by the seed and the place of the question, the same for every model. `greedy` takes the likeliest tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import DataError, NotAvailable
from bench.measure.answering import Sampling, answer
from bench.measure.rag.prompts import STOPS
from bench.measure.rag.prompts import prompt as reference_prompt
from compression.checkpoints.tokens import conversation, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bench.data.collections.collection import Collection

QUESTIONS = 1000
NEW_TOKENS = 200
DECODING = {"sampled": Sampling(temperature=0.7, top_p=1.0, repetition_penalty=1.0), "greedy": None}

TEMPLATE = """\
Answer the question about the text.
- Use only what the text says.
- Answer in one or two complete sentences.
- Do not repeat the question.

Text:
{context}

Question: {question}"""
REFERENCE_INSTRUCTIONS = (
    "Take the answer from the text above the question.",
    "Answer in a few words on one line.",
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as a model reads it: `prompt`; the first of `truths` is the reference answer."""

    question: str
    context: str
    truths: tuple[str, ...]
    prompt: str
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """A question and what a model wrote, without white space around it.

    `thought` is the thinking that was cut from before it, `finished` unset where that has no end.
    """

    asked: Asked
    text: str
    thought: str = ""
    finished: bool = True


def instructions(template: str) -> tuple[str, ...]:
    """The lines of a template that begin with "- ".

    >>> instructions("Answer.\\n- Be short.\\n- Say please.\\n\\n{question}")
    ('Be short.', 'Say please.')
    """
    return tuple(line[2:].strip() for line in template.splitlines() if line.startswith("- "))


def check(collection: "Collection") -> None:
    """Raises NotAvailable for a collection whose questions have no paragraph or no answer."""
    if not collection.answered:
        raise NotAvailable(f"{collection.name} has judgements but no answers")
    if not any(question.gains for question in collection.questions):
        raise NotAvailable(
            f"{collection.name} does not say which paragraph a question refers to; give a SQuAD file with "
            "--dataset-path"
        )


def questions_of(
    collection: "Collection",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    count: int | None = None,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
    positions: int | None = None,
    template: Mapping[str, Any] | None = None,
) -> tuple[Asked, ...]:
    """The answerable questions with the paragraph that each is about.

    Args:
        count: so many of them, spread over the set; None: `QUESTIONS`, or as many as there are.
        seed: of the draw of questions.
        positions: of the model.
        template: arguments of the tokenizer's chat template.

    Raises:
        NotAvailable: see `check`.
        OptionError: a count that cannot be.
        DataError: a prompt with its answer is longer than `positions`.
    """
    check(collection)
    texts = {document.id: document.text for document in collection.documents}
    able = [question for question in collection.take(count, seed).questions if question.answerable and question.gains]
    found = []
    for question in able[:QUESTIONS] if count is None else able:
        context = texts[max(question.gains, key=lambda name: question.gains[name])]
        found.append(
            Asked(
                question=question.text,
                context=context,
                truths=question.answers,
                prompt=prompt(question.text, context, collection.form, tokenizer, template),
                instructions=REFERENCE_INSTRUCTIONS if collection.form == "reference" else instructions(TEMPLATE),
            )
        )
        length = len(encode(tokenizer, found[-1].prompt))
        if positions is not None and length + new_tokens > positions:
            raise DataError(
                f"question {question.id!r} of {collection.name} with its paragraph has {length} tokens, and "
                f"{new_tokens} are to be answered: more than the {positions} positions of the model; give a smaller "
                "--judge-new-tokens, or --num-questions to stop before it"
            )
    return tuple(found)


def prompt(
    question: str,
    context: str,
    form: str,
    tokenizer: "PreTrainedTokenizerFast",
    template: Mapping[str, Any] | None = None,
) -> str:
    """All that the model reads before it answers, in its chat template where it has one."""
    if form == "reference":
        return reference_prompt(question, [context], form, tokenizer)
    text = TEMPLATE.format(context=context, question=question)
    if tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        return conversation(tokenizer, message, template, add_generation_prompt=True)
    return f"{text}\nAnswer:"


def answers_of(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[Asked],
    *,
    form: str,
    decoding: str = "sampled",
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> tuple[Answered, ...]:
    """What a model answers; `form` is that of the collection."""
    said = answer(model, tokenizer, [each.prompt for each in asked], new_tokens=new_tokens, stops=STOPS[form],
                  sampling=DECODING[decoding], seed=seed)  # fmt: skip
    return tuple(
        Answered(each, one.text.strip(), one.thought, one.finished) for each, one in zip(asked, said, strict=True)
    )
