"""What a run prints at its end: its table, why values are missing, what failed, and last of all the gate's verdict."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.gate import tolerances
from bench.gate.baseline import fallback
from bench.report import formats, settings
from bench.report.cells import number
from bench.report.columns import WIDTH
from bench.report.commands_to_type import settings_of
from bench.report.escaping import terminal
from bench.report.tables import tables
from bench.report.terminal_table import UNCOMPARED, cells_of, terminal_table
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED

if TYPE_CHECKING:
    import pandas as pd

    from bench.gate.verdicts import Verdict
    from bench.session.session import Workbench

_ABOVE = ("Efficiency", "Memory and compression", settings.TITLE)  # tables that say what stands elsewhere
_UNDECIDED = ("improved", "inconclusive")  # outcomes whose messages are printed though they fail nothing
_SEVERAL = 3  # recipes, metrics or messages that are printed one by one


def lines(workbench: "Workbench", verbose: bool = False, width: int = WIDTH) -> Iterator[str]:
    """The table of a run, and below it why values are missing and what was recorded; `ending` follows it.

    Each is one line for a terminal, and the tables fit `width` columns. `verbose` adds the tables of the papers, the
    grid and kernels of each recipe, and all that was recorded.
    """
    rows = list(workbench.rows.values())
    if not rows:
        return
    options = workbench.options
    yield terminal(f"base {workbench.source.label} on {workbench.fingerprint}")
    yield terminal(f"journal {workbench.journal.path}")
    yield ""
    outcomes = {key: verdict.outcome for key, verdict in workbench.verdicts.items()}
    yield from terminal_table(rows, outcomes, width, verbose=verbose)
    for each in tables(rows, settings_of({"command": options.command})):
        if each.findings or (verbose and each.title not in _ABOVE):
            yield from ["", *formats.text(each, width).splitlines()]
    notes = list(_notes(workbench, rows, verbose))
    yield from ["", *map(terminal, notes)] if notes else []  # not broken: commands in them are to be copied
    yield from map(terminal, _recorded(workbench, verbose))


def _notes(workbench: "Workbench", rows: Sequence[Row], verbose: bool) -> Iterator[str]:
    """Why values are missing or must be read with care, the sandbox; with `verbose` grids, kernels, and times."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    noted = {"; ".join(notes) for notes in workbench.notes.values()}
    for row in rows:
        if row.reason and row.reason not in noted:
            grouped.setdefault((row.status, row.reason), []).append(row)
    for (status, reason), of in grouped.items():
        metrics, recipes = (
            _named(dict.fromkeys(getattr(row, name) for row in of), f"{name}s") for name in ("metric", "recipe")
        )
        yield f"{recipes}: {metrics} {status.replace('_', ' ')}: {reason}"
    yield from _compute_dtypes(rows)
    notes = ((note, recipe) for recipe, notes in workbench.notes.items() for note in notes)
    yield from (f"{recipes}: {note}" for note, recipes in _by_text(notes))
    if "sandbox" in vars(workbench):
        yield f"sandbox: {workbench.sandbox}"
    if verbose:
        yield from _details(workbench, rows)


def _compute_dtypes(rows: Iterable[Row]) -> Iterator[str]:
    """The metrics that were computed in another dtype than the stored one."""
    dtypes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.compute_dtype:
            dtypes.setdefault(row.compute_dtype, {})[row.metric] = None
    for dtype, metrics in dtypes.items():
        yield f"{_named(metrics, 'metrics')}: computed in {dtype} with the stored weights (see --compute-dtype)"


def _details(workbench: "Workbench", rows: Iterable[Row]) -> Iterator[str]:
    """What the recipes are, which kernels compute them, and how long each step of several took."""
    if grids := list(_by_text((settings.grid(row.recipe), row.recipe) for row in rows)):
        yield "grids: " + "; ".join(f"{recipes} {grid}" for grid, recipes in grids)
    kernels = (
        (", ".join(f"{count} {name}" for name, count in of.items()), recipe) for recipe, of in workbench.kernels.items()
    )
    if shown := list(_by_text(kernels)):
        yield "kernels: " + "; ".join(f"{recipes} {text}" for text, recipes in shown)
    for recipe, steps in workbench.steps.items():
        if len(steps) > 1:
            yield f"{recipe}: " + ", ".join(f"{what} {number(round(seconds, 1))} s" for what, seconds in steps)


def _by_text(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each text once, with the recipes that it is of."""
    found: dict[str, dict[str, None]] = {}
    for text, recipe in pairs:
        if text:
            found.setdefault(text, {})[recipe] = None
    return ((text, ", ".join(recipes)) for text, recipes in found.items())


def _named(names: Iterable[str], kind: str) -> str:
    names = list(names)
    shown = ", ".join(names[:_SEVERAL])
    return shown if len(names) <= _SEVERAL else f"{shown} and more ({len(names)} {kind})"


def _recorded(workbench: "Workbench", verbose: bool) -> Iterator[str]:
    """What became of the baselines: a count per recipe, changes and rows that are gone; with `verbose` new rows too."""
    for each in workbench.proposals:
        yield f"recorded {each.summary}"
        yield from (f"  {words}" for words in (each.words if verbose else each.notable))


# --- the verdict ------------------------------------------------------------------------------------------------------


def ending(workbench: "Workbench", failing: Sequence[str] = (), verbose: bool = False) -> list[str]:
    """What the gate says of a run, its verdict last; `failing` is what fails besides, in words.

    Failed comparisons are whole in any case; what could not be compared is a count, with `verbose` a list.
    """
    verdicts, options = list(workbench.verdicts.values()), workbench.options
    besides = _besides(failing, verdicts)
    said = [f"FAILED {words}" for words in [*_grouped(each for each in verdicts if each.fails), *besides]]
    if not options.update and options.gate != "off":
        said = [*_left(workbench, verbose), *said]
    return [*map(terminal, said), terminal(_verdict(workbench, len(besides)))]


def _grouped(verdicts: Iterable["Verdict"]) -> list[str]:
    """The messages of verdicts; those that differ in the row alone, as of a measurement that failed, as one."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for each in verdicts:
        groups.setdefault((each.recipe, each.words.replace(each.key, "", 1)), []).append(each)
    return [
        of[0].words if len(of) == 1 else of[0].words.replace(of[0].key, _named([each.key for each in of], "rows"), 1)
        for of in groups.values()
    ]


def _besides(failing: Iterable[str], verdicts: Iterable["Verdict"]) -> list[str]:
    """What fails that no verdict says."""
    told = {terminal(each.words) for each in verdicts}
    found = (line for words in failing for line in words.splitlines())
    return [line for line in dict.fromkeys(found) if line.strip() and terminal(line) not in told]


def _left(workbench: "Workbench", verbose: bool) -> Iterator[str]:
    """What was not decided, and what can be compared here at all; with `verbose` what was not compared."""
    options = workbench.options
    passing = [each for each in workbench.verdicts.values() if not each.fails]
    for outcome in _UNDECIDED:
        words = [each.words for each in passing if each.outcome == outcome]
        yield from words if verbose else words[:_SEVERAL]
        if len(words) > _SEVERAL and not verbose:
            yield f"and {len(words) - _SEVERAL} more {outcome} (-v lists them)"
    if calibrated := tolerances.words(options.baselines, workbench.fingerprint):
        yield calibrated
    if verbose:
        known = (each for each in workbench.baselines.values() if each)
        yield from filter(None, (fallback(each, workbench.fingerprint) for each in known))
        yield from (each.words for each in passing if each.outcome in UNCOMPARED)
    elsewhere = sum(each.outcome in UNCOMPARED and each.records for each in workbench.verdicts.values())
    if elsewhere and any(workbench.baselines.values()):
        yield f"record a baseline of the {_rows(elsewhere)} that have none here with: {options.record_command}"


def _verdict(workbench: "Workbench", besides: int) -> str:
    """One line: how many rows passed, failed, and were not compared, and why; `besides` is what else fails."""
    verdicts, options = list(workbench.verdicts.values()), workbench.options
    fails = Counter(each.outcome.replace("_", " ") for each in verdicts if each.fails)
    fails += Counter({"besides": besides})
    failed = f"{fails.total()} failed" + (f" ({_counted(fails)})" if fails else "")
    gate = f"gate{' FAILED' if fails else ''}: "
    if options.update:
        count = len(workbench.proposals)
        recorded = f"off while recording; {count} baseline{'s' * (count != 1)} recorded in {options.baselines}"
        return gate + recorded + (f", {failed}" if fails else "")
    if options.gate == "off":
        return gate + "off, nothing was compared" + (f", {failed}" if fails else "")
    counts = Counter(each.outcome for each in verdicts if not each.fails)
    uncompared = [each for each in verdicts if each.outcome in UNCOMPARED and not each.fails]
    if not any(workbench.baselines.values()) and not fails and all(each.records for each in uncompared):
        return f"{gate}no baseline to compare {_rows(len(uncompared))} with; record one with: {options.record_command}"
    parts = [f"{counts['pass']} passed", failed]
    parts += [f"{counts[outcome]} {outcome}" for outcome in _UNDECIDED if counts[outcome]]
    if uncompared:
        causes = Counter(each.cause for each in uncompared)
        why = next(iter(causes)) if len(causes) == 1 else _counted(causes)
        parts.append(f"{len(uncompared)} not comparable ({why}; `-v` lists them)")
    return gate + ", ".join(parts)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


# --- as Markdown ------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str]) -> "pd.DataFrame":
    """Rows by metric and load, one column per recipe, with the cells of `terminal_table`."""
    import pandas as pd

    rows = list(rows)
    cells = {
        f"{each.metric} ({each.unit}) {', '.join(f'{name}={value}' for name, value in each.conditions)}".rstrip(): {
            recipe: "  ".join(filter(None, parts)) for recipe, parts in each.cells.items()
        }
        for each in cells_of(rows, outcomes)[0]
    }
    recipes = list(dict.fromkeys([UNCOMPRESSED, *(row.recipe for row in rows)]))
    frame = pd.DataFrame.from_dict(cells, orient="index").reindex(columns=recipes)
    if frame[UNCOMPRESSED].isna().all():
        frame = frame.drop(columns=UNCOMPRESSED)
    return frame.fillna("not measured")
