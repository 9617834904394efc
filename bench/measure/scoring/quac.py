"""QuAC: questions in a dialogue about a section of Wikipedia, answered by spans of it (arXiv 1808.07036).

lm-eval has no configuration of it; this is ours. A prompt is the title, the section, and the dialogue so far with the
answers that were given in it, in the form that GPT-3 was asked in (arXiv 2005.14165, appendix G). A question that the
section does not answer has CANNOTANSWER for its answer, which also ends the section, as in the data.

Scores are those of the paper, section 4: F1 of words under SQuAD's normalisation; where a question has several answers,
the mean over leaving out each of the best of the others, so that people are scored as models are; an answer counts
as none where half of those asked gave none; questions are left out on which those asked agree by less than `AGREEMENT`.
The hub's repository may hold a script, which the datasets library refuses; what is read is the hub's own conversion.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from bench.measure.rag.overlap import squad_f1

NONE = "CANNOTANSWER"
AGREEMENT = 0.4  # F1 among the answers to a question
_PROMPT = (
    "TITLE: {{title}}\nPARAGRAPH: {{context}}\n\n"
    "{% for turn in before %}Q: {{turn.question}}\n\nA: {{turn.answer}}\n\n{% endfor %}Q: {{question}}\n\nA:"
)


def references(answers: Sequence[str]) -> list[str]:
    """The answers that count: none where at least half are, else those that say something.

    >>> references(["in 1987", NONE, "1987"]), references(["in 1987", NONE])
    (['in 1987', '1987'], ['CANNOTANSWER'])
    """
    said = [answer for answer in answers if answer != NONE]
    return said if 2 * len(said) > len(answers) else [NONE]


def f1(answer: str, truths: Sequence[str]) -> float:
    """Mean over leaving out each truth of the best F1 with the others; with one truth, the F1 with it.

    >>> f1("1987", ["in 1987", "1987"])
    0.8333333333333333
    """
    if len(truths) == 1:
        return squad_f1(answer, truths)
    return fmean(squad_f1(answer, [*truths[:n], *truths[n + 1 :]]) for n in range(len(truths)))


def agreement(truths: Sequence[str]) -> float:
    """Mean over the truths of the best F1 with another; 1 for one.

    >>> agreement(["in 1987", "1987"]), agreement(["1987"])
    (0.6666666666666666, 1.0)
    """
    if len(truths) == 1:
        return 1.0
    return fmean(squad_f1(truth, [*truths[:n], *truths[n + 1 :]]) for n, truth in enumerate(truths))


def questions(dialogues: Any) -> Any:
    """One row for each question that is scored, of rows that are dialogues (columns as on the hub)."""
    from datasets import Dataset

    return Dataset.from_list([question for dialogue in dialogues for question in _turns(dialogue)])


def _turns(dialogue: dict[str, Any]) -> Iterator[dict[str, Any]]:
    title = f"{dialogue['wikipedia_page_title']} - {dialogue['section_title']}"
    before: list[dict[str, str]] = []
    given = zip(
        dialogue["questions"], dialogue["answers"]["texts"], dialogue["orig_answers"]["texts"], strict=True
    )  # fmt: skip
    for question, answers, answer in given:
        truths = references(answers)
        if agreement(truths) >= AGREEMENT:
            yield {"title": title, "context": dialogue["context"], "before": list(before), "question": question,
                   "truths": truths}  # fmt: skip
        before.append({"question": question, "answer": answer})


CONFIGURATION: dict[str, Any] = {
    "task": "quac",
    "dataset_path": "allenai/quac",
    "dataset_kwargs": {"revision": "refs/convert/parquet"},
    "validation_split": "validation",
    "process_docs": questions,
    "output_type": "generate_until",
    "doc_to_text": _PROMPT,
    "doc_to_target": "{{truths[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 128, "do_sample": False},
    "process_results": lambda doc, said: {"f1": f1(said[0].strip(), doc["truths"])},
    "metric_list": [{"metric": "f1", "aggregation": "mean", "higher_is_better": True}],
}
