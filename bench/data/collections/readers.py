"""Readers of collections: the embedded manuals, SQuAD files, question-answer JSON, Cranfield.

`open_collection` tells them apart by what is in the file or folder.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import reference
from bench.data.collections.chunking import Chunking
from bench.data.collections.collection import Collection, Document, Question
from bench.errors import DataError, OptionError
from compression.files.strict_json import expanded
from compression.files.text import digest_of_texts, loads, read_text, whole_text

FORMS = "a SQuAD file, a JSON list of questions and answers (with --documents), or a folder with cran.all.1400"
_TEXTS = {".txt", ".md"}


def open_collection(path: str | Path | None = None, documents: str | Path | None = None) -> Collection:
    """The collection at a path; None is that of the embedded reference.

    Args:
        path: a SQuAD file (versions 1 and 2), a JSON list of `question` and `answer`, or a folder with Cranfield.
        documents: a text file, or a folder of them (.txt, .md), that a list of questions is about.

    Raises:
        OptionError: there is no such file, or documents are given where the set brings its own, or not given where it
            does not.
        DataError: what is in it is not of its form; see also `Collection`.
    """
    if path is None:
        _refuse(documents, "the embedded collection")
        return embedded()
    path = expanded(path, OptionError)
    if not path.exists():
        raise OptionError(f"--dataset-path {path} does not exist; give {FORMS}, or leave it out for the embedded set")
    if path.is_dir():
        if not (path / "cran.all.1400").exists():
            raise OptionError(f"--dataset-path {path} is a folder without cran.all.1400; give {FORMS}")
        _refuse(documents, str(path))
        return cranfield(path)
    content = loads(read_text(path, DataError), str(path), DataError)
    if isinstance(content, dict) and "data" in content:
        _refuse(documents, str(path))
        return squad(path)
    if isinstance(content, list):
        if documents is None:
            raise OptionError(f"--dataset-path {path} has questions but no documents; give --documents FILE or FOLDER")
        return question_answers(path, documents)
    raise DataError(f"{path} has neither 'data' (SQuAD) nor a list of questions and answers; give {FORMS}")


def embedded(split: str = "test") -> Collection:
    """The manuals of the reference's held-out devices, and its questions about them, each once.

    A chunk is about half of a manual. Whole ones are harder: what is found beside the right manual are namesakes that
    state the same attribute, and the reference takes one for the other (token F1 0.64 of the validation questions, 0.90
    with half manuals, 1.00 with pairs of sentences).
    """

    documents = [Document(id=each["id"], text=each["text"]) for each in reference.tasks.documents(split)]
    asked = {(item["question"], item["gold"]): item for item in reversed(reference.tasks.items("rag", split))}
    questions = [
        Question(id=item["id"], text=_bare(item["question"]), answers=(item["answer"],), gains={item["gold"]: 1})
        for item in reversed(asked.values())
    ]
    content = json.dumps([[d.text for d in documents], [[q.text, *q.answers, *q.gains] for q in questions]])
    return Collection(
        name="embedded",
        named=True,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        documents=tuple(documents),
        questions=tuple(questions),
        form="reference",
        drawn=True,
        chunking=Chunking(by="sentences", size=40, overlap=0),
    )


def _bare(question: str) -> str:
    """A question of the reference without the marks before and after it, which belong to the prompt."""
    return question.removeprefix("Q: ").removesuffix("\nA:")


def squad(path: Path) -> Collection:
    """SQuAD 1.1 and 2.0: a paragraph is a document, relevant to the questions below it; equal paragraphs are one."""
    text = read_text(path, DataError)
    documents: dict[str, Document] = {}
    questions = []
    try:
        for n, article in enumerate(loads(text, str(path), DataError)["data"]):
            for m, paragraph in enumerate(article["paragraphs"]):
                where = f"{path}: data[{n}].paragraphs[{m}]"
                context = whole_text(paragraph["context"], where, DataError, "its context")
                document = documents.setdefault(context, Document(id=f"paragraph-{len(documents)}", text=context))
                for k, asked in enumerate(paragraph["qas"]):
                    answerable = not asked.get("is_impossible", False)
                    given = asked["answers"] if answerable else ()
                    at = f"{where}.qas[{k}]"
                    answers = [whole_text(answer["text"], at, DataError, "an answer") for answer in given]
                    questions.append(
                        Question(
                            id=str(asked["id"]),
                            text=whole_text(asked["question"], at, DataError, "its question"),
                            answers=tuple(dict.fromkeys(answers)),
                            gains={document.id: 1} if answerable else {},
                            answerable=answerable,
                            part=(f"article-{n}", document.id),
                        )
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not in SQuAD format: {type(error).__name__} {error}; it needs data > paragraphs > context and "
            "qas, and in each of these id, question and answers"
        ) from None
    return Collection(
        name=path.stem, digest=digest_of_texts([text]), documents=tuple(documents.values()), questions=tuple(questions)
    )


def question_answers(path: Path, documents: str | Path) -> Collection:
    """A JSON list of `question` and `answer` (with an `id` or not) over a text file or a folder of them: no judgements.

    `answer` is a text or a list of texts in alternative words.
    """
    files = _files(expanded(documents, OptionError))
    listed = read_text(path, DataError)
    texts = [read_text(file, DataError) for file in files]
    questions = []
    for number, record in enumerate(loads(listed, str(path), DataError), 1):
        fields = record if isinstance(record, dict) else {}
        text, answer = fields.get("question"), fields.get("answer")
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(text, str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise DataError(
                f"{path}: entry {number} needs 'question' (a string) and 'answer' (a string or a list of strings): "
                f"{record!r}"
            )
        questions.append(Question(id=str(fields.get("id", number)), text=text, answers=tuple(answers)))
    return Collection(
        name=path.stem,
        digest=digest_of_texts([listed, *texts]),
        documents=tuple(Document(id=file.name, text=text) for file, text in zip(files, texts, strict=True)),
        questions=tuple(questions),
    )


def cranfield(folder: Path) -> Collection:
    """Cranfield: 1,400 abstracts, 225 queries, graded judgements (Cleverdon, 1967).

    Judgements count queries by their place in the file, not by the number printed there. Grade 1 is the best of 1 to 4
    and becomes a gain of 4, grade 4 a gain of 1; rows of grade -1 are taken as grade 1.
    """
    paths = [folder / name for name in ("cran.all.1400", "cran.qry", "cranqrel")]
    if absent := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{folder} lacks {', '.join(absent)} of Cranfield")
    abstracts, queries, judgements = paths
    gains: dict[int, dict[str, int]] = {}
    for number, line in enumerate(read_text(judgements, DataError).strip("\n").split("\n"), 1):
        try:
            query, document, grade = map(int, line.split())
        except ValueError:
            raise DataError(f"{judgements}:{number}: {line!r} is not a query, a document and a grade") from None
        if grade not in (-1, 1, 2, 3, 4):
            raise DataError(f"{judgements}:{number}: grade {grade} is not -1 or 1 to 4")
        gains.setdefault(query, {})[str(document)] = 5 - abs(grade)
    texts = [text for _, text in _entries(queries)]
    if beyond := sorted(query for query in gains if not 1 <= query <= len(texts)):
        raise DataError(f"{judgements} judges query {beyond[0]}; {queries} has {len(texts)}")
    return Collection(
        name="cranfield",
        digest=digest_of_texts(read_text(path, DataError) for path in paths),
        documents=tuple(Document(id=name, text=text) for name, text in _entries(abstracts)),
        questions=tuple(
            Question(id=str(number), text=text, gains=gains.get(number, {})) for number, text in enumerate(texts, 1)
        ),
        answered=False,
    )


def _entries(path: Path) -> Iterable[tuple[str, str]]:
    """(number, text under .W) of each entry of a file in SMART's form."""
    _, *parts = re.split(r"^\.I (\d+)\s*\n", read_text(path, DataError), flags=re.MULTILINE)
    for number, entry in zip(parts[::2], parts[1::2], strict=True):
        yield str(int(number)), entry.partition(".W\n")[2].strip()


def _files(place: Path) -> Sequence[Path]:
    if place.is_file():
        return [place]
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in _TEXTS) if place.is_dir() else []
    if not files:
        raise OptionError(f"--documents {place} has no text files ({', '.join(sorted(_TEXTS))})")
    return files


def _refuse(documents: object, what: str) -> None:
    if documents is not None:
        raise OptionError(f"--documents {documents} is not used: {what} has its own documents; leave it out")
