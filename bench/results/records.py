"""Records of a journal as values, read when they are looked at, and all of them as `Contents`."""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import JournalError
from bench.results.bases import Bases, shown
from bench.results.checksums import opened
from bench.results.row import MEASURED, RUN_BY, Row, checked_params
from compression.files.strict_json import exact_fields, finite_field, strict_json

KINDS = ("run", "begin", "row", "verdict", "layers", "end")
ENDINGS = ("passed", "failed", "interrupted")
_FIELDS = {  # beside kind, run and time; a row has those of `Row`, a verdict what the gate says
    "run": {"context"},
    "begin": {"of", "recipe", "params", "data"},
    "end": {"status"},
}


def _record(line: bytes) -> dict[str, Any]:
    """One line as a record, without its check; raises ValueError (JournalError for a row) for what is none."""
    record = strict_json(opened(line))
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        raise ValueError(f"it is not a record; its kind must be one of {', '.join(KINDS)}")
    kind = record["kind"]
    if not isinstance(record.get("run"), str) or not record["run"]:
        raise ValueError(f"run must be a non-empty string, not {record.get('run')!r}")
    if not 0 <= finite_field("time", record.get("time")) < YEAR_10000:
        raise ValueError(f"time must be seconds since 1970, and before the year 10000, not {record['time']!r}")
    if kind in _FIELDS:
        exact_fields(record, {"kind", "run", "time", *_FIELDS[kind]})
    if kind == "run" and not isinstance(record["context"], dict):
        raise ValueError(f"context={record['context']!r} of a run must be a table of names and values")
    if kind == "end" and record["status"] not in ENDINGS:
        raise ValueError(f"status={record['status']!r} of an end must be one of {', '.join(ENDINGS)}")
    if kind == "begin":
        for name in ("of", "recipe"):
            if not isinstance(record[name], str) or not record[name]:
                raise ValueError(f"{name} of a beginning must be a non-empty string, not {record[name]!r}")
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
    """Whether a row is of the measurement that a "begin" record is of; parameters of its own it may have besides, but
    for what ran the model."""
    given = {name: value for name, value in begun["params"].items() if value is not None}
    same = all(given.get(name) == row.params.get(name) for name in RUN_BY)
    return same and (row.of, row.recipe) == (begun["of"], begun["recipe"]) and given.items() <= dict(row.params).items()


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
                f"the journal has no results{f' of run {run}' if run else ''}; run pytest bench first, or give "
                "--journal FILE"
            )
        return rows


YEAR_10000 = 253_402_300_800.0  # seconds since the epoch: no calendar has later times
