"""Text that others wrote: every reader takes every encoding mark and line end, and says where something is no text."""

import codecs
import json

import pytest
from checkpoints import says
from hypothesis import given
from hypothesis import strategies as st

import compression
from bench.data.collections.readers import open_collection
from bench.data.sources import open_data
from bench.data.tasks import folder
from bench.data.tasks.table import SUITE
from bench.errors import BenchError, DataError
from compression import CompressionError
from compression.calibration.text import open_calibration
from compression.files.text import decoded, digest_of_texts, loads
from compression.training.downstream import open_downstream

MARKED = {
    "utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE,
}  # fmt: skip
# half of a pair cannot be encoded; NUL, carriage returns and a mark at the beginning are not kept
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")


@given(st.text(letters), st.sampled_from(sorted(MARKED)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_mark_encoding_and_line_ends_are_no_part_of_a_text(text, encoding, end):
    data = MARKED[encoding] + text.replace("\n", end).encode(encoding)

    assert text == decoded(data, "file", ValueError)
    assert text == decoded(text.encode(), "file", ValueError)


def test_the_digest_of_a_plain_file_is_that_of_its_bytes():
    import hashlib

    assert hashlib.sha256("Grüße\n".encode()).hexdigest() == digest_of_texts(["Grüße\n"])
    assert digest_of_texts(["a", "b"]) != digest_of_texts(["ab"])


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


SQUAD = {"data": [{"paragraphs": [{"context": "It is red.", "qas": [
    {"id": "1", "question": "Which?", "answers": [{"text": "red"}]}]}]}]}  # fmt: skip
QUESTIONS = [{"question": "Which?", "answer": "red"}]
LISTED = json.dumps(QUESTIONS)
GSM8K = jsonl({"question": "One and one?", "answer": "#### 2"})
HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}


def of_calibration(place):
    return list(open_calibration(str(place), None).documents(0))


def of_downstream(place):
    return open_downstream(str(place), None).digest


def of_data(place):
    source = open_data(str(place), base="x").source("test")
    return source.rows, source.digest


def of_chats(place):
    return open_data(str(place), base="x").source("test", what="conversations").rows


def of_task(name, configuration=None):
    def read(place):
        found = folder.read(place, SUITE[name], configuration or {})
        return found.rows, found.digest

    return read


def of_collection(file, documents=None):
    def read(place):
        return open_collection(place / file, documents and place / documents)

    return read


def of_cranfield(place):
    return open_collection(place)


MMLU = {"dataset_name": "anatomy"}
CSV = 'Which?,a,"b,\u2028c",d,e,A\n'
READERS = {  # what reads a folder, and its files, of which the first is changed
    "calibration-txt": (of_calibration, {"train.txt": "One\u2028text.\n\nAn\u0085other.\n"}),
    "calibration-jsonl": (of_calibration, {"train.jsonl": jsonl({"text": "One"}, {"content": "two \u2028 ё"})}),
    "downstream": (of_downstream, {"train.jsonl": jsonl({"prompt": "1 +", "answer": "2"})}),
    "data-txt": (of_data, {"test.txt": "One text.\n\nAnother \u2028 one.\n"}),
    "data-jsonl": (of_data, {"test.jsonl": jsonl({"text": "One"}, {"content": "\u043eй"})}),
    "data-json": (of_data, {"test.json": json.dumps([{"text": "One"}], indent=1)}),
    "data-chats": (of_chats, {"test.jsonl": jsonl({"messages": [{"role": "user", "content": "Hi"}]})}),
    "gsm8k": (of_task("gsm8k"), {"gsm8k/test.jsonl": GSM8K, "gsm8k/train.jsonl": GSM8K}),
    "hellaswag": (of_task("hellaswag"), {"hellaswag/val.jsonl": jsonl(HELLASWAG)}),
    "mmlu": (of_task("mmlu", MMLU), {"mmlu/test/anatomy_test.csv": CSV, "mmlu/dev/anatomy_dev.csv": CSV}),
    "bbh": (of_task("bbh", MMLU), {"bbh/bbh/anatomy.json": json.dumps({"examples": [{"input": "a", "target": "b"}]})}),
    "squad": (of_collection("set.json"), {"set.json": json.dumps(SQUAD, indent=1)}),
    "questions": (of_collection("set.json", "text.txt"), {"set.json": LISTED, "text.txt": "It is red."}),
    "documents": (of_collection("set.json", "text.txt"), {"text.txt": "It is\nred.", "set.json": LISTED}),
    "cranfield": (of_cranfield, {"cran.all.1400": ".I 1\n.W\nwings\n", "cran.qry": ".I 001\n.W\nwings\n",
                                 "cranqrel": "1 1 1\n"}),
    "judgements": (of_cranfield, {"cranqrel": "1 1 1\n", "cran.all.1400": ".I 1\n.W\nwings\n",
                                  "cran.qry": ".I 001\n.W\nwings\n"}),
    "recipe": (lambda place: compression.Recipe.parse(str(place / "nf4.json")),
               {"nf4.json": '{"schema": 1, "steps": [{"method": "nf4"}]}'}),
}  # fmt: skip


def written(place, files, change=str.encode):
    (first, text), *others = files.items()
    for name, data in [(first, change(text)), *((name, text.encode()) for name, text in others)]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


@pytest.mark.parametrize("reader", READERS)
def test_a_mark_another_encoding_and_other_line_ends_change_nothing_that_is_read(tmp_path, reader):
    read, files = READERS[reader]
    plain = read(written(tmp_path, files))

    for encoding, mark in MARKED.items():
        assert plain == read(written(tmp_path, files, lambda text, e=encoding, m=mark: m + text.encode(e)))
    assert plain == read(written(tmp_path, files, lambda text: text.replace("\n", "\r\n").encode()))


BROKEN = {
    "latin-1": (lambda text: text.encode() + "ß".encode("latin-1"), "not UTF-8"),
    "cut-off": (lambda text: text.encode() + "ß".encode()[:1], "not UTF-8"),
    "no-mark": (lambda text: text.encode("utf-16-le"), ""),
    "half-a-unit": (lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le") + b"x", "not UTF-16-LE"),
    "nul": (lambda text: text.encode() + b"\0", "a NUL"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("broken", BROKEN)
def test_bytes_that_are_no_text_are_refused_with_file_and_line(tmp_path, reader, broken):
    read, files = READERS[reader]
    change, words = BROKEN[broken]
    first = next(iter(files))
    line = 1 if broken == "no-mark" else files[first].count("\n") + 1

    with pytest.raises((BenchError, CompressionError), match=says(f"{first.rpartition('/')[2]}:{line}", words)):
        read(written(tmp_path, files, change))


NO_TEXT = {"null": None, "number": 5, "list": ["a"], "half-of-a-pair": "half of a pair \ud83d", "true": True}
ROWS = {  # what reads a folder, its file, a row with a field that must be a text, and where that is said to be
    "calibration": (of_calibration, "train.jsonl", lambda v: jsonl({"text": "a"}, {"text": v}), "train.jsonl:2"),
    "prompt": (of_downstream, "t.jsonl", lambda v: jsonl({"prompt": v, "answer": "b"}), "t.jsonl:1"),
    "answer": (of_downstream, "t.jsonl", lambda v: jsonl({"prompt": "a", "answer": v}), "t.jsonl:1"),
    "data": (of_data, "test.jsonl", lambda v: jsonl({"text": "a"}, {"content": v}), "test.jsonl:2"),
    "chat": (of_chats, "test.jsonl", lambda v: jsonl({"messages": [{"role": "user", "content": v}]}), "test.jsonl:1"),
    "task": (of_task("gsm8k"), "gsm8k/train.jsonl", lambda v: jsonl({"question": v, "answer": "#### 4"}),
             "train.jsonl:1"),
    "ending": (of_task("hellaswag"), "hellaswag/val.jsonl", lambda v: jsonl(HELLASWAG | {"endings": ["d", v]}),
               "val.jsonl:1"),
    "context": (of_collection("s.json"), "s.json",
                lambda v: json.dumps(SQUAD).replace('"It is red."', json.dumps(v)), "s.json"),
    "question": (of_collection("s.json"), "s.json",
                 lambda v: json.dumps(SQUAD).replace('"Which?"', json.dumps(v)), "s.json"),
    "truth": (of_collection("s.json"), "s.json", lambda v: json.dumps(SQUAD).replace('"red"', json.dumps(v)), "s.json"),
    "listed": (of_collection("s.json", "s.json"), "s.json",
               lambda v: json.dumps([QUESTIONS[0], {"question": v, "answer": "a"}]), "s.json"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("value", NO_TEXT)
def test_a_row_that_is_no_text_is_refused_with_its_place(tmp_path, row, value):
    read, name, text, place = ROWS[row]

    with pytest.raises((BenchError, CompressionError), match=says(place)):
        read(written(tmp_path, {name: text(NO_TEXT[value])}))
    try:
        read(written(tmp_path, {name: text("a whole text")}))
    except BenchError as error:  # of another split that is not there
        assert place not in str(error)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 6000, '{"a": "\\ud83d"}', '{"\\udc00": 1}'])
def test_json_that_python_cannot_hold_is_refused_in_words(text):
    with pytest.raises(DataError, match="file:3: "):
        loads(text, "file", DataError, line=3)


@pytest.mark.parametrize("given", [["half \ud83d"], [None], [5]])
def test_texts_given_as_they_are_must_be_texts(given):
    with pytest.raises(CompressionError):
        open_calibration(given, None)
    with pytest.raises(CompressionError):
        open_downstream([(given[0], "answer")], None)
