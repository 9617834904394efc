"""The journal: results on the disk, one row (`bench.results.row`) per number, appended as soon as it is measured.

A journal is a file of JSON lines: a "run" record when a run starts, a "begin" record before a measurement, a "row" per
metric of it, "verdict" records and an "end" record when it finishes. Every record has `kind`, `run` and `time` (seconds
since the epoch), and a check value (`checksums`). Each writer has a file of its own, held by a lock: the first has
the named file, `journal.jsonl`, the next `journal.1.jsonl` and so on; readers merge them. A line is on the disk, whole,
when `append` returns: a killed run loses nothing that was finished. A line that is not what was written is refused, by
file and number; `python -m bench mend` moves it aside and keeps the rest.

Records are ordered as they were written, whatever the clock did: a writer begins behind the last record of every file,
so that `time` never falls, and of one file, which older versions may have written, the order of lines holds.

A "layers" record says what became of each layer under a recipe (`bench.results.layers`).
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from bench.errors import JournalError
from bench.results.bases import Bases, shown
from bench.results.checksums import is_sealed, opened, sealed, whole_in
from bench.results.row import MEASURED, SCHEMA, Row, checked_params
from compression.files.strict_json import exact_fields, finite_field, strict_json

JOURNAL = Path(".bench/journal.jsonl")  # of runs that were not told another
KINDS = ("run", "begin", "row", "verdict", "layers", "end")
ENDINGS = ("passed", "failed", "interrupted")
STEP_S = 1e-6  # between two records, where the clock does not tell them apart or went back
YEAR_10000 = 253_402_300_800.0  # seconds since the epoch: no calendar has later times

log = logging.getLogger(__name__)


def new_run() -> str:
    """An id for a run: the time, and what tells runs of one second apart."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


class Journal:
    """Appends records to a journal, each on the disk when `append` returns.

    Made before anything expensive: raises JournalError where the file cannot be written. Holds its file until `close`.
    """

    def __init__(self, path: str | Path, *, run: str | None = None) -> None:
        self.run = run or new_run()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._last = _last_time(path)
            self.path, self._file = self._claim(Path(path))
            self._mend()
        except OSError as error:
            raise JournalError(
                f"the journal {path} cannot be written: {error.strerror or error}; choose another with --journal FILE"
            ) from None

    @staticmethod
    def _claim(path: Path) -> tuple[Path, int]:
        mine, number = path, 0
        while True:
            file = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.exists(mine) or not os.path.samestat(os.fstat(file), os.stat(mine)):
                    os.close(file)  # it was mended since it was opened, and is another file now
                    continue
                return mine, file
            except BlockingIOError:
                os.close(file)
            except OSError:
                os.close(file)
                raise
            number += 1
            mine = path.with_name(f"{path.stem}.{number}{path.suffix}")

    def _mend(self) -> None:
        """End the last line where an earlier writer was killed within it: keep it if it is whole, else take it away."""
        with open(self._file, "rb", closefd=False) as file:
            rest, size = _last_lines(file)[-1], file.seek(0, os.SEEK_END)
        if not rest:
            return
        with suppress(ValueError):
            _record(rest)
            os.write(self._file, b"\n")
            return
        if whole_in(rest):  # not torn but damaged: left for readers to refuse
            os.write(self._file, b"\n")
            return
        log.warning("%s: took away an unfinished last line of a writer that was killed: %r", self.path, rest[:200])
        os.ftruncate(self._file, size - len(rest))

    def append(self, record: "Row | Mapping[str, Any]") -> None:
        """Write one row, or one record with a `kind`. Raises JournalError, and leaves no half line, where it cannot."""
        if isinstance(record, Row):
            record = {"kind": "row", **record.to_json()}
        self._last = max(time.time(), self._last + STEP_S)
        line = {"time": self._last, "run": self.run, **record}
        if line["run"] != self.run:
            raise JournalError(f"a record of run {line['run']!r} does not belong in the journal of run {self.run!r}")
        try:
            text = sealed(json.dumps(line, allow_nan=False))
            _record(text)
        except (TypeError, ValueError) as error:
            raise JournalError(f"record {record!r} cannot be written: {error}") from None
        size = os.fstat(self._file).st_size
        rest = memoryview(text + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise JournalError(f"the journal {self.path} cannot be written: {error.strerror or error}") from None

    def start(self, context: Mapping[str, Any]) -> None:
        """Record that the run starts: versions, command, base, fingerprint, commit, seed."""
        self.append({"kind": "run", "context": {"schema": SCHEMA, **context}})

    def end(self, status: str) -> None:
        """Record how the run ended: "passed", "failed" or "interrupted"."""
        self.append({"kind": "end", "status": status})

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FIELDS = {  # beside kind, run and time; a row has those of `Row`, a verdict what the gate says
    "run": {"context"},
    "begin": {"of", "recipe", "params", "data"},
    "end": {"status"},
}


def _record(line: bytes) -> dict[str, Any]:
    """One line as a record, without its check; raises ValueError (JournalError for a row) for what is none."""
    record = strict_json(opened(line))
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        raise ValueError(f"it is no record; its kind must be one of {', '.join(KINDS)}")
    kind = record["kind"]
    if not isinstance(record.get("run"), str) or not record["run"]:
        raise ValueError(f"run={record.get('run')!r} must be a text that is not empty")
    if not 0 <= finite_field("time", record.get("time")) < YEAR_10000:
        raise ValueError(f"time={record['time']!r} must be seconds since 1970, and before the year 10000")
    if kind in _FIELDS:
        exact_fields(record, {"kind", "run", "time", *_FIELDS[kind]})
    if kind == "run" and not isinstance(record["context"], dict):
        raise ValueError(f"context={record['context']!r} of a run must be a table of names and values")
    if kind == "end" and record["status"] not in ENDINGS:
        raise ValueError(f"status={record['status']!r} of an end must be one of {', '.join(ENDINGS)}")
    if kind == "begin":
        for name in ("of", "recipe"):
            if not isinstance(record[name], str) or not record[name]:
                raise ValueError(f"{name}={record[name]!r} of a beginning must be a text that is not empty")
        checked_params(record["params"])
    if kind == "row":
        _row(record)
    return record


def _row(record: Mapping[str, Any]) -> Row:
    try:
        return Row.from_json({name: value for name, value in record.items() if name not in ("kind", "time")})
    except JournalError as error:
        raise ValueError(str(error)) from None


def matches(row: Row, begun: Mapping[str, Any]) -> bool:
    """Whether a row is of the measurement that a "begin" record is of; parameters of its own it may have besides."""
    given = {name: value for name, value in begun["params"].items() if value is not None}.items()
    return (row.of, row.recipe) == (begun["of"], begun["recipe"]) and given <= dict(row.params).items()


class Record(Mapping[str, Any]):
    """A whole line of a journal. Its kind, run and time are at hand; all else is read from the line when it is needed,
    so that a journal of hundreds of thousands of lines fits in memory.
    """

    __slots__ = ("_bases", "_line", "kind", "run", "time")
    _read: tuple["Record", dict[str, Any]] | None = None  # the last one that was read, since fields are read in turn

    def __init__(self, line: bytes, kind: str, run: str, time: float, bases: Bases | None = None) -> None:
        self._line, self.kind, self.run, self.time, self._bases = line, sys.intern(kind), sys.intern(run), time, bases

    def told_apart(self, bases: Bases) -> "Record":
        """The record as readers of results see it (`bench.results.bases.shown`)."""
        return Record(self._line, self.kind, self.run, self.time, bases)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in ("kind", "run", "time") else self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def table(self) -> dict[str, Any]:
        """All fields; not to be changed."""
        if Record._read is None or Record._read[0] is not self:
            table = strict_json(opened(self._line)) | {"time": self.time}
            Record._read = self, table if self._bases is None else shown(table, self._bases)
        return Record._read[1]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a journal holds, all its files merged."""

    records: Sequence[Mapping[str, Any]]  # in the order in which they were written
    torn: list[str]  # "file:line" of last lines that a killed writer left unfinished
    writing: frozenset[str]  # runs whose writer is alive

    @functools.cached_property
    def bases(self) -> Bases:
        """Which record is of which base, and what each is called beside the others."""
        return Bases(self.records)

    @functools.cached_property
    def runs(self) -> Mapping[str, list[Mapping[str, Any]]]:
        """The records of each run, in the order of their first ones."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records:
            found.setdefault(record["run"], []).append(record)
        return found

    def each_row(self, run: str | None = None, *, since: float = 0.0) -> Iterator[Row]:
        """The rows, of one run or of all, those included that the run measured again later; one at a time in memory.

        Of those before `since`, a time, only what was measured.
        """
        for record in self.records if run is None else self.runs.get(run, ()):
            if record["kind"] == "row":
                row = _row(record if record.get("base_hash") else {**record, "base_hash": self.bases.of(record)[1]})
                if record["time"] >= since or row.status in MEASURED:
                    yield row

    def rows(self, run: str | None = None, *, since: float = 0.0) -> list[Row]:
        """The same, each once: of what a run measured again, as after a kill, the last."""
        found: dict[tuple[str, ...], Row] = {}
        for row in self.each_row(run, since=since):
            name = (row.run, row.base, row.recipe, row.device, row.key)
            found.pop(name, None)
            found[name] = row
        return list(found.values())

    def rows_of(self, run: str | None = None) -> list[Row]:
        """The rows of one run, by default of that of the newest row. Raises JournalError where there are none."""
        newest = (record["run"] for record in reversed(self.records) if record["kind"] == "row")
        rows = self.rows(run or next(newest, ""))
        if not rows:
            raise JournalError(
                f"the journal holds no results{f' of run {run}' if run else ''}; run pytest bench first, or give "
                "--journal FILE"
            )
        return rows


def read(path: str | Path) -> Contents:
    """Merge the files of a journal. Raises JournalError where there are none, or for a bad line, by file and number."""
    files = files_of(path)
    if not files:
        raise JournalError(
            f"there is no journal {path}; a run of the benchmarks writes one: pytest bench --journal {path}"
        )
    records: list[Record] = []
    torn, writing, seen = [], set(), set()
    for file in files:
        found = []
        for line in lines_of(file, seen):
            if line.record is not None:
                found.append(line.record)
            elif line.torn:
                torn.append(f"{file}:{line.number}")
            else:
                raise JournalError(
                    f"{file}:{line.number}: {line.why}; `python -m bench mend --journal {path}` moves what is damaged "
                    "aside and keeps everything else"
                )
        if found and _is_held(file):
            writing.add(found[-1].run)
        records += found
    records.sort(key=lambda each: each.time)
    return Contents(records=records, torn=torn, writing=frozenset(writing))


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
                raise ValueError("it has no check value, which lines before it have")
            checked = is_sealed(text)
            if (name := name_of(text)) in seen:
                raise ValueError("the same line, to the microsecond, stands before it")
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


def now(path: str | Path) -> float:
    """Seconds since the epoch, and behind every record of the journal, also where the clock went back."""
    return max(time.time(), _last_time(path) + STEP_S)


def _is_held(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class Unfinished(NamedTuple):
    """A run that can be gone on with: its id, its rows by recipe and key, and the context it started under."""

    run: str
    rows: dict[tuple[str, str], Row]
    context: dict[str, Any]


def resume(path: str | Path, run: str | None = None) -> Unfinished | None:
    """The last run that did not pass and is not being written now; or the named one, if anything is there of it.

    None where there is no such run. A run that was resumed and passed is done. Raises JournalError for a bad journal,
    and where the record of how the run began is gone, since nothing tells what its rows were measured on.
    Call it before the journal is opened for writing.
    """
    if not files_of(path):
        return None
    contents = read(path)
    endings: dict[str, str | None] = {}
    contexts: dict[str, dict[str, Any]] = {}
    for record in contents.records:
        if record["kind"] == "run":
            contexts.setdefault(record["run"], record["context"])
        if record["kind"] in ("run", "end"):
            endings.pop(record["run"], None)
        endings.setdefault(record["run"], record.get("status") if record["kind"] == "end" else None)
    if run is None:
        open_runs = [each for each, ending in endings.items() if ending != "passed" and each not in contents.writing]
        run = open_runs[-1] if open_runs else None
    if run not in endings:
        return None
    rows = {(row.recipe, row.key): row for row in contents.rows(run)}
    if run not in contexts:
        raise JournalError(
            f"the journal {path} has lost the record of how run {run} began, so nothing tells what its {len(rows)} "
            "rows were measured on; they stay in the journal: start anew without --resume"
        )
    return Unfinished(run, rows, contexts[run])
