"""The files of a journal, one to each writer, and their lines as they stand there."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bench.errors import JournalError
from bench.results.checksums import is_sealed, whole_in
from bench.results.records import Record, _record


def files_of(path: str | Path) -> list[Path]:
    """The files of a journal that are there, the named one first."""
    path = Path(path)
    sibling = re.compile(re.escape(path.stem) + r"\.[1-9][0-9]*" + re.escape(path.suffix))
    if not path.parent.is_dir():
        return []
    others = sorted(each for each in path.parent.iterdir() if sibling.fullmatch(each.name))
    return [each for each in (path, *others) if each.exists()]


class Line(NamedTuple):
    """A line of a journal: its record, or why it is none."""

    number: int
    text: bytes
    record: Record | None
    why: str = ""
    torn: bool = False  # it has no end: its writer was killed within it


def lines_of(file: Path, seen: set[bytes]) -> Iterator[Line]:
    """All lines of one file. `seen` has the names (`name_of`) of those before it, and is added to: no writer writes a
    line twice.

    Raises JournalError where the file cannot be read.
    """
    checked, latest = False, 0.0
    for number, (text, ended) in enumerate(_texts(file), 1):
        try:
            record = _record(text)
            if checked and not is_sealed(text):
                raise ValueError("it has no checksum, although earlier lines have one")
            checked = is_sealed(text)
            if (name := name_of(text)) in seen:
                raise ValueError("an identical line, with the same time, comes before it")
            seen.add(name)
            latest = max(latest, record["time"])
            yield Line(number, text, Record(text, record["kind"], record["run"], latest))
        except ValueError as error:
            yield Line(number, text, None, str(error), torn=not ended and not whole_in(text))


def name_of(line: bytes) -> bytes:
    """What tells a line from all others, in a few bytes: there may be hundreds of thousands."""
    return hashlib.blake2b(line, digest_size=16).digest()


def _texts(file: Path) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file, and whether each has its end. Raises JournalError where it cannot be read."""
    try:
        with open(file, "rb") as lines:
            for line in lines:
                yield line.removesuffix(b"\n"), line.endswith(b"\n")
    except OSError as error:
        raise JournalError(f"the journal {file} cannot be read: {error.strerror or error}") from None


def _last_lines(file: BinaryIO) -> list[bytes]:
    """The last lines of an open file, at least two where there are as many: its last whole line is among them.

    The last of them is empty where the file ends with a line end.
    """
    size, length = file.seek(0, os.SEEK_END), 2**16
    while True:
        file.seek(max(0, size - length))
        lines = file.read().split(b"\n")
        if length >= size or len(lines) > 3:
            return lines if length >= size else lines[1:]
        length *= 4


def _last_time(path: str | Path) -> float:
    """The time of the last record in the files of a journal; 0 where there is none that can be read."""
    latest = 0.0
    for each in files_of(path):
        with suppress(OSError, ValueError, IndexError), open(each, "rb") as file:
            latest = max(latest, _record(_last_lines(file)[-2])["time"])
    return latest
