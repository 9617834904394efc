"""The gate: compares measured rows with recorded ones; every verdict comes with a message.

| kind          | compared                                                                                    |
| ------------- | ------------------------------------------------------------------------------------------- |
| counted       | exactly                                                                                     |
| deterministic | exactly (1e-9) on the same device, torch and engine, else to 1e-3; where the other was      |
|               | computed in another dtype, to the metric's `rel` and `dtype_floor`                          |
| sampled       | to the metric's `rel`                                                                       |
| timing,       | on the same device only: the ratio to the base of the same run to `rel`, and the value      |
| memory        | itself to `rel_absolute`; beyond the tolerance, but not surely so: inconclusive             |

What is not compared exactly, and has results per item here and in the baseline, is compared by the paired test of
`statistics.paired` instead of by a tolerance: a difference is a change where p is at most its level and, for what is
deterministic, above ELSEWHERE_PAIRED. It is *inconclusive* where it is beyond the tolerance and the test does not see
it. Other items than the recorded are not comparable, which fails. Fewer than FEWEST reals, of which no test can be
sure, are compared by tolerance.

Times and memory with samples are compared by their rounds (`timing_change`): times by the undisturbed ones or by pairs
of neighbours, memory by all. A change is one where the interval lies wholly beyond the tolerance. Where that is not
sure, or was not so the time before, more rounds are taken (MORE); a change is believed at the second look in succession
that sees it, or at the last.

An unchanged run raises an alarm with probability LEVEL at most, however many rows it has. Half of that is for rows with
samples, half for rows with results per item, so that many timings do not blunt the tests of quality. Within each every
row gets an equal share, on either side, in every check (a timed row has two: its ratio and its value), at every look at
which a change can be believed, by either estimate (Bonferroni's way, which holds for rows that depend on each other).
Their number is that of the rows recorded for the run's recipes (`levels`), which is known before anything is measured:
no verdict depends on rows that come later. Rows without samples or items are compared by their tolerance.

A row of time or memory without a ratio, as all of the base's are, is compared by itself alone. Tolerances are shares of
the recorded number, in the worse direction. Where neither direction is better, a failed exact comparison is a
regression, and nothing else is. No difference up to the metric's `floor` is a change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench.errors import OptionError
from bench.gate.baseline import ANYWHERE, Baseline, Section, gone, slug, unusable
from bench.gate.comparability import Judged, compare
from bench.gate.comparison import (
    AGAINST,
    LEVEL,
    MORE,
    Finding,
    checks_of,
    one_sided,
)
from bench.gate.entry import Entry
from bench.gate.input_changes import COUNTS
from bench.gate.recording import MIGRATE, Proposal, record, update
from bench.metrics import Metric, all_metrics
from bench.results.row import Row

__all__ = [
    "AGAINST", "MIGRATE", "MODES", "MORE", "Baseline", "Proposal", "Verdict", "checks_of", "enough_rounds", "judge",
    "judge_beside", "levels", "missing", "one_sided", "record", "slug", "update", "verdicts",
]  # fmt: skip

RECORD = "pytest bench --update-baselines"
SECONDS = 120.0  # that timing with more rounds, and recording, may take for one measurement; the usual rounds any time

_ALWAYS = frozenset({"regressed", "missing", "invalid"})
MODES = {  # what fails
    "auto": _ALWAYS,
    "strict": _ALWAYS | {"improved", "new", "no_baseline", "not_comparable"},
    "off": frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says of one row."""

    recipe: str
    key: str
    outcome: str  # pass, improved, regressed, inconclusive, not_comparable, new, missing, invalid or no_baseline
    words: str
    fails: bool
    cause: str = ""  # why it was not compared, in a few words that rows have in common
    records: bool = False  # whether a baseline that is recorded here makes it comparable


class Levels(NamedTuple):
    """The chance of an alarm, on either side, that one unchanged row may take."""

    timed: float
    items: float


ALONE = Levels(timed=LEVEL, items=LEVEL)


def verdicts(
    rows: Iterable[Row],
    baselines: Mapping[str, Baseline | None],
    *,
    mode: str,
    fingerprint: str,
    context: Mapping[str, Any],
    command: str = RECORD,
    metrics: Mapping[str, Metric] | None = None,
) -> list[Verdict]:
    """All that the gate says of a run: each row judged, rows that are there twice, and recorded rows that are missing.

    `baselines` is by recipe, None where nothing is recorded; the rest is as for `judge`.
    """
    metrics = all_metrics() if metrics is None else metrics
    shares = levels(baselines.values(), fingerprint, context)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.recipe, row.key), []).append(row)
    found = []
    for (recipe, key), (row, *others) in groups.items():
        if others:
            values = ", ".join(str(each.value) for each in (row, *others))
            words = f"{recipe}: {key} occurs {1 + len(others)} times: {values}; a run must measure a row once"
            found.append(_verdict(recipe, key, Finding("invalid", words), mode))
        else:
            found.append(
                judge(
                    row,
                    baselines.get(recipe),
                    mode=mode,
                    fingerprint=fingerprint,
                    context=context,
                    command=command,
                    metrics=metrics,
                    shares=shares,
                )
            )
    measured = [row for group in groups.values() for row in group]
    for baseline in baselines.values():
        if baseline and mode != "off":
            found += missing(measured, baseline, fingerprint, mode=mode, command=command)
    return found


def judge(
    row: Row,
    baseline: Baseline | None,
    *,
    mode: str,
    fingerprint: str,
    context: Mapping[str, Any],
    command: str = RECORD,
    metrics: Mapping[str, Metric] | None = None,
    shares: Levels = ALONE,
) -> Verdict:
    """The verdict on one row. Raises OptionError for an unknown mode.

    `baseline` is that of the row's base and recipe, None where nothing is recorded. `context` holds `base_hash`,
    `data_hash` (None where the row uses no data, or a table by kind of measurement) and `torch`; `command` is what
    records a baseline; `shares` are those of `levels`, ALONE those of a run of one row.
    """
    metrics = all_metrics() if metrics is None else metrics
    metric = metrics.get(row.metric)
    if row.status == "not_available":
        finding = _not_available(row, None if mode == "off" else baseline, fingerprint, command)
    elif why := unusable(row, metric, fingerprint):
        finding = Finding("invalid", f"{row.recipe}: {row.key} is invalid: {why}")
    elif mode == "off":
        finding = Finding("not_comparable", f"{row.recipe}: {row.key} not compared: --gate off", cause="gate off")
    elif baseline is None:
        words = f"{row.recipe}: {row.key}: no baseline to compare with; record one of {row.recipe} with `{command}`"
        finding = Finding("no_baseline", words, cause="without a baseline", records=True)
    else:
        finding = compare(Judged(row, metric, baseline, fingerprint, context, command), shares.timed, shares.items)
    return _verdict(row.recipe, row.key, finding, mode)


def judge_beside(
    row: Row, *, level: float, mode: str, fingerprint: str, context: Mapping[str, Any], metrics: Mapping[str, Metric]
) -> Verdict:
    """The verdict on a row of which the base is another state of the code, measured in turn: its samples are compared.

    `level` is the chance of an alarm that it may take. An improvement fails in no mode: there is nothing to record.
    """
    then = None
    if row.base_value is not None:
        entry = replace(
            row, value=row.base_value, samples=row.base_samples, ratio=None, base_value=None, base_samples=()
        )
        entry = Entry.of_row(entry, metrics[row.metric], context, fingerprint)
        section = Section(context=dict(context) | {"fingerprint": fingerprint}, rows={row.key: entry})
        then = Baseline(base=row.base, recipe=row.recipe, sections={fingerprint: section})
    return judge(
        row, then, mode="off" if mode == "off" else "auto", fingerprint=fingerprint, context=context, metrics=metrics,
        shares=Levels(timed=level, items=LEVEL),
    )  # fmt: skip


def levels(baselines: Iterable[Baseline | None], fingerprint: str, context: Mapping[str, Any]) -> Levels:
    """What a row's share of LEVEL is in a run on these baselines: half is for samples, half for results per item.

    All recorded rows of the recipes count that a test can decide, measured in this run or not.
    """
    here = (fingerprint, context.get("torch"))
    timed = tested = 0
    for section in (
        baseline.sections[place]
        for baseline in baselines
        if baseline is not None
        for place in (fingerprint, ANYWHERE)
        if place in baseline.sections
    ):
        for entry in section.rows.values():
            exact = entry.kind == "counted" or (
                entry.kind == "deterministic"
                and entry.context["engine"] is None  # which of an engine's rows are is known when it is started
                and here == (entry.context["fingerprint"], entry.context["torch"])
            )
            timed += bool(entry.samples) and entry.better != "neither"
            tested += entry.items is not None and not exact
    return Levels(timed=LEVEL / 2 / max(1, timed), items=LEVEL / 2 / max(1, tested))


def enough_rounds(found: Iterable[Verdict], before: Iterable[Verdict]) -> bool:
    """Whether no more rounds are needed: nothing is inconclusive, and what has changed had done so the time before."""
    seen = {(each.key, each.outcome) for each in before}
    return not any(
        each.outcome == "inconclusive"
        or (each.outcome in ("regressed", "improved") and (each.key, each.outcome) not in seen)
        for each in found
    )


def missing(
    rows: Iterable[Row], baseline: Baseline, fingerprint: str, *, mode: str = "auto", command: str = RECORD
) -> list[Verdict]:
    """Recorded rows whose measurement was made again, with the same parameters, but which are not among its rows."""
    return [
        _verdict(
            baseline.recipe,
            key,
            Finding(
                "missing",
                f"{baseline.recipe}: {key} is in the baseline but was not measured, although the rest of its "
                "measurement "
                f"was; if it was removed on purpose, record that with `{command}`",
            ),
            mode,
        )
        for _, key in gone(rows, baseline, fingerprint)
    ]


def _verdict(recipe: str, key: str, finding: Finding, mode: str) -> Verdict:
    if mode not in MODES:
        raise OptionError(f"gate mode must be one of {', '.join(MODES)}, not {mode!r}")
    fails = finding.outcome in MODES[mode] or finding.always_fails
    return Verdict(
        recipe=recipe, key=key, outcome=finding.outcome, words=finding.words, fails=fails, cause=finding.cause,
        records=finding.records,
    )  # fmt: skip


def _not_available(row: Row, baseline: Baseline | None, fingerprint: str, command: str) -> Finding:
    words = f"{row.recipe}: {row.key} is not available here: {row.reason}"
    recorded = baseline is not None and any(
        _would_be(row, entry)
        for place in (fingerprint, ANYWHERE)
        if place in baseline.sections
        for entry in baseline.sections[place].rows.values()
    )
    if recorded:
        words += f"; the baseline has it; if it was removed on purpose, record that with `{command}`"
    return Finding("not_comparable", words, always_fails=recorded, cause="not available here")


def _would_be(row: Row, entry: Entry) -> bool:
    """Whether a row without a value is the recorded one: what was read, and in what batches, a reading alone says."""
    late = {*COUNTS, "batch"} - set(row.params)
    known = {name: value for name, value in entry.params.items() if name not in late}
    return row.metric == entry.metric and dict(row.params) == known
