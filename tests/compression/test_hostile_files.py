"""Every reader of a file beside every kind of content that nobody should write: it is read, or refused in words.

The table has a row for each reader: a sound file, and how it is read. What a file is replaced by is JSON that is
deep, huge, not finite, of other types, cut off, no text at all; and the sound file with one place changed. Words are
an error of the packages that names the file, or its folder; any other exception fails, and so does memory beyond 64 MiB
(`tracemalloc`, which sees Python's own).
"""

import json
import os
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import leaves, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st

import compression
from bench.commands import history, reruns
from bench.data.collections.readers import open_collection
from bench.data.sources import Folder
from bench.data.tasks.folder import read as read_task
from bench.data.tasks.table import SUITE
from bench.errors import BenchError
from bench.gate import tolerances
from bench.gate.baseline import Baseline
from bench.measure.judge.reply_cache import Cache
from bench.report import trend
from bench.results import items as stored
from bench.results import journal
from compression import CompressionError, Recipe
from compression.calibration import text as _calibration
from compression.checkpoints.base import byte_tokenizer, locate, read_tokenizer
from compression.checkpoints.formats import description
from compression.engine import stream_state
from compression.files.strict_json import DEPTH, read_json, strict_json
from compression.training import downstream

WORDS = (CompressionError, BenchError)
LIMIT = 64 * 2**20

SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "a b", "qas": [
    {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}]}]}]}  # fmt: skip
STORAGE = {
    "datetime": "2026-11-22T10:00:00+00:00", "commit_info": {"id": "a" * 40},
    "machine_info": {"node": "host", "machine": "x86_64", "python_version": "3.11.7"},
    "benchmarks": [{"fullname": "f", "name": "n", "group": None, "stats": {"median": 2.0},
                    "extra_info": {"recipe": "nf4", "base": "reference", "batch": 1}}],
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
RECORD = {"kind": "run", "run": "r", "time": 1.0, "context": {}}
RERUNS = '{"kind": "calibration", "a": 1}\n{"kind": "rerun", "own": {"m": [1.0]}, "base": {"m": [1.0]}}'
HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}


@dataclass(frozen=True)
class Reader:
    """A file of that name with sound content, and what is called with its path."""

    name: str
    sound: Any  # JSON, or the text as it is
    read: Any

    @property
    def text(self):
        return self.sound if isinstance(self.sound, str) else json.dumps(self.sound)


def documents(path):
    return list(_calibration._read(path))


def task(name):
    return lambda path: read_task(path.parent.parent, SUITE[name], {"dataset_name": "anatomy"})


def collection(path):
    return open_collection(path, None if "squad" in path.name else Path(__file__))


READERS = {
    "config.json": Reader("config.json", None, lambda path: locate(str(path.parent)).config),
    "the index of shards": Reader("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}},
                                  lambda path: locate(str(path.parent)).files),
    "quantize_config.json": Reader("quantize_config.json", GPTQ, lambda path: description.read_config(path.parent, {})),
    "tokenizer.json": Reader("tokenizer.json", None, lambda path: read_tokenizer(path.parent)),
    "tokenizer_config.json": Reader("tokenizer_config.json", None, lambda path: read_tokenizer(path.parent)),
    "compression.json": Reader("compression.json", None, lambda path: compression.load(path.parent)),
    "compression.state.json": Reader("compression.state.json", {}, lambda path: stream_state.unfinished(path.parent)),
    "a recipe": Reader("recipe.json", {"schema": 1, "steps": [{"method": "rtn", "bits": 3}]},
                       lambda path: Recipe.parse(str(path))),
    "calibration": Reader("c.jsonl", {"text": "words"}, documents),
    "a downstream task": Reader("d.jsonl", {"prompt": "a", "answer": "b"}, downstream.read_examples),
    "texts": Reader("test.jsonl", {"text": "words"}, lambda path: Folder(path.parent).source("test")),
    "conversations": Reader("test.json", [{"messages": [{"role": "user", "content": "a"}]}],
                            lambda path: Folder(path.parent).source("test", what="conversations")),
    "a SQuAD file": Reader("squad.json", SQUAD, collection),
    "questions": Reader("questions.json", [{"question": "a", "answer": "b"}], collection),
    "HellaSwag": Reader("hellaswag/x_val.jsonl", HELLASWAG, task("hellaswag")),
    "NQ-open": Reader("nq-open/NQ-open.dev.jsonl", {"question": "a", "answer": ["b"]}, task("nq_open")),
    "HumanEval": Reader("humaneval/HumanEval.jsonl.gz", "", task("humaneval")),
    "a journal": Reader("journal.jsonl", RECORD, journal.read),
    "tolerances": Reader("tolerances.json", {"schema": 1, "devices": {}}, tolerances.load),
    "a baseline": Reader("nf4.json", {"schema": 1, "rows": {}}, Baseline.load),
    "items": Reader("items/nf4.json", {"schema": 1, "rows": {}}, lambda path: stored.load(path.parent, path.stem)),
    "reruns": Reader("reruns.jsonl", RERUNS, lambda path: reruns.kept(path, {"a": 1})),
    "pytest-benchmark's storage": Reader("Linux/0001.json", STORAGE, lambda path: history.of_storage(path.parents[1])),
    "the same for the page": Reader("Linux/0001.json", STORAGE, lambda path: trend.stored(path.parents[1])),
    "replies of the judge": Reader("judge.jsonl", {"key": "a", "reply": {"b": 1}}, Cache),
}  # fmt: skip


HOSTILE = {
    "nothing": b"", "blanks": b" \n\t", "half": b'{"a": [1, ', "no UTF-8": b'\xff\xfe{"a": 1}', "NUL": b"\0" * 64,
    "deep": b"[" * 100_000, "deep and closed": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "just too deep": b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "many digits": b"9" * 10_000, "1e999": b'{"a": 1e999}',
    "NaN": b'{"a": NaN}', "Infinity": b"[-Infinity]", "twice": b'{"schema": 1, "schema": 1}', "null": b"null",
    "a number": b"7", "a text": b'"text"', "a list": b"[]", "a table": b"{}", "lists": b"[[], {}, null, 1, true]",
    "half a pair": b'{"text": "\\ud800", "prompt": "\\ud800", "answer": "\\udfff"}',
    "gzip cut off": b"\x1f\x8b\x08\0\0",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """For each reader a folder with its sound file; those that a model writes are of one."""
    model = tmp_path_factory.mktemp("model") / "m"
    transformers_model("LlamaForCausalLM", vocab_size=300).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    artefact = compression.compress(str(model), "rtn(group_size=32)").save(model.parent / "artefact")
    found = {}
    for name, reader in READERS.items():
        folder = tmp_path_factory.mktemp("reader")
        source = artefact if name == "compression.json" else model
        if reader.sound is None or name in ("the index of shards", "compression.state.json"):
            for path in source.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        path = folder / reader.name
        path.parent.mkdir(exist_ok=True)
        if reader.sound is not None:
            path.write_text(reader.text)
        found[name] = path, path.read_bytes()
    return lambda name: found[name]  # in one word where Hypothesis prints it


def reads_or_refuses(name, path):
    """Whether a file was read; if not, the words name it or a folder that it is in."""
    tracemalloc.start()
    try:
        READERS[name].read(path)
        return True
    except WORDS as error:
        assert any(str(place) in str(error) for place in (path, path.stem, *path.parents[:2])), error
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LIMIT


SOUND = [name for name in READERS if name not in ("compression.state.json", "HumanEval", "a journal", "tolerances",
                                                  "a baseline")]  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_read(places, name):
    path, content = places(name)
    path.write_bytes(content)

    assert reads_or_refuses(name, path)


@pytest.mark.parametrize("name", READERS)
def test_content_that_nobody_should_write_is_read_or_refused_in_words(places, name):
    path, _ = places(name)
    for content in HOSTILE.values():
        path.write_bytes(content)
        reads_or_refuses(name, path)
    path.unlink()
    path.mkdir()
    try:
        reads_or_refuses(name, path)
    finally:
        path.rmdir()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "x", "../../../etc/passwd", "a\0b", "x" * 5000, "\ud800", 2**31, 2**63, 10**99,
                     10**200, -(2**70),
                     [], {}, [None], [[]], {"a": None}, [1], ["x"], 1_000_000, 4.5]),
)  # fmt: skip


STRUCTURED = [name for name in READERS if name not in ("tokenizer.json", "HumanEval", "reruns")]


@pytest.mark.parametrize("name", STRUCTURED)
@settings(max_examples=8)
@given(data=st.data())
def test_one_place_of_a_sound_file_that_holds_something_else_is_read_or_refused_in_words(places, name, data):
    path, content = places(name)
    table = json.loads(content)
    known = list(leaves(table))
    if known:
        *above, last = data.draw(st.sampled_from(known))
        place = table
        for key in above:
            place = place[key]
        place[last] = data.draw(VALUES)
    else:
        table["a"] = data.draw(VALUES)
    path.write_text(json.dumps(table))

    reads_or_refuses(name, path)


@pytest.mark.parametrize("text", ["rtn(bits=" + "9" * 10_000 + ")", "rtn(bits=1e999)", "x" * 100_000,
                                  'rtn(layers={"a":' + "[" * 5000 + "})", "rtn(bits=3)-" * 3000, "a\0.json",
                                  "x" * 5000 + ".json", "~/nothing.json"])  # fmt: skip
def test_a_recipe_of_text_that_nobody_should_write_is_refused_in_words(text):
    with pytest.raises(CompressionError):
        Recipe.parse(text)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10**6}, {"hidden_size": -64}, {"hidden_size": 64.5}, {"vocab_size": 10**12},
    {"num_attention_heads": True}, {"num_key_value_heads": 3}, {"max_position_embeddings": 0}, {"rms_norm_eps": -1.0},
    {"rms_norm_eps": "x"}, {"tie_word_embeddings": "yes"}, {"intermediate_size": [1]}, {"head_dim": 2**40},
])  # fmt: skip
def test_a_configuration_of_a_model_that_cannot_be_is_refused_before_one_is_built(places, monkeypatch, change):
    path, content = places("config.json")
    path.write_text(json.dumps(json.loads(content) | change))
    monkeypatch.setattr("compression.checkpoints.base.build", lambda *arguments, **options: pytest.fail("it was built"))

    with pytest.raises(compression.CheckpointError, match=f"does not describe a model: {next(iter(change))}"):
        compression.open_base(str(path.parent))


def test_no_reader_waits_for_a_pipe_or_reads_what_has_no_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)  # a hole, which takes no room

    for path, words in (
        (tmp_path / "pipe.json", "not a regular file"),
        (tmp_path / "huge.json", "1099511627776 bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            read_json(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(Path("/dev/zero"))


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_what_json_can_hold_is_read_as_json_reads_it(value):
    assert json.loads(json.dumps(value)) == strict_json(json.dumps(value)) == strict_json(json.dumps(value).encode())


def test_a_panic_of_a_library_in_rust_is_words(places, monkeypatch):
    import transformers

    class PanicException(BaseException):
        """As pyo3 has it: no Exception."""

    PanicException.__module__ = "pyo3_runtime"

    def panics(*arguments, **options):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    path, _ = places("tokenizer_config.json")
    with pytest.raises(compression.CheckpointError, match="the tokenizer cannot be read: PanicException: called"):
        read_tokenizer(path.parent)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_taken_for_a_fault_of_a_file(places, monkeypatch, kind):
    import transformers

    def interrupted(*arguments, **options):
        raise kind

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(kind):
        read_tokenizer(places("tokenizer_config.json")[0].parent)
