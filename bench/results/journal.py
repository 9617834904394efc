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
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench.errors import JournalError
from bench.results.checksums import sealed, whole_in
from bench.results.journal_files import _last_lines, _last_time, files_of, lines_of
from bench.results.records import Contents, Record, _record
from bench.results.row import SCHEMA, Row

JOURNAL = Path(".bench/journal.jsonl")  # of runs that were not told another
STEP_S = 1e-6  # between two records, where the clock does not tell them apart or went back

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
        log.warning("%s: removed an unfinished last line of a writer that was killed: %r", self.path, rest[:200])
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


def read(path: str | Path) -> Contents:
    """Merge the files of a journal. Raises JournalError where there are none, or for a bad line, by file and number."""
    files = files_of(path)
    if not files:
        raise JournalError(
            f"the journal {path} does not exist; a benchmark run writes it: pytest bench --journal {path}"
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
                    f"{file}:{line.number}: {line.why}; `python -m bench mend --journal {path}` moves damaged lines "
                    "aside and leaves all others in place"
                )
        if found and _is_held(file):
            writing.add(found[-1].run)
        records += found
    records.sort(key=lambda each: each.time)
    return Contents(records=records, torn=torn, writing=frozenset(writing))


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
            "rows were measured on; they stay in the journal: start a new run without --resume"
        )
    return Unfinished(run, rows, contexts[run])
