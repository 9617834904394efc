"""The table at the end of a run: the uncompressed model beside each compressed one, ratios and verdicts."""

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench import tolerances
from bench._arguments import journal_option
from bench._baseline import fallback
from bench._errors import JournalError
from bench.bases import told_apart
from bench.journal import read
from bench.metrics import all_metrics
from bench.report import formats, settings
from bench.report._cells import number
from bench.report.tables import tables
from bench.rows import Row
from compression._recipe import UNCOMPRESSED

if TYPE_CHECKING:
    import pandas as pd

    from bench.workbench import Workbench

_MARKS = {"pass": "ok", "regressed": "REGRESSED", "invalid": "INVALID", "missing": "MISSING"}
_ABOVE = ("Efficiency", "Memory and compression", settings.TITLE)  # tables that say what stands elsewhere
_SILENT = ("no_baseline", "new", "not_comparable")


def lines(workbench: "Workbench") -> Iterable[str]:
    """The table, and below it what is not in it: why cells failed, what could not be compared, what was recorded."""
    rows = list(workbench.rows.values())
    if not rows:
        return
    options = workbench.options
    yield f"base {workbench.source.label} on {workbench.fingerprint}, gate {options.gate}"
    yield f"journal {workbench.journal.path}"
    yield table(rows, {key: verdict.outcome for key, verdict in workbench.verdicts.items()}).to_string()
    yield from (formats.text(table) for table in tables(rows) if table.title not in _ABOVE)
    noted = {"; ".join(notes) for notes in workbench.notes.values()}
    reasons = (row for row in rows if row.reason and row.reason not in noted)
    yield from dict.fromkeys(f"{row.recipe}: {row.metric} {row.status}: {row.reason}" for row in reasons)
    yield from (f"{recipe}: {note}" for recipe, notes in workbench.notes.items() for note in notes)
    grids = {row.recipe: settings.grid(row.recipe) for row in rows}
    if any(grids.values()):
        yield "grids: " + "; ".join(f"{recipe} {grid}" for recipe, grid in grids.items() if grid)
    kernels = {recipe: str(kernels) for recipe, kernels in workbench.kernels.items() if kernels}
    if kernels:
        yield "kernels: " + "; ".join(f"{recipe} {what}" for recipe, what in kernels.items())
    if "sandbox" in vars(workbench):
        yield f"sandbox: {workbench.sandbox}"
    for recipe, steps in workbench.steps.items():
        if len(steps) > 1:
            yield f"{recipe}: " + ", ".join(f"{what} {number(round(seconds, 1))} s" for what, seconds in steps)
    if not options.update and options.gate != "off":
        grouped: dict[str, list[str]] = {}
        for verdict in workbench.verdicts.values():
            grouped.setdefault(verdict.outcome, []).append(verdict.words)
        yield "gate: " + ", ".join(f"{len(words)} {outcome.replace('_', ' ')}" for outcome, words in grouped.items())
        if any(outcome in grouped for outcome in _SILENT):
            yield f"nothing to compare with for some rows; record them with: {options.record_command}"
        yield from filter(
            None, (fallback(each, workbench.fingerprint) for each in workbench.baselines.values() if each)
        )
        if said := tolerances.words(options.baselines, workbench.fingerprint):
            yield said
        for outcome in ("improved", "inconclusive", "not_comparable"):
            yield from grouped.get(outcome, [])[:8]
    if workbench.changes:
        yield f"baselines in {options.baselines}: {len(workbench.changes)} rows recorded"
        yield from workbench.changes


def table(rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str]) -> "pd.DataFrame":
    """Rows by metric and load, one column per recipe.

    A cell holds the value; for timings the base's own of the same rounds behind a slash; the ratio; what is known from
    results per item; the verdict.
    """
    import pandas as pd

    rows = list(rows)
    recipes = list(dict.fromkeys([UNCOMPRESSED, *(row.recipe for row in rows)]))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = cells.setdefault(f"{row.key} ({row.unit})" if row.unit else row.key, {})
        if row.value is None:
            cell[row.recipe] = row.status.replace("_", " ")
            continue
        parts = [number(row.value) + (" est." if row.status == "estimated" else "")]
        parts += [f"/ {number(row.base_value)}"] if row.base_samples and row.base_value is not None else []
        parts += [f"{row.ratio:.3f}x"] if row.ratio is not None else []
        parts += [_paired(row)] if row.paired else []
        mark = outcomes.get((row.recipe, row.key), "")
        parts += [_MARKS.get(mark, mark)] if mark not in _SILENT else []
        cell[row.recipe] = "  ".join(parts)
        if row.base_value is not None:
            cell.setdefault(UNCOMPRESSED, number(row.base_value) + (" est." if row.status == "estimated" else ""))
    frame = pd.DataFrame.from_dict(cells, orient="index").reindex(columns=recipes)
    if frame[UNCOMPRESSED].isna().all():
        frame = frame.drop(columns=UNCOMPRESSED)
    return frame.fillna("not measured")


def _paired(row: Row) -> str:
    """The 95 % interval of the paired difference to the base, or of the ratio where the metric is exp of the items.

    A share of answers that flipped follows, where the items are answers.
    """
    found, metric = row.paired or {}, all_metrics().get(row.metric)
    if metric is not None and metric.of_items == "exp":
        return f"[{math.exp(found['low']):.4g}, {math.exp(found['high']):.4g}]"
    shown = f"{found['difference']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}]"
    return shown + (f" {100 * found['flipped']:.3g} % flipped" if "flipped" in found else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the last run of a journal as a Markdown table: `python -m bench summary`."""
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=main.__doc__.split(":")[0])
    journal_option(parser)
    parser.add_argument("--metrics", help="names without their group, separated by commas; default all")
    options = parser.parse_args(arguments)
    try:
        rows = told_apart(read(options.journal)).rows_of()
    except JournalError as error:
        parser.error(str(error))
    if options.metrics:
        wanted = options.metrics.split(",")
        rows = [row for row in rows if row.metric.partition(".")[2] in wanted]
        if not rows:
            parser.error(f"--metrics {options.metrics}: the last run has none of these")
        rows.sort(key=lambda row: wanted.index(row.metric.partition(".")[2]))
    frame = table(rows, {})
    conditions = dict.fromkeys(row.key.partition("[")[2].rstrip("]") for row in rows if row.params)
    if len({row.metric for row in rows}) == len(frame):  # one load: said once instead of in every line
        frame.index = [re.sub(r"\[.*\]", "", str(label)) for label in frame.index]
    print(f"Base {rows[0].base} on {rows[0].device}; {'; '.join(conditions)}.\n\n{frame.to_markdown()}")
