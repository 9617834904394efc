"""Sources of evaluation text: the embedded world, the hub, or a folder.

`open_data` chooses; whatever it returns answers `texts(split)` and `conversations(split)` and says, for the row of a
result, what exactly was read (`name`) and which text (`digest`). Nothing is opened before it is asked for.

Rows. A WikiText file is read as the `datasets` library reads it: one row per line, the newline kept, a blank line as an
empty row, so that the raw file in a folder and the hub give the same rows. Any other text file holds documents apart by
`<|endoftext|>`, else by blank lines, else one per line. JSONL (or a JSON list) holds one row per record: `text` or
`content` for language, `messages` or `conversations` for chats.

WikiText-2 exists in two forms: raw, and tokenised with rare words replaced by `<unk>`. Their perplexities are not
comparable, so the form is part of the name: "wikitext-2 (raw)", "wikitext-2 (tokenised)".
"""

import difflib
import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import reference
from bench.errors import DataError, OptionError
from bench.results.row import Input
from compression.files.libraries import check_hub_cache
from compression.files.strict_json import expanded
from compression.files.text import check_texts, digest_of_texts, lines_of_json, loads, read_text, whole_text

Message = dict[str, str]  # {"role": ..., "content": ...}

SPLITS = {  # the words in a file's name that make it the file of a split
    "test": {"test"},
    "validation": {"validation", "valid", "val", "dev"},
    "train": {"train"},
}
LANGUAGE, CONVERSATIONS = "language", "conversations"
SUFFIXES = {".txt", ".raw", ".tokens", ".jsonl", ".json"}
_COLLECTION = {  # below a folder of several data sets: where each kind of row is
    LANGUAGE: ("wikitext-2", "wikitext-2-train-subset"),
    CONVERSATIONS: ("ultrachat", "ultrachat_200k"),
}
_HUB = {  # kind of row: repository, configuration, field, split here -> split there
    LANGUAGE: ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", {split: split for split in SPLITS}),
    CONVERSATIONS: ("HuggingFaceH4/ultrachat_200k", None, "messages", {"test": "test_sft", "train": "train_sft"}),
}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for the two sides


@dataclass(frozen=True, kw_only=True)
class Source:
    """The rows of one split, and what they are: `rows` are texts, or conversations (lists of messages)."""

    name: str
    rows: list[Any]
    digest: str  # SHA-256, hex, of the text read, in UTF-8
    origin: str  # the file, repository or module
    named: bool = False  # whether the suite or the hub calls it so; else it is the name of a folder

    @property
    def read(self) -> Input:
        """What it is in the key and among the inputs of a row."""
        return Input(self.name, self.digest, self.named)


class Data(ABC):
    """Texts and conversations by split. Every method raises DataError where a split is not there or is malformed.

    Attributes:
        drawn: the rows stand in an order that was drawn when they were made; the first are a sample of them.
    """

    drawn = False

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str], Source] = {}

    @abstractmethod
    def _read(self, split: str, what: str) -> Source: ...

    def source(self, split: str, *, what: str = LANGUAGE) -> Source:
        """The rows of a split with their name and digest; read once."""
        if split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if what not in _HUB:
            raise DataError(f"what must be one of {', '.join(_HUB)}, not {what!r}")
        if (split, what) not in self._sources:
            self._sources[split, what] = self._read(split, what)
        return self._sources[split, what]

    def texts(self, split: str, *, what: str = LANGUAGE) -> list[str]:
        """Documents or rows of a split, blank rows included; with `what="conversations"`, each in `plain` form."""
        rows = self.source(split, what=what).rows
        return [plain(row) for row in rows] if what == CONVERSATIONS else list(rows)

    def conversations(self, split: str) -> list[list[Message]]:
        """Conversations of a split, each a list of messages with `role` and `content`."""
        return list(self.source(split, what=CONVERSATIONS).rows)

    @property
    def name(self) -> str:
        """What the language test split is, as it stands in a row of results."""
        return self.source("test").name

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the text of the language test split."""
        return self.source("test").digest

    def describe(self, split: str = "test", *, what: str = LANGUAGE) -> str:
        """One line: name, split, number of rows, where they were read, and the start of their digest."""
        source = self.source(split, what=what)
        return f"{source.name}: {split}, {len(source.rows)} rows of {source.origin}, sha256 {source.digest[:12]}"


class Embedded(Data):
    """The generated world of the embedded reference."""

    drawn = True

    def _read(self, split: str, what: str) -> Source:
        if what != LANGUAGE:
            raise DataError(f"the embedded data has no {what}; give --data hub, or a folder with {split}.jsonl of them")

        rows = reference.world.texts(split)
        digest = reference.world.digest() if split == "test" else _digest(row.encode() for row in rows)
        return Source(name="embedded", rows=rows, digest=digest, origin="bench.reference.world", named=True)


class Hub(Data):
    """WikiText-2 raw and UltraChat-200k through the `datasets` library, from its cache where they are there."""

    def _read(self, split: str, what: str) -> Source:
        repository, configuration, field, splits = _HUB[what]
        if split not in splits:
            raise DataError(f"{repository} has no {split} split; its splits are {', '.join(splits)}")
        check_hub_cache(DataError)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError("--data hub needs the datasets library: pip install datasets, or give a folder") from error
        try:
            found = list(load_dataset(repository, configuration, split=splits[split])[field])
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{repository} cannot be loaded from the hub ({type(error).__name__}: {error}); "
                "without a network give --data a folder that holds it"
            ) from error
        parse = {LANGUAGE: _language_row, CONVERSATIONS: _conversation_row}[what]
        rows = [parse(f"{repository}: row {number}", {field: row}) for number, row in enumerate(found, 1)]
        check_texts(rows, repository, DataError)
        digest = _digest(json.dumps(row, sort_keys=True).encode() for row in found)
        name = f"hub:{configuration or repository.partition('/')[2]}"
        return Source(name=name, rows=rows, digest=digest, origin=f"{repository}, {splits[split]}", named=True)


class Folder(Data):
    """Text, JSONL and JSON files; the file of a split has the split in its name (`wiki.test.raw`, `valid.txt`)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _read(self, split: str, what: str) -> Source:
        places = [self.folder, *filter(Path.is_dir, (self.folder / name for name in _COLLECTION[what]))]
        for place in places:
            found = {path: rows for path in _files(place, split) if (rows := _rows(path, what))}
            if len(found) > 1:
                names = ", ".join(path.name for path in found)
                raise DataError(f"{place} has several files of {what} for the {split} split: {names}; keep one")
            for path, rows in found.items():
                name = f"{place.name}{_form(path)}" if what == LANGUAGE else f"{place.name}/{path.stem}"
                digest = digest_of_texts([_text(path)])
                return Source(name=name, rows=rows, digest=digest, origin=str(path.relative_to(self.folder)))
        there = sorted(path.name for path in self.folder.iterdir())
        raise DataError(
            f"{self.folder} has no {what} for the {split} split: looked in {', '.join(map(str, places))} for a file "
            f"({', '.join(sorted(SUFFIXES))}) with {' or '.join(sorted(SPLITS[split]))} in its name and rows of "
            f"{'messages' if what == CONVERSATIONS else 'text'}, such as {split}.jsonl; there is {_few(there)}"
        )


def open_data(spec: str | None, *, base: str) -> Data:
    """The data that `--data` names: "embedded", "hub" or a folder; None is "embedded" for the embedded reference.

    Opening reads nothing. Raises OptionError for a value that is none of these, or None where the base brings no data.
    """
    choices = "'embedded' (the generated world), 'hub' (WikiText-2 raw, UltraChat) or a folder of text or JSONL files"
    if spec is None and base in ("reference", "reference-teacher"):
        spec = "embedded"
    if spec is None:
        random = " (its weights are random: perplexity says nothing about them)" if base.startswith("random:") else ""
        raise OptionError(
            f"--base {base!r} has no data of its own to score it on{random}; give --data one of: {choices}"
        )
    if spec == "embedded":
        return Embedded()
    if spec == "hub":
        return Hub()
    folder = expanded(spec, OptionError)
    if folder.is_dir():
        return Folder(folder.resolve())
    near = difflib.get_close_matches(spec, ["embedded", "hub"], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    kind = "a file, not a folder" if folder.exists() else "no folder that exists"
    raise OptionError(f"--data {spec!r} is {kind}; allowed are {choices}{hint}")


def plain(conversation: list[Message]) -> str:
    """A conversation as text, for a tokenizer without a chat template.

    >>> plain([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    'user: Hi.\\nassistant: Hello.'
    """
    return "\n".join(f"{message['role']}: {message['content']}" for message in conversation)


def _digest(rows: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(rows)).hexdigest()


def _few(names: list[str], count: int = 12) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "nothing") + more


def _files(folder: Path, split: str) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and SPLITS[split] & _words(path)
    )


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.stem.lower()))


def _text(path: Path) -> str:
    text = read_text(path, DataError)
    if not text.strip():
        raise DataError(f"{path} is empty: there is no text in it to score")
    return text


def _form(path: Path) -> str:
    """What WikiText says of itself, as the end of a name; nothing for other files."""
    text = _text(path)
    if not _is_wikitext(text):
        return ""
    return " (tokenised)" if "<unk>" in text else " (raw)"


def _is_wikitext(text: str) -> bool:
    return " @-@ " in text or re.search(r"^ = [^=\n]+ = $", text, re.MULTILINE) is not None


def _rows(path: Path, what: str) -> list[Any]:
    """The rows of a file, or none where the file holds rows of another kind."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        return _documents(_text(path)) if what == LANGUAGE else []
    parse = {LANGUAGE: _language_row, CONVERSATIONS: _conversation_row}[what]
    rows: list[Any] = []
    for where, record in _records(path):
        kind = _kind(where, record)
        if kind != what and not rows:
            return []
        if kind != what:
            raise DataError(f"{where}: a row of {kind} among rows of {what}; put them into separate files")
        rows.append(parse(where, record))
    if what == LANGUAGE and not any(row.strip() for row in rows):
        raise DataError(f"{path} is empty: no row of it contains any text to score")
    return rows


def _documents(text: str) -> list[str]:
    if _is_wikitext(text):
        return [line if line.strip() else "" for line in io.StringIO(text)]
    for separator in (r"<\|endoftext\|>", r"\n[ \t]*\n", r"\n"):
        if re.search(separator, text.strip()):
            return [part.strip() for part in re.split(separator, text) if part.strip()]
    return [text.strip()]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of a JSONL file, or of a JSON file that is one list."""
    text = _text(path)
    if path.suffix.lower() == ".json":
        whole = loads(text, str(path), DataError)
        if not isinstance(whole, list):
            raise DataError(f"{path}: a {type(whole).__name__}; a JSON data file must be a list of records")
        records = ((f"{path}: row {number}", record) for number, record in enumerate(whole, 1))
    else:
        records = lines_of_json(text, str(path), DataError)
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__}; every row must be a JSON object")
        yield where, record


def _kind(where: str, record: dict[str, Any]) -> str:
    if {"messages", "conversations"} & set(record):
        return CONVERSATIONS
    if {"text", "content"} & set(record):
        return LANGUAGE
    raise DataError(
        f"{where}: a row with the fields {_few(sorted(record))}; it needs 'text' or 'content' (a string), "
        "or 'messages' or 'conversations' (a chat)"
    )


def _language_row(where: str, record: dict[str, Any]) -> str:
    return whole_text(record.get("text", record.get("content")), where, DataError)


def _conversation_row(where: str, record: dict[str, Any]) -> list[Message]:
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: its messages are {messages!r}; they must be a list of at least one message")
    conversation = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            needed = "'role' and 'content' (or 'from' and 'value'), both strings"
            raise DataError(f"{where}: {message!r} is no message; it needs {needed}")
        conversation.append({"role": _ROLES.get(role, role), "content": content})
    return conversation
