"""Where texts come from: folders of every layout, the embedded world, a stand-in for the hub, and what errors say."""

import hashlib
import json
import os
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import completed

from bench.data.sources import Folder, open_data, plain
from bench.errors import DataError, OptionError

WIKITEXT = " \n = Robert Boulter = \n \n Robert Boulter is an actor . He had a guest @-@ starring role . \n"
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def folder_of(place, files: dict[str, str]) -> Folder:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    return open_data(str(place), base="a-folder")


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["test.txt", "wiki.test.raw", "wiki.test.tokens", "my-test-10k.txt", "TEST.txt"])
def test_a_file_belongs_to_the_split_in_its_name(tmp_path, name):
    assert folder_of(tmp_path, {name: "One text."}).texts("test") == ["One text."]


@pytest.mark.parametrize("name", ["latest.txt", "contest.txt", "texts.txt"])
def test_a_name_that_only_contains_the_letters_of_a_split_is_not_of_it(tmp_path, name):
    with pytest.raises(DataError, match="no language for the test split"):
        folder_of(tmp_path, {name: "One text."}).texts("test")


@pytest.mark.parametrize("name", ["valid.txt", "validation.txt", "val.txt", "dev.txt", "wiki.valid.tokens"])
def test_the_validation_split_has_the_names_people_give_it(tmp_path, name):
    assert folder_of(tmp_path, {name: "One text."}).texts("validation") == ["One text."]


def test_wikitext_rows_are_lines_with_their_newline_and_blank_lines_are_empty_rows(tmp_path):
    data = folder_of(tmp_path, {"wiki.test.raw": WIKITEXT})

    assert data.texts("test")[:3] == ["", " = Robert Boulter = \n", ""]
    assert len(data.texts("test")) == 4


def test_only_a_newline_ends_a_row_of_wikitext(tmp_path):
    row = " Line\u2028separators\x85and\x0bothers @-@ stay in the row . \n"

    assert [row] == folder_of(tmp_path, {"test.txt": row}).texts("test")


def test_the_raw_and_the_tokenised_wikitext_have_different_names(tmp_path):
    raw = folder_of(tmp_path / "wikitext-2", {"wiki.test.raw": WIKITEXT})
    tokenised = folder_of(tmp_path / "other", {"wikitext-2/test.txt": WIKITEXT.replace("Boulter", "<unk>")})

    assert raw.name == "wikitext-2 (raw)"
    assert tokenised.name == "wikitext-2 (tokenised)"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("One.\nstill one\n\n\nTwo.\n", ["One.\nstill one", "Two."]),
        ("One.\nTwo.\n", ["One.", "Two."]),
        ("One.\n\nstill one\n<|endoftext|>\nTwo.", ["One.\n\nstill one", "Two."]),
        ("One.\n", ["One."]),
    ],
    ids=["blank-lines", "lines", "endoftext", "one"],
)
def test_a_text_file_holds_documents(tmp_path, text, rows):
    assert rows == folder_of(tmp_path, {"test.txt": text}).texts("test")


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1))
def test_jsonl_gives_back_every_text_whatever_characters_it_has(tmp_path_factory, texts):
    place = tmp_path_factory.mktemp("jsonl")
    data = folder_of(place, {"test.jsonl": jsonl(*({"text": text} for text in texts), {"content": "the last"})})

    assert [*texts, "the last"] == data.texts("test")


def test_conversations_are_read_in_both_spellings(tmp_path):
    share = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    data = folder_of(tmp_path, {"test.jsonl": jsonl({"messages": TURNS}, {"conversations": share})})

    assert data.conversations("test") == [TURNS, TURNS]
    assert [plain(TURNS)] * 2 == data.texts("test", what="conversations")


def test_a_json_list_is_as_good_as_jsonl(tmp_path):
    data = folder_of(tmp_path, {"test_sft.json": json.dumps([{"messages": TURNS}], indent=1)})

    assert data.conversations("test") == [TURNS]


def test_texts_and_conversations_live_side_by_side(tmp_path):
    data = folder_of(tmp_path, {"test.txt": "A text.", "chat-test.jsonl": jsonl({"messages": TURNS})})

    assert (data.texts("test"), data.conversations("test")) == (["A text."], [TURNS])


def test_the_digest_is_that_of_the_bytes_of_the_file(tmp_path):
    data = folder_of(tmp_path, {"test.txt": "Grüße.\n"})

    assert hashlib.sha256("Grüße.\n".encode()).hexdigest() == data.digest
    assert "test.txt" in data.describe() and data.digest[:12] in data.describe()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.txt": "x"}, ["no language for the test split", "train.txt", "test.jsonl"]),
        ({"test.jsonl": jsonl({"messages": TURNS})}, ["no language for the test split"]),
        ({"test.txt": "x", "wiki.test.raw": "y"}, ["several files", "test.txt, wiki.test.raw", "keep one"]),
        ({"test.txt": " \n\n"}, ["test.txt", "empty"]),
        ({"test.jsonl": ""}, ["test.jsonl", "empty"]),
        ({"test.jsonl": jsonl({"text": " "}, {"text": ""})}, ["test.jsonl", "no row"]),
        ({"test.jsonl": jsonl({"text": "x"}) + '\n{"text": "y"\n'}, ["test.jsonl:3: not JSON"]),
        ({"test.json": '[{"text": "x"},\n{"text": }]'}, ["test.json:2: not JSON"]),
        ({"test.json": '{"text": "x"}'}, ["test.json", "must be a list"]),
        ({"test.jsonl": "[1]\n"}, ["test.jsonl:1", "JSON object"]),
        ({"test.jsonl": jsonl({"txet": "x"})}, ["test.jsonl:1", "txet", "'text' or 'content'"]),
        ({"test.jsonl": jsonl({"text": 3})}, ["test.jsonl:1", "its text is 3", "must be a text"]),
        ({"test.jsonl": jsonl({"text": "x"}, {"messages": TURNS})}, ["test.jsonl:2", "separate files"]),
    ],
)
def test_a_folder_that_cannot_serve_says_why(tmp_path, files, words):
    with pytest.raises(DataError) as caught:
        folder_of(tmp_path, files).texts("test")

    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("messages", [[], "Hi.", [{"role": "user"}], [{"role": 1, "content": "x"}], ["Hi."]])
def test_a_malformed_conversation_is_named_by_file_and_line(tmp_path, messages):
    with pytest.raises(DataError, match=r"test\.jsonl:2"):
        folder_of(tmp_path, {"test.jsonl": jsonl({"messages": TURNS}, {"messages": messages})}).conversations("test")


def test_a_file_of_another_encoding_is_named_with_the_byte(tmp_path):
    (tmp_path / "test.txt").write_bytes("Grüße".encode("latin-1"))

    with pytest.raises(DataError, match=r"not UTF-8: .* at byte 2"):
        open_data(str(tmp_path), base="x").texts("test")


def test_an_unknown_split_or_kind_of_row_is_refused(tmp_path):
    data = folder_of(tmp_path, {"test.txt": "x"})

    with pytest.raises(DataError, match="test, validation, train"):
        data.texts("tset")
    with pytest.raises(DataError, match="language, conversations"):
        data.texts("test", what="code")


@pytest.mark.parametrize(
    ("spec", "base", "words"),
    [
        (None, "random:mistral-7b", ["random:mistral-7b", "--data", "perplexity says nothing"]),
        (None, "some/model", ["some/model", "'embedded'", "'hub'", "folder"]),
        ("embeded", "reference", ["embeded", "did you mean 'embedded'?"]),
        ("/no/such/folder", "reference", ["/no/such/folder", "no folder that exists"]),
        (__file__, "reference", ["a file, not a folder"]),
    ],
)
def test_data_that_cannot_be_opened_says_what_is_allowed(spec, base, words):
    with pytest.raises(OptionError) as caught:
        open_data(spec, base=base)

    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("base", ["reference", "reference-teacher"])
def test_the_reference_is_measured_on_its_own_world(base):
    from bench.reference import world

    data = open_data(None, base=base)

    assert (world.texts("test"), "embedded", world.digest()) == (data.texts("test"), data.name, data.digest)
    assert data.source("validation").digest != data.digest
    with pytest.raises(DataError, match="no conversations"):
        data.conversations("test")


class StandIn(ModuleType):
    """In the place of the datasets library: remembers what was asked for."""

    def load_dataset(self, *asked, split):
        self.asked = (*asked, split)
        if split == "test_sft":
            return {"messages": [TURNS]}
        if split == "train":
            raise ConnectionError("no network")
        return {"text": ["", " = Title = \n"]}


def test_the_hub_gives_wikitext_raw_and_ultrachat(monkeypatch):
    hub = StandIn("datasets")
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = open_data("hub", base="some/model")

    assert (data.texts("test"), data.name) == (["", " = Title = \n"], "hub:wikitext-2-raw-v1")
    assert hub.asked == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert data.conversations("test") == [TURNS]
    assert data.source("test", what="conversations").name == "hub:ultrachat_200k"


def test_a_hub_that_cannot_be_reached_or_lacks_the_split_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", StandIn("datasets"))
    data = open_data("hub", base="some/model")

    with pytest.raises(DataError, match=r"no network.*give --data a folder"):
        data.texts("train")
    with pytest.raises(DataError, match="no validation split; its splits are test, train"):
        data.conversations("validation")


def test_a_folder_with_another_base_needs_no_reference_and_no_heavy_library(tmp_path):
    folder_of(tmp_path, {"test.txt": "One text."})
    code = (
        "import sys; from bench.data.sources import open_data; open_data(sys.argv[1], base=sys.argv[1]).texts('test');"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'numpy'};"
        "print(sorted(name for name in sys.modules if name in heavy or name.startswith('bench.reference.')))"
    )

    ran = completed([sys.executable, "-c", code, str(tmp_path)], check=True)

    assert ran.stdout == "[]\n"


def test_the_shared_folder_gives_tokenised_wikitext_and_a_training_subset():
    if "BENCH_DATA" not in os.environ:
        pytest.skip("BENCH_DATA is not set: point it at a folder that holds wikitext-2/")
    data = open_data(os.environ["BENCH_DATA"], base="some/model")

    assert (data.name, len(data.texts("test"))) == ("wikitext-2 (tokenised)", 4358)
    assert len(data.texts("validation")) == 3760
    assert data.source("train").name == "wikitext-2-train-subset (raw)"
