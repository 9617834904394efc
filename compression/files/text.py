"""Reads text files strictly, by their byte-order mark; errors name file and line.

    mark (BOM)   UTF-8, UTF-16 or UTF-32, and is no part of the text; without one the text is UTF-8
    line ends    \\n, \\r\\n and \\r are \\n; no other sign ends a line (U+2028, U+0085, form feed)
    refused      bytes that are no text, NUL (UTF-16 without a mark), half of a surrogate pair, JSON that is too deep

Every function raises `error`, the exception of the caller, with the file, the line, and what to do.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compression.files.strict_json import strict_json

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark begins it
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_text(path: Path, error: type[Exception]) -> str:
    """The text of a file."""
    try:
        data = path.read_bytes()
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror or wrong}") from None
    return decoded(data, str(path), error)


def decoded(data: bytes, where: str, error: type[Exception]) -> str:
    """The text of the bytes of a file named `where`."""
    mark, encoding = next(((m, e) for m, e in _MARKS.items() if data.startswith(m)), (b"", "utf-8"))
    body = data[len(mark) :]
    if encoding == "utf-8" and (nul := body.find(b"\0")) >= 0:
        line = _line(body[:nul].decode(errors="replace"))
        raise error(
            f"{where}:{line}: contains a NUL character; a file in UTF-16 needs its byte-order mark: convert it to UTF-8"
        )
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as wrong:
        raise error(
            f"{where}:{_line(body[: wrong.start].decode(encoding, errors='replace'))}: not {encoding.upper()}: "
            f"{wrong.reason} at byte {len(mark) + wrong.start}; convert the file to UTF-8"
        ) from None
    if (nul := text.find("\0")) >= 0:
        raise error(f"{where}:{_line(text[:nul])}: contains a NUL character; remove it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def digest_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 (hex) of the texts of files: the same for every encoding and line end of them; of one UTF-8 file without
    a mark, that of its bytes."""
    return hashlib.sha256(b"\0".join(text.encode() for text in texts)).hexdigest()


def loads(text: str, where: str, error: type[Exception], *, line: int = 1) -> Any:
    """A value of JSON that begins at `line` of the file named `where`, every text of it whole."""
    try:
        value = strict_json(text)
        check_texts(value, f"{where}:{line}", error)
    except json.JSONDecodeError as wrong:
        raise error(
            f"{where}:{line + wrong.lineno - 1}: not JSON: {wrong.msg} at column {wrong.colno}; mend or delete it"
        ) from None
    except ValueError as wrong:
        if isinstance(wrong, error):
            raise
        raise error(f"{where}:{line}: JSON that cannot be read: {wrong}; mend or delete it") from None
    return value


def json_lines(path: Path, error: type[Exception]) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of the lines of a JSONL file that are not blank."""
    yield from lines_of_json(read_text(path, error), str(path), error)


def lines_of_json(text: str, where: str, error: type[Exception]) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of the lines of a text that are not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{where}:{number}", loads(line, where, error, line=number)


def check_texts(value: Any, where: str, error: type[Exception]) -> None:
    """Raise `error` for half of a surrogate pair in any text of a value of JSON: it is no letter, and cannot be written
    or tokenized."""
    if isinstance(value, str):
        whole_text(value, where, error)
    elif isinstance(value, dict):
        for name, each in value.items():
            whole_text(name, where, error)
            check_texts(each, where, error)
    elif isinstance(value, list):
        for each in value:
            check_texts(each, where, error)


def whole_text(value: Any, where: str, error: type[Exception], what: str = "its text") -> str:
    """`value`, which must be a text without half of a surrogate pair."""
    if not isinstance(value, str):
        raise error(f"{where}: {what} is {_short(value)}; it must be a text")
    if half := next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None):
        place = value.index(half)
        raise error(
            f"{where}: {what} has half of a surrogate pair, U+{ord(half):04X}, at character {place + 1}; it must be a "
            "whole character"
        )
    return value


def _line(before: str) -> int:
    return before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
