"""The table at the end of a run: the uncompressed model beside each compressed one, ratios and verdicts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.gate import tolerances
from bench.gate.baseline import fallback
from bench.metrics import all_metrics
from bench.report import formats, settings
from bench.report.cells import number, on_one_base
from bench.report.columns import WIDTH, Line, blocks, wrapped
from bench.report.commands_to_type import settings_of
from bench.report.escaping import terminal
from bench.report.tables import tables
from bench.results.row import Row
from compression.recipes.recipe import UNCOMPRESSED

if TYPE_CHECKING:
    import pandas as pd

    from bench.session.session import Workbench

_MARKS = {"pass": "ok", "regressed": "REGRESSED", "invalid": "INVALID", "missing": "MISSING"}
_ABOVE = ("Efficiency", "Memory and compression", settings.TITLE)  # tables that say what stands elsewhere
_UNCOMPARED = ("no_baseline", "new", "not_comparable")
_TOLD = ("improved", "inconclusive")  # verdicts whose words are printed though they fail nothing
_SEVERAL = 3  # recipes or metrics that are named one by one

Parts = tuple[str, str, str, str]  # of a cell: value, ratio, what results per item tell, verdict


def lines(workbench: "Workbench", verbose: bool = False) -> Iterable[str]:
    """The table, and below it what is not in it: why cells failed, what could not be compared, what was recorded.

    Each is one line for a terminal, and the tables fit its 120 columns. `verbose` lists all that was not compared.
    """
    rows = list(workbench.rows.values())
    if not rows:
        return
    options = workbench.options
    yield terminal(f"base {workbench.source.label} on {workbench.fingerprint}, gate {options.gate}")
    yield terminal(f"journal {workbench.journal.path}")
    yield from terminal_table(rows, {key: verdict.outcome for key, verdict in workbench.verdicts.items()})
    for each in tables(rows, settings_of({"command": options.command})):
        if each.title not in _ABOVE:
            yield from ["", *formats.text(each).splitlines()]
    yield ""
    yield from map(terminal, _notes(workbench, rows))  # not broken: options and commands in them are to be copied
    if not options.update and options.gate != "off":
        yield from map(terminal, _gate(workbench, verbose))
    if workbench.changes:
        yield terminal(f"baselines in {options.baselines}: {len(workbench.changes)} rows recorded")
        yield from map(terminal, workbench.changes)


def _notes(workbench: "Workbench", rows: Sequence[Row]) -> Iterable[str]:
    """Why values are missing or must be read with care, kernels, sandbox, and what each step took."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    noted = {"; ".join(notes) for notes in workbench.notes.values()}
    for row in rows:
        if row.reason and row.reason not in noted:
            grouped.setdefault((row.status, row.reason), []).append(row)
    for (status, reason), found in grouped.items():
        metrics, recipes = (
            _named(dict.fromkeys(getattr(row, name) for row in found), f"{name}s") for name in ("metric", "recipe")
        )
        yield f"{recipes}: {metrics} {status.replace('_', ' ')}: {reason}"
    yield from (f"{recipe}: {note}" for recipe, notes in workbench.notes.items() for note in notes)
    grids = {row.recipe: settings.grid(row.recipe) for row in rows}
    if any(grids.values()):
        yield "grids: " + "; ".join(f"{recipe} {grid}" for recipe, grid in grids.items() if grid)
    kernels = {recipe: kernels for recipe, kernels in workbench.kernels.items() if kernels}
    if kernels:
        yield "kernels: " + "; ".join(
            f"{recipe} {', '.join(f'{count} {name}' for name, count in of.items())}" for recipe, of in kernels.items()
        )
    if "sandbox" in vars(workbench):
        yield f"sandbox: {workbench.sandbox}"
    for recipe, steps in workbench.steps.items():
        if len(steps) > 1:
            yield f"{recipe}: " + ", ".join(f"{what} {number(round(seconds, 1))} s" for what, seconds in steps)


def _named(names: Iterable[str], kind: str) -> str:
    names = list(names)
    shown = ", ".join(names[:_SEVERAL])
    return shown if len(names) <= _SEVERAL else f"{shown} and more ({len(names)} {kind})"


def _gate(workbench: "Workbench", verbose: bool) -> Iterable[str]:
    """What the gate compared, what it found, and in one line what it did not compare."""
    options, grouped = workbench.options, {}
    for verdict in workbench.verdicts.values():
        grouped.setdefault(verdict.outcome, []).append(verdict.words)
    left = [words for outcome in _UNCOMPARED for words in grouped.get(outcome, [])]
    yield "gate: " + ", ".join(f"{len(words)} {outcome.replace('_', ' ')}" for outcome, words in grouped.items())
    yield from filter(None, (fallback(each, workbench.fingerprint) for each in workbench.baselines.values() if each))
    if said := tolerances.words(options.baselines, workbench.fingerprint):
        yield said
    for outcome in _TOLD:
        yield from grouped.get(outcome, [])[:8]
    if left:
        yield (
            f"nothing to compare with for {len(left)} rows" + ("" if verbose else " (-v lists them)")
            + f"; record them with: {options.record_command}"
        )  # fmt: skip
        yield from left if verbose else ()


def terminal_table(rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str], width: int = WIDTH) -> list[str]:
    """Rows by group of metrics, conditions and metric, one column per recipe, in blocks of columns that fit."""
    found, words = _cells(rows, outcomes)
    recipes = list(dict.fromkeys(recipe for cells in found.values() for recipe in cells))
    recipes.sort(key=lambda recipe: recipe != UNCOMPRESSED)
    shown: list[str] = []
    for group in dict.fromkeys(label.partition(".")[0] for _, label in found):
        own = {place: cells for place, cells in found.items() if place[1].startswith(f"{group}.")}
        for heads, members in _alike(own, recipes):
            shown += [""] if shown else []
            shown += _block({place: cells for place, cells in own.items() if place[0] in heads}, members, width)
    return [*shown, *(wrapped(terminal(words), width) if words else [])]


def _alike(
    found: Mapping[tuple[str, str], Mapping[str, Parts]], recipes: Sequence[str]
) -> list[tuple[set[str], list[str]]]:
    """Recipes that were measured under the same conditions, or under some of them, with these conditions.

    Those of calibrated methods, for one, name a text that others do not read. The base stands beside all of them.
    """
    groups: list[tuple[set[str], list[str]]] = []
    of = {each: {head for (head, _), cells in found.items() if each in cells} for each in (*recipes, UNCOMPRESSED)}
    for recipe in (each for each in recipes if each != UNCOMPRESSED):
        own = of[recipe]
        for heads, members in groups:
            if own <= heads or heads <= own:
                heads |= own
                members.append(recipe)
                break
        else:
            groups += [(own, [recipe])] if own else []
    alone = of[UNCOMPRESSED].difference(*(heads for heads, _ in groups))
    beside = [(heads, [UNCOMPRESSED] * bool(heads & of[UNCOMPRESSED]) + members) for heads, members in groups]
    return ([(alone, [UNCOMPRESSED])] if alone else []) + beside


def _block(found: Mapping[tuple[str, str], Mapping[str, Parts]], recipes: Sequence[str], width: int) -> list[str]:
    """The metrics of one group; conditions stand above those that they are of."""
    sizes = {
        recipe: [max(len(cells[recipe][at]) for cells in found.values() if recipe in cells) for at in range(4)]
        for recipe in recipes
    }
    lines: list[Line] = []
    conditions = ""
    for (head, label), cells in found.items():
        if head != conditions:
            conditions = head
            lines.append((head, ()))
        lines.append((label, [_joined(cells.get(each), sizes[each]) for each in recipes]))
    return blocks([terminal(each) for each in recipes], lines, width=width)


def _joined(parts: Parts | None, sizes: Sequence[int]) -> str:
    """The parts of a cell below those of the other cells of its column."""
    if parts is None:
        return "not measured"
    value, ratio, items, verdict = parts
    shown = [value.rjust(sizes[0]), ratio.rjust(sizes[1]), items.ljust(sizes[2]), verdict.ljust(sizes[3])]
    return "  ".join(part for part, size in zip(shown, sizes, strict=True) if size)


def _cells(
    rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str]
) -> tuple[dict[tuple[str, str], dict[str, Parts]], str | None]:
    """By conditions and label of a metric the cells of recipes; and what times and memory are multiples of.

    The value, its ratio to the base, what is known from results per item, the verdict. Times and memory are ratios laid
    on one value of the base, as in the report.
    """
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(row.key, {})[row.recipe] = row
    found: dict[tuple[str, str], dict[str, Parts]] = {}
    several = False
    for key, of in grouped.items():
        laid, base = on_one_base(of)
        several = several or (base is not None and base.low != base.high)
        row = next(iter(of.values()))
        head = terminal(", ".join(f"{name}={each}" for name, each in row.params.items()))
        cells = found.setdefault((head, terminal(f"{row.metric} ({row.unit})")), {})
        for recipe, each in laid.items():
            cells[recipe] = _parts(each, outcomes.get((recipe, key), ""))
        if UNCOMPRESSED not in laid:
            beside = next((each for each in laid.values() if each.base_value is not None), None)
            if beside is not None:
                mark = " est." if beside.status == "estimated" else ""
                cells[UNCOMPRESSED] = (number(beside.base_value) + mark, "", "", "")
    words = f"times and memory: ratio to {UNCOMPRESSED}, measured in turn with each recipe, times one value of it"
    return found, words if several else None


def _parts(row: Row, outcome: str) -> Parts:
    if row.value is None:
        return row.status.replace("_", " "), "", "", ""
    value = number(row.value) + (" est." if row.status == "estimated" else "")
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}x"
    verdict = "" if outcome in _UNCOMPARED else _MARKS.get(outcome, outcome)
    return value, ratio, _paired(row) if row.paired else "", verdict


def table(rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str]) -> "pd.DataFrame":
    """Rows by metric and load, one column per recipe, with the cells of `terminal_table`."""
    import pandas as pd

    rows = list(rows)
    found, _ = _cells(rows, outcomes)
    cells = {
        f"{label} {head}".rstrip(): {recipe: "  ".join(filter(None, parts)) for recipe, parts in of.items()}
        for (head, label), of in found.items()
    }
    recipes = list(dict.fromkeys([UNCOMPRESSED, *(row.recipe for row in rows)]))
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
