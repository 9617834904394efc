"""Tasks from a folder: files of published data sets, converted to the columns of lm-eval's configuration.

    hellaswag/*val*.jsonl            mmlu/{dev,test}/<subject>_{dev,test}.csv     gsm8k/{train,test}.jsonl
    humaneval/HumanEval.jsonl[.gz]   mbpp/mbpp.jsonl                              bbh/bbh/<task>.json
    nq-open/NQ-open.dev.jsonl        triviaqa*/triviaqa*.jsonl                    commonsenseqa/dev*.jsonl
    math500/math500_test_ori.jsonl   agieval/v1/<file>.jsonl                      quac/val_v0.2.json
    commonsense8/{ARC-Easy,ARC-Challenge,boolq,openbookqa,piqa,social_i_qa,winogrande}/test.json

The rows of `commonsense8` are instructions with the options in their text; they are taken apart again, so that options
are scored by their likelihood. Its BoolQ has lost the passages: its questions are scored without.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.data.tasks.records import TEXTS, Record, cells_of, checked, records_of, text_of
from bench.data.tasks.table import Task
from bench.errors import DataError, NotAvailable

LETTERS = "ABCDEFGH"


@dataclass
class Splits:
    """Rows of one configuration by split, and what else it needs to be changed to."""

    rows: dict[str, list[Record]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    note: str = ""


def read(folder: Path, task: Task, configuration: Record) -> Splits:
    """The data of one configuration of a task.

    Raises:
        NotAvailable: the folder has no such data.
        DataError: a file is not of its form; the message names file and line, what was expected and what found.
    """
    found = _READERS[task.name](_Place(folder, task), configuration)
    for split, rows in found.rows.items():
        if not rows:
            raise DataError(f"{folder}: {task.title} has no rows in its {split} split")
    return found


@dataclass
class _Place:
    """A data folder as one task sees it."""

    folder: Path
    task: Task
    digest: Any = field(default_factory=hashlib.sha256)

    def file(self, *patterns: str) -> Path:
        """The one file that one of the patterns names."""
        found = sorted({path for pattern in patterns for path in self.folder.glob(pattern)})
        if not found:
            raise NotAvailable(f"{self.task.title}: {self.folder} has no {' or '.join(patterns)}")
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(self.folder)) for path in found)
            raise DataError(f"{self.folder} has several files for {self.task.title}: {names}; keep one")
        self.digest.update(text_of(found[0]).encode())
        return found[0]

    def splits(self, rows: dict[str, list[Record]], *, note: str = "", **changes: Any) -> Splits:
        return Splits(rows=rows, changes=changes, digest=self.digest.hexdigest(), note=note)


def _place_of(where: str, answer: Any, answers: Sequence[Any]) -> int:
    """The place of the right answer among those allowed."""
    if answer not in answers:
        raise DataError(f"{where}: expected an answer among {', '.join(map(str, answers))}, found {answer!r}")
    return answers.index(answer)


def _hellaswag(place: _Place, _: Record) -> Splits:
    rows = []
    columns = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": TEXTS, "label": (int, str)}
    for where, record in records_of(place.file("hellaswag/*val*.jsonl", "hellaswag_val*.jsonl"), **columns):
        if not str(record["label"]).isdecimal():
            raise DataError(f"{where}: expected label to be a number, found {record['label']!r:.60}")
        _place_of(where, int(record["label"]), range(len(record["endings"])))
        rows.append({name: record[name] for name in columns} | {"label": str(record["label"])})
    return place.splits({"validation": rows})


def _gsm8k(place: _Place, configuration: Record) -> Splits:
    rows = {}
    for split in ("train", "test"):
        rows[split] = []
        for where, record in records_of(place.file(f"gsm8k/{split}.jsonl"), question=str, answer=str):
            if "####" not in record["answer"]:
                raise DataError(f"{where}: expected an answer that ends with #### and a number, found "
                                f"{record['answer'][-40:]!r}")  # fmt: skip
            rows[split].append({name: record[name] for name in ("question", "answer")})
    return place.splits(rows)


def _mmlu(place: _Place, configuration: Record) -> Splits:
    subject = configuration["dataset_name"]
    rows: dict[str, list[Record]] = {}
    for split in ("dev", "test"):
        path = place.file(f"mmlu/{split}/{subject}_{split}.csv")
        rows[split] = []
        for where, cells in cells_of(path):
            if len(cells) != 6:
                raise DataError(
                    f"{where}: expected 6 columns (question, 4 choices, letter), found {len(cells)}: {cells!r:.80}"
                )
            answer = _place_of(where, cells[5].strip(), LETTERS[:4])
            rows[split].append({"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": answer})
    return place.splits(rows)


def _humaneval(place: _Place, _: Record) -> Splits:
    columns = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
    path = place.file("humaneval/HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz")
    return place.splits({"test": [{name: r[name] for name in columns} for _, r in records_of(path, **columns)]})


def _mbpp(place: _Place, _: Record) -> Splits:
    columns = {"task_id": int, "text": str, "code": str, "test_list": TEXTS, "test_setup_code": str}
    records = [record for _, record in records_of(place.file("mbpp/mbpp.jsonl"), **columns)]
    rows = {
        "prompt": [r for r in records if r["task_id"] <= 10],
        "test": [r for r in records if 10 < r["task_id"] <= 510],
    }
    return place.splits({split: [{name: r[name] for name in columns} for r in of] for split, of in rows.items()})


def _instructions(place: _Place, name: str, word: str) -> Iterator[tuple[str, str, list[str], int]]:
    """(where, question, options, place of the right one) of the rows of a file of commonsense8."""
    path = place.file(f"commonsense8/{name}/test.json")
    for where, record in records_of(path, instruction=str, answer=str):
        text = record["instruction"].partition(": ")[2]
        text, _, _ = text.rpartition("Answer format:")
        question, *options = _cut(text, word)
        if not question or len(options) < 2 or not all(options):
            raise DataError(f"{where}: expected a question and its options as {word}1: ... {word}2: ..., found "
                            f"{record['instruction']!r:.120}")  # fmt: skip
        names = [f"{word.lower()}{number}" for number in range(1, len(options) + 1)]
        yield where, question, options, _place_of(where, record["answer"], names)


def _cut(text: str, word: str) -> list[str]:
    """A text at `Word1: `, `Word2: ` and so on, in this order."""
    parts, number = [], 1
    while match := re.search(rf"(?:^|\s){word}{number}:", text):
        parts.append(text[: match.start()].strip())
        text, number = text[match.end() :], number + 1
    return [*parts, text.strip()]


def _lettered(name: str, word: str, question: str) -> Callable[[_Place, Record], Splits]:
    """A reader into a question, and choices with letters."""

    def reader(place: _Place, _: Record) -> Splits:
        return place.splits({"test": [
            {question: asked, "choices": {"text": options, "label": list(LETTERS[: len(options)])},
             "answerKey": LETTERS[right]}
            for _, asked, options, right in _instructions(place, name, word)
        ]})  # fmt: skip

    return reader


def _piqa(place: _Place, _: Record) -> Splits:
    found = _instructions(place, "piqa", "Solution")
    rows = [{"goal": q, "sol1": options[0], "sol2": options[1], "label": right} for _, q, options, right in found]
    return place.splits({"validation": rows})


def _siqa(place: _Place, _: Record) -> Splits:
    found = _instructions(place, "social_i_qa", "Answer")
    rows = [
        {"question": q, "answerA": a, "answerB": b, "answerC": c, "label": str(right + 1)}
        for _, q, (a, b, c), right in found
    ]
    return place.splits({"validation": rows}, doc_to_text="Q: {{question}}\nA:")


def _winogrande(place: _Place, _: Record) -> Splits:
    rows = []
    for where, sentence, options, right in _instructions(place, "winogrande", "Option"):
        if "_" not in sentence:
            raise DataError(f"{where}: expected a sentence with a blank (_), found {sentence!r:.80}")
        rows.append({"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(right + 1)})
    return place.splits({"validation": rows})


def _boolq(place: _Place, _: Record) -> Splits:
    rows = []
    for where, record in records_of(place.file("commonsense8/boolq/test.json"), instruction=str, answer=str):
        question = record["instruction"].partition("question: ")[2].rpartition("Answer format:")[0].strip()
        if not question:
            raise DataError(f"{where}: expected 'question: ...', found {record['instruction']!r:.80}")
        right = _place_of(where, record["answer"], ("false", "true"))
        rows.append({"question": question.removesuffix("?"), "passage": "", "label": right})
    return place.splits({"validation": rows}, note="without passages", doc_to_text="Question: {{question}}?\nAnswer:")


def _commonsenseqa(place: _Place, _: Record) -> Splits:
    rows = []
    for where, record in records_of(place.file("commonsenseqa/dev*.jsonl"), question=dict, answerKey=str):
        asked = checked(where, record["question"], {"stem": str, "choices": list})
        choices = [checked(where, choice, {"label": str, "text": str}) for choice in asked["choices"]]
        labels = [choice["label"] for choice in choices]
        _place_of(where, record["answerKey"], labels)
        rows.append({"question": asked["stem"], "choices": {"label": labels, "text": [c["text"] for c in choices]},
                     "answerKey": record["answerKey"]})  # fmt: skip
    return place.splits({"validation": rows})


def _nq_open(place: _Place, _: Record) -> Splits:
    found = records_of(place.file("nq-open/NQ-open.dev.jsonl"), question=str, answer=TEXTS)
    return place.splits({"validation": [{"question": r["question"], "answer": r["answer"]} for _, r in found]})


def _triviaqa(place: _Place, _: Record) -> Splits:
    found = records_of(place.file("triviaqa*/triviaqa*.jsonl"), question=str, golden_answers=TEXTS)
    rows = [
        {"question": r["question"].strip('"').removesuffix("?"), "answer": {"aliases": r["golden_answers"]}}
        for _, r in found
    ]
    return place.splits({"validation": rows}, note="a sample of the questions")


def _bbh(place: _Place, configuration: Record) -> Splits:
    path = place.file(f"bbh/bbh/{configuration['dataset_name']}.json", f"bbh/{configuration['dataset_name']}.json")
    found = records_of(path, input=str, target=str)
    return place.splits({"test": [{"input": r["input"], "target": r["target"]} for _, r in found]})


_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
             "precalculus")  # fmt: skip


def _math(place: _Place, configuration: Record) -> Splits:
    rows = []
    path = place.file("math500/math500_test_ori.jsonl", "math500/test.jsonl")
    for where, record in records_of(path, problem=str, solution=str, subject=str):
        if not re.search(r"\\boxed\b|\\fbox\b", record["solution"]):
            raise DataError(f"{where}: expected a solution with its answer in \\boxed, found "
                            f"{record['solution'][-60:]!r}")  # fmt: skip
        subject = re.sub(r"\W+", "_", record["subject"].lower().replace("&", "and"))
        _place_of(where, subject, _SUBJECTS)
        if subject == configuration["dataset_name"]:
            rows.append({"problem": record["problem"], "solution": record["solution"]})
    return place.splits({"test": rows}, note="MATH-500")


def _agieval(place: _Place, configuration: Record) -> Splits:
    """The prompt is the one that the hub's copies hold: passage, question and options in one text."""
    name = configuration["dataset_path"].rpartition("/agieval-")[2]
    columns = {"passage": (str, type(None)), "question": str, "options": TEXTS, "label": str}
    rows = []
    for where, record in records_of(place.file(f"agieval/v1/{name}.jsonl", f"agieval/{name}.jsonl"), **columns):
        options, letters = record["options"], LETTERS[: len(record["options"])]
        asked = f"{record['passage'] or ''}Q: {record['question']} Answer Choices: {' '.join(options)}\n"
        rows.append({"query": f"{asked}A: Among A through {letters[-1]}, the answer is", "choices": options,
                     "gold": [_place_of(where, record["label"], letters)]})  # fmt: skip
    return place.splits({"test": rows})


def _quac(place: _Place, _: Record) -> Splits:
    path = place.file("quac/val_v0.2.json")
    dialogues = []
    for where, page in records_of(path, title=str, section_title=str, paragraphs=list):
        for paragraph in page["paragraphs"]:
            turns = checked(where, paragraph, {"context": str, "qas": list})["qas"]
            for turn in turns:
                checked(where, turn, {"question": str, "answers": list, "orig_answer": dict})
                for answer in (*turn["answers"], turn["orig_answer"]):
                    checked(where, answer, {"text": str})
            dialogues.append({
                "wikipedia_page_title": page["title"], "section_title": page["section_title"],
                "context": paragraph["context"], "questions": [turn["question"] for turn in turns],
                "answers": {"texts": [[answer["text"] for answer in turn["answers"]] for turn in turns]},
                "orig_answers": {"texts": [turn["orig_answer"]["text"] for turn in turns]},
            })  # fmt: skip
    return place.splits({"validation": dialogues})


_READERS: dict[str, Callable[[_Place, Record], Splits]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _lettered("ARC-Easy", "Answer", "question"),
    "arc_challenge": _lettered("ARC-Challenge", "Answer", "question"),
    "gsm8k": _gsm8k,
    "gsm8k_maj8": _gsm8k,
    "mmlu": _mmlu,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "winogrande": _winogrande,
    "piqa": _piqa,
    "siqa": _siqa,
    "openbookqa": _lettered("openbookqa", "Answer", "question_stem"),
    "commonsenseqa": _commonsenseqa,
    "boolq": _boolq,
    "nq_open": _nq_open,
    "triviaqa": _triviaqa,
    "bbh": _bbh,
    "math": _math,
    "agieval": _agieval,
    "quac": _quac,
}
