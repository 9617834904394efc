"""The records of a task file (JSON, JSONL or CSV), each with its position."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.errors import DataError
from compression.files.text import decoded, lines_of_json, loads

Record = dict[str, Any]
TEXTS = list[str]  # a column of texts


def text_of(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return decoded(data, str(path), DataError)


def records_of(path: Path, **columns: Any) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) of a JSON or JSONL file, with columns of these types."""
    if ".json" in path.suffixes and ".jsonl" not in path.suffixes:
        whole = loads(text_of(path), str(path), DataError)
        whole = whole.get("examples", whole.get("data", whole)) if isinstance(whole, dict) else whole
        if not isinstance(whole, list):
            raise DataError(f"{path}: expected a list of records, got a {type(whole).__name__}")
        records: Iterable[tuple[str, Any]] = (
            (f"{path}: row {number}", record) for number, record in enumerate(whole, 1)
        )
    else:
        records = lines_of_json(text_of(path), str(path), DataError)
    for where, record in records:
        yield where, checked(where, record, columns)


def checked(where: str, record: Any, columns: dict[str, Any]) -> Record:
    """A record that has these columns, of these types."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a record, got a {type(record).__name__}")
    if missing := [name for name in columns if name not in record]:
        raise DataError(f"{where}: expected the columns {', '.join(columns)}, found {', '.join(sorted(record))}; "
                        f"{', '.join(missing)} missing")  # fmt: skip
    for name, kind in columns.items():
        if not _is_of(record[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join("a list of texts" if k == TEXTS else k.__name__ for k in kinds)
            raise DataError(f"{where}: expected {name} to be {wanted}, found {record[name]!r:.60}")
    return record


def _is_of(value: Any, kind: Any) -> bool:
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def cells_of(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where it ends, cells) of the rows of a CSV file."""
    reader = csv.reader(io.StringIO(text_of(path), newline=""))
    try:
        for cells in reader:
            yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: expected CSV: {error}") from error
