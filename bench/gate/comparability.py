"""One row against its baseline: whether they can be compared, and if so by which comparison."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.gate.baseline import ANYWHERE, Baseline, elsewhere
from bench.gate.comparison import (
    ELSEWHERE,
    EXACT,
    FEWEST,
    LEVEL,
    Finding,
    compare_across_dtypes,
    compare_items,
    compare_timed,
    compare_values,
)
from bench.gate.entry import Entry, conditions
from bench.gate.input_changes import inputs_changed
from bench.gate.recording import MIGRATE
from bench.metrics.registry import Metric
from bench.results import item_pairs
from bench.results.bases import OLD
from bench.results.row import ENGINE, VERSIONS, Row


class Judged(NamedTuple):
    """A row, and what it is judged by.

    Attributes:
        fingerprint: of the device.
        context: that of the run.
        command: what records a baseline.
    """

    row: Row
    metric: Metric
    baseline: Baseline
    fingerprint: str
    context: Mapping[str, Any]
    command: str

    @property
    def name(self) -> str:
        return f"{self.row.recipe}: {self.row.key}"

    @property
    def rows(self) -> Mapping[str, Entry]:
        """The recorded rows that this one may be compared with, by key."""
        section = self.baseline.sections.get(self.fingerprint if self.metric.per_device else ANYWHERE)
        return section.rows if section else {}


def compare(judged: Judged, timed: float, items: float) -> Finding:
    """What is found of a row; `timed` and `items` are levels, see `verdicts.Levels`."""
    if finding := _elsewhere(judged):
        return finding
    row, entry = judged.row, judged.rows.get(judged.row.key)
    if why := inputs_changed(row, entry, judged.rows.values()):
        return _refused(judged, f"{why}; restore it, or record it again with `{judged.command}`")
    if entry is None:
        return Finding(
            "new", f"{judged.name} is new: the baseline does not have this row; record it with `{judged.command}`",
            cause="not in the baseline", records=True,
        )  # fmt: skip
    if finding := _recorded_otherwise(judged, entry):
        return finding
    words = upgraded(entry.context["engine"], row.engine)
    found = _compared(judged, entry, timed, items, same_engine=not words)
    return found._replace(words=f"{found.words}{words}")


def _compared(judged: Judged, entry: Entry, timed: float, items: float, *, same_engine: bool) -> Finding:
    row, metric = judged.row, judged.metric
    if metric.per_device:
        return compare_timed(row, entry, metric, timed)
    now, then = judged.context.get("torch"), entry.context["torch"]
    here = same_engine and (judged.fingerprint, now) == (entry.context["fingerprint"], then)
    paired = entry.items is not None
    if paired and (row.items is None or (why := item_pairs.mismatch(row.items, entry.items))):
        why = "this run has no results per item" if row.items is None else why
        return _refused(judged, f"{why}; restore them, or record the change with `{judged.command}`",
                        "with its baseline item by item")  # fmt: skip
    if metric.kind == "deterministic" and row.compute_dtype != entry.compute_dtype:
        return compare_across_dtypes(row, entry, metric)
    exact = metric.kind == "counted" or (metric.kind == "deterministic" and here)
    if paired and not exact and (row.items.kind == "binary" or len(row.items) >= FEWEST):
        return compare_items(row, entry, metric, items)
    allowed = {"sampled": metric.rel, "counted": 0.0}.get(metric.kind, EXACT if here else ELSEWHERE)
    return compare_values(row, entry, metric, allowed, LEVEL)


def _refused(judged: Judged, why: str, with_what: str = "") -> Finding:
    words = f"{judged.name} cannot be compared{' ' * bool(with_what)}{with_what}: {why}"
    return Finding("not_comparable", words, always_fails=True)


def _elsewhere(judged: Judged) -> Finding | None:
    """A baseline of another base, or of another device alone."""
    if why := another_base(judged.baseline.base_hash, judged.context.get("base_hash"), judged.command):
        return _refused(judged, why)
    if not (judged.metric.per_device and (cause := elsewhere(judged.baseline, judged.fingerprint))):
        return None
    return Finding(
        "not_comparable",
        f"{judged.name} not compared: measured on {judged.fingerprint}, recorded on "
        f"{', '.join(judged.baseline.devices)}; record this device with `{judged.command}`",
        cause=cause, records=True,
    )  # fmt: skip


def _recorded_otherwise(judged: Judged, entry: Entry) -> Finding | None:
    """Other conditions, another metric under the name, or a value that one of the two does not have."""
    row, metric = judged.row, judged.metric
    now = conditions(judged.context, row.of) | {"seed": row.seed}
    for condition in ("data_hash", "seed"):
        if now[condition] is not None and now[condition] != entry.context[condition]:
            was = f"{condition} was {entry.context[condition]!r} when the baseline was recorded"
            way_out = f"restore it, or record the change with `{judged.command}`"
            return _refused(judged, f"{was} and is {now[condition]!r}; {way_out}")
    if why := _opened_otherwise(entry.context["engine"] or {}, row.engine or {}):
        return _refused(judged, f"{why}; restore it, or record the change with `{judged.command}`")
    for fact in ("kind", "unit", "better"):
        if getattr(entry, fact) != getattr(metric, fact):
            differ = f"{fact} is {getattr(entry, fact)!r} in the baseline and {getattr(metric, fact)!r} of the metric"
            return _refused(judged, f"{differ}; if that is intended, record it with `{judged.command}`")
    if row.status == entry.status:
        return None
    return Finding(
        "not_comparable",
        f"{judged.name} not compared: the baseline is {entry.status!r}, this run {row.status!r}: "
        f"{row.reason or 'no reason given'}",
        cause=f"{row.status} here, {entry.status} in the baseline",
    )


def _opened_otherwise(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Which of the flags that change numbers an engine has now other ones of, in words; None where it has none."""
    differ = (
        f"{name} of {now['engine']} was {then.get(name)!r} when the baseline was recorded and is {now.get(name)!r}"
        for name in ENGINE
        if then and now and then.get(name) != now.get(name)
    )
    return "; ".join(differ) or None


def upgraded(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """How the versions of an engine, and of its libraries, differ from those of a baseline; empty where they do not.

    >>> upgraded({"engine": "vllm", "version": "1"}, {"engine": "vllm", "version": "2"})
    '; measured with vllm 2, the baseline with vllm 1'
    """
    if not (then and now) or all(then.get(name) == now.get(name) for name in VERSIONS):
        return ""
    differ = [name for name in VERSIONS if then.get(name) != now.get(name)]

    def said(engine: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{engine.get('engine') if name == 'version' else name} {engine.get(name, 'unknown')}" for name in differ
        )

    return f"; measured with {said(now)}, the baseline with {said(then)}"


def another_base(then: str | None, now: str | None, command: str) -> str | None:
    """Why a baseline is of another base than the one that is measured, in words; None where it is not."""
    if None in (then, now) or then == now:
        return None
    if then.startswith(OLD):
        return MIGRATE
    return (
        f"base_hash was {then!r} when the baseline was recorded and is {now!r}: another base of that name, or this one "
        f"changed; restore it, or record this one with `{command}`"
    )
