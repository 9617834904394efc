"""The runs of a journal: what each measured, under which conditions, and how it ended."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import JournalError
from bench.machine.git import UNCLEAN
from bench.results.bases import told_apart
from bench.results.journal import read
from bench.results.records import Contents
from bench.results.row import Row


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the benchmarks."""

    name: str
    time: float  # of its first record, in seconds since the epoch
    context: Mapping[str, Any]  # of its start; data that was read later is added to its `data_hash`
    ending: str | None  # passed, failed or interrupted; None where it was killed, or still runs
    rows: tuple[Row, ...]
    failing: tuple[str, ...]  # words of the verdicts that are no pass

    @property
    def commit(self) -> str | None:
        """The commit that was measured, without the mark of changed files."""
        found = self.context.get("commit")
        return found.removesuffix(UNCLEAN) if isinstance(found, str) else None

    @property
    def unclean(self) -> bool:
        """Whether tracked files differed from the commit."""
        return str(self.context.get("commit") or "").endswith(UNCLEAN)


def runs_of(path: str | Path, *, apart: bool = False) -> Iterator[Run]:
    """The runs that have rows, oldest first, one at a time in memory.

    `apart`: as readers see them (`results.bases`), not as they were written. Raises JournalError as `journal.read`
    does, at the first one.
    """
    contents = told_apart(read(path)) if apart else read(path)
    for name in _names(contents):
        yield _run(name, contents)


def last_run(path: str | Path, name: str | None = None) -> Run:
    """The newest run of a journal, or the one of that name. Raises JournalError where there is none."""
    contents = read(path)
    found = _names(contents)
    wanted = [each for each in found if name in (None, each)]
    if not wanted:
        known = ", ".join(found[-5:])
        raise JournalError(
            f"{path} has no run {name!r}; its last are {known}"
            if name and known
            else f"{path} holds no results; run pytest bench first, or give --journal FILE"
        )
    return _run(wanted[-1], contents)


def _names(contents: Contents) -> list[str]:
    """Runs that have rows, in the order of their first ones."""
    return list(dict.fromkeys(each["run"] for each in contents.records if each["kind"] == "row"))


def _run(name: str, contents: Contents) -> Run:
    records = contents.runs[name]
    context: dict[str, Any] = {}
    for each in records:
        if each["kind"] == "run" and isinstance(each.get("context"), dict):
            data = {**(context.get("data_hash") or {}), **(each["context"].get("data_hash") or {})}
            context = context | each["context"] | {"data_hash": data}
        if each["kind"] == "begin" and each.get("data") is not None:  # of one kind of measurement
            context = {**context, "data_hash": {**(context.get("data_hash") or {}), each["of"]: each["data"]}}
    endings = [each["status"] for each in records if each["kind"] == "end"]
    bad = ("regressed", "invalid", "missing")
    words = [each.get("words", "") for each in records if each["kind"] == "verdict" and each.get("outcome") in bad]
    return Run(
        name=name,
        time=records[0]["time"],
        context=context,
        ending=endings[-1] if endings else None,
        rows=tuple(contents.rows(name)),
        failing=tuple(words),
    )
