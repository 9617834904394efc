"""The tables of the papers from rows of a journal: values with their units, intervals, and why there is none.

Times and memory are each recipe's ratio to the base of the same run, laid on one value of the base (`_cells.choose`).
A number in brackets is a 95 % interval (`_cells.interval`): where it comes from results per item, the two models differ
if it leaves the base's value out. The best of the compressed models in a column is marked. A paper's own figures stand
among the lines only where the base is the paper's; else apart from them (`Table.elsewhere`).
"""

from collections.abc import Iterable, Mapping, Sequence

from bench.metrics import all_metrics
from bench.report import orders as orderings
from bench.report.cells import (
    GIVEN,
    Cell,
    Chosen,
    Notes,
    Way,
    by_ratio,
    cell_of,
    choose,
    is_ranked,
    mark_best,
    number,
    of_one_model,
    with_base,
)
from bench.report.commands_to_type import SHORTENED, measuring
from bench.report.layout import FAMILIES, JUDGED, ORDERED, Column, Layout, family_of, layouts, requested, served
from bench.report.order_tables import beginnings, orders
from bench.report.papers import PAPERS, Paper
from bench.report.recipe_lists import ALL
from bench.report.settings import HEADS, TITLE, cells
from bench.report.table import NOT_MEASURED, Line, Table
from bench.results.bases import label_of
from bench.results.row import NATIVE, Param, Row
from compression.recipes.recipe import UNCOMPRESSED

OTHERS = "{} values of these recipes with other calibration text, teachers or tasks are in the results only."
_PERPLEXITY = "quality.perplexity"
_PLANTED = (
    "The spread of channels in the reference, which makes rounding fail, is artificial: rtn costs it what is published "
    "for Llama-2-7B at 3 bits (0.20 nat), and a third of that at 4 (0.05 nat published)."
)
__all__ = ["GIVEN", "NOT_MEASURED", "Cell", "Line", "Table", "by_device", "newest", "tables"]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows of several runs, in order of time, the last of each base, recipe, device and key."""
    found: dict[tuple[str | None, ...], Row] = {}
    for row in rows:
        place = (row.base, row.base_hash, row.recipe, row.device, row.key)
        found.pop(place, None)
        found[place] = row
    return list(found.values())


def by_device(rows: Iterable[Row]) -> Mapping[tuple[str, str], list[Row]]:
    """Rows by base and device, each of which has tables of its own.

    Raises ValueError where rows of several bases have one name: `bench.results.bases` tells them apart.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    hashes: dict[str, str | None] = {}
    for row in rows:
        if hashes.setdefault(row.base, row.base_hash) != row.base_hash:
            raise ValueError(f"{row.base} is the name of several bases: {hashes[row.base]}, {row.base_hash}")
        found.setdefault((row.base, row.device), []).append(row)
    return found


def tables(rows: Iterable[Row], settings: Sequence[str] = ()) -> list[Table]:
    """The tables in order of the families: those of which anything was measured, or was tried to be.

    `settings` are the options of the commands that measure more (`commands.settings_of`).
    Raises ValueError for rows of several bases or devices, RecipeError for a recipe that is unknown.
    """
    rows = newest(rows)
    if len(by_device(rows)) > 1:
        raise ValueError("rows of one table must be of one base and device")
    found = dict.fromkeys(row.recipe for row in rows if row.recipe != UNCOMPRESSED)
    place = {recipe: at for at, recipe in enumerate(ALL)}
    measured = sorted(found, key=lambda recipe: place.get(recipe, len(place)))
    known = _Known(rows, settings)
    made: list[Table | None] = []
    for family in FAMILIES:
        lines = _recipes(family, measured, rows)
        if lines or (not measured and family == FAMILIES[0]):  # the base alone has its line in the first family
            further = [served(family), requested(family)] if any(row.runtime != NATIVE for row in rows) else []
            made += [_table(layout, [UNCOMPRESSED, *lines], known) for layout in (*layouts(family), *further)]
            made += [_settings(family, lines)] if lines else []
    judged = {row.recipe for row in rows if row.metric.startswith("judge.")}
    ordered = list(filter(_is_order, measured))
    steps = {step for recipe in ordered for step in orderings.steps_of(recipe)}
    wanted = {*judged, *ordered, *steps, *orderings.controls(steps)}
    if lines := [recipe for recipe in measured if recipe in wanted]:
        made += [_table(layout, [UNCOMPRESSED, *lines], known) for layout in JUDGED]
    return [table for table in made if table is not None] + orders(known.choose, known.command)


def _settings(family: str, recipes: Sequence[str]) -> Table:
    """What the recipes are, with the parameters that their texts leave out."""
    lines = tuple(Line(name=recipe, recipe=recipe, cells=cells(recipe)) for recipe in recipes)
    return Table(number="S0", title=TITLE, family=family, columns=HEADS, lines=lines)


class _Known:
    """The rows by metric, the base that they are of, and the settings of commands that measure more."""

    def __init__(self, rows: Sequence[Row], settings: Sequence[str]) -> None:
        self._settings = settings
        self.base = next((label_of(row.base, row.base_hash) for row in rows), "reference")
        self.others = len(rows) - len(of_one_model(rows))
        self._rows: dict[str, list[Row]] = {}
        for row in with_base(rows):
            self._rows.setdefault(row.metric, []).append(row)

    def choose(self, column: Column, by: Sequence[str] = ()) -> Chosen:
        return choose(column, by, self._rows.get(column.metric, []))

    def command(self, markers: Iterable[str], recipes: Iterable[str]) -> str:
        return measuring(markers, recipes, self.base, self._settings)


def _recipes(family: str, measured: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The lines of a family; before orders their single steps, and no beginnings that nothing else is known of."""
    own = [recipe for recipe in measured if family_of(recipe) == family]
    if family != ORDERED:
        return own
    known = {recipe: {row.of for row in rows if row.recipe == recipe} for recipe in own}
    first = beginnings(own)
    own = [recipe for recipe in own if recipe not in first or known[recipe] - {"artefact", "perplexity"}]
    steps = {step for recipe in own if _is_order(recipe) for step in orderings.steps_of(recipe)}
    return [recipe for recipe in measured if recipe in steps] + own


def _is_order(recipe: str) -> bool:
    return len(orderings.steps_of(recipe)) > 2


def _table(layout: Layout, recipes: Sequence[str], known: _Known) -> Table | None:
    chosen = {column: known.choose(column, layout.by) for column in layout.columns}
    spreads = {
        column: known.choose(Column(head="", metric=column.spread), layout.by).rows
        for column in layout.columns if column.spread
    }  # fmt: skip
    if layout.partial:
        measured = {recipe for choice in chosen.values() for recipe, _ in choice.rows}
        recipes = [recipe for recipe in recipes if recipe in measured]
    if not any(recipe in recipes for choice in chosen.values() for recipe, _ in choice.rows):
        return None
    places = _places(recipes, chosen.values())
    notes, command = Notes(), known.command(dict.fromkeys(column.marker for column in layout.columns), recipes)
    missing: dict[str, list[str]] = {}
    lines: dict[tuple[str, Way], list[Cell]] = {}
    for recipe, way in places:
        lines[recipe, way] = []
        for column, choice in chosen.items():
            row = _covered(choice.rows, recipe, way)
            if row is None:
                missing.setdefault(column.marker, []).append(recipe)
                lines[recipe, way].append(Cell(text=NOT_MEASURED))
            else:
                spread = _covered(spreads.get(column, {}), recipe, way)
                lines[recipe, way].append(cell_of(column, row, notes, spread))
    better = [_better(column, choice) for column, choice in chosen.items()]
    marked: dict[tuple[str, Way], tuple[Cell, ...]] = {}
    for way in {way for _, way in places}:
        marked |= mark_best({key: cells for key, cells in lines.items() if key[1] == way and key[0] != UNCOMPRESSED},
                            better)  # fmt: skip
    several = len({way for _, way in places}) > 1
    shown = [
        Line(name=recipe + (_spelled(layout.by, way) if several else ""), recipe=recipe,
             cells=marked.get((recipe, way), tuple(lines[recipe, way])))
        for recipe, way in places
    ]  # fmt: skip
    metrics = {column.metric for column in layout.columns}
    shown, elsewhere, remark = _beside(layout, shown, known.base, notes)
    remarks = [
        *filter(None, [by_ratio(chosen)]),
        *_unranked(chosen, recipes),
        *_conditions(chosen, () if several else layout.by),
        *([OTHERS.format(known.others)] if known.others else []),
        *([_PLANTED] if known.base == "reference" and layout.family == FAMILIES[0] and _PERPLEXITY in metrics else []),
        *_absent(missing, known),
        *([SHORTENED] if "…/" in command else []),
        *filter(None, [remark]),
    ]
    return Table(
        number=layout.number, title=layout.title, family=layout.family,
        columns=tuple(column.head for column in layout.columns), lines=tuple(shown), elsewhere=tuple(elsewhere),
        notes=tuple(notes.texts), remarks=tuple(remarks), command=command,
    )  # fmt: skip


# --- lines and ways ---------------------------------------------------------------------------------------------------


def _covers(general: Way, way: Way) -> bool:
    """Whether rows of one way, which may leave parameters open, belong on the lines of another."""
    return all(one is None or one == other for one, other in zip(general, way, strict=True))


def _places(recipes: Sequence[str], chosen: Iterable[Chosen]) -> list[tuple[str, Way]]:
    """The lines: for each recipe its ways; the first way of all for one that has none."""
    found = [key for each in chosen for key in each.rows]
    ways = dict.fromkeys(way for _, way in found)
    ways = [way for way in ways if not any(_covers(way, other) for other in ways if other != way)]
    have = set(found)
    places = []
    for recipe in recipes:
        own = [way for way in ways if (recipe, way) in have]
        places += [(recipe, way) for way in own or ways[:1]]
    return places


def _covered(rows: Mapping[tuple[str, Way], Row], recipe: str, way: Way) -> Row | None:
    found = (row for (name, general), row in rows.items() if name == recipe and _covers(general, way))
    return next(found, None)


def _spelled(by: Sequence[str], way: Way) -> str:
    """What tells the lines of one recipe apart: (greedy), (batch 2, eager)."""
    shown = [each if isinstance(each, str) else f"{name} {each}" for name, each in zip(by, way, strict=True)]
    return f" ({', '.join(shown)})"


def _better(column: Column, choice: Chosen) -> str:
    metric = all_metrics().get(column.metric)
    return next((row.better for row in choice.rows.values()), metric.better if metric else "neither")


# --- what is said beside the lines ------------------------------------------------------------------------------------


def _unranked(chosen: Mapping[Column, Chosen], recipes: Sequence[str]) -> list[str]:
    """Which values are no multiples of the base's, and so cannot be compared with each other."""
    heads = [
        column.head
        for column, choice in chosen.items()
        if any(recipe in recipes and row.value is not None and not is_ranked(row)
               for (recipe, _), row in choice.rows.items())
    ]  # fmt: skip
    return (
        [f"{', '.join(heads)}: measured without a ratio, at different times, and therefore not ranked."]
        if heads
        else []
    )


def _conditions(chosen: Mapping[Column, Chosen], by: Sequence[str]) -> list[str]:
    """Under what the columns were measured, `by` included, and what else there is."""
    heads: dict[str, list[str]] = {}
    for column, choice in chosen.items():
        called = {(name, each.key): each.name for row in choice.rows.values() for name, each in row.inputs.items()}
        for way, conditions in choice.conditions.items():
            alike = [(name, value) for name, value in zip(by, way, strict=False) if value is not None]
            text = ", ".join(f"{name}={_called(name, value, called)}" for name, value in (*alike, *conditions))
            if text and column.head not in heads.setdefault(text, []):
                heads[text].append(column.head)
    said = []
    if heads:
        whole = [text for text, of in heads.items() if len(of) == len(chosen)]
        parts = [f"{', '.join(of)}: {text}" for text, of in heads.items() if text not in whole]
        said.append("Conditions: " + "; ".join([*whole, *parts]) + ".")
    left_out = sum(choice.left_out for choice in chosen.values())
    if left_out:
        others = sorted({recipe for choice in chosen.values() for recipe, _ in choice.other})
        alone = f"; {', '.join(others)} under those alone" if others else ""
        said.append(f"{left_out} values under other conditions are in the results only{alone}.")
    return said


def _called(name: str, value: Param, called: Mapping[tuple[str, Param], str]) -> str:
    """A parameter as people read it: before a digest what that is of."""
    what = called.get((name, value))
    return f"{what} ({value})" if what not in (None, value) else _plain(value)


def _plain(value: Param) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _absent(missing: Mapping[str, Sequence[str]], known: _Known) -> list[str]:
    """The commands that measure what was not."""
    return [
        f"{NOT_MEASURED}: `{known.command([marker], dict.fromkeys(recipes))}` measures it."
        for marker, recipes in missing.items()
    ]


def _beside(
    layout: Layout, lines: Sequence[Line], base: str, notes: Notes
) -> tuple[list[Line], list[Line], str | None]:
    """Our lines with the paper's among them, the paper's lines of another base, and what to say of these."""
    paper = PAPERS.get(layout.number[0])
    if paper is None:
        return list(lines), [], None
    shown: list[Line] = []
    elsewhere: list[Line] = []
    for place, line in enumerate(lines):
        shown.append(line)
        if place + 1 < len(lines) and lines[place + 1].recipe == line.recipe:
            continue  # behind the last line of the recipe
        for same, into in ((True, shown), (False, elsewhere)):
            columns = [column for column in layout.columns if paper.is_of(base, column.marker) == same]
            if set(paper.figures.get(line.recipe, {})) & {column.head for column in columns}:
                into.append(_reported(paper, line.recipe, layout, columns, notes))
    remark = (
        f"[{paper.name}] used another base, {paper.base}, on another device: its figures are shown apart from ours."
    )
    return shown, elsewhere, remark if elsewhere else None


def _reported(paper: Paper, recipe: str, layout: Layout, columns: Sequence[Column], notes: Notes) -> Line:
    figures, cells = paper.figures[recipe], []
    for column in layout.columns:
        value = figures.get(column.head) if column in columns else None
        doubt = paper.doubt(recipe, column.head) if value is not None else None
        cells.append(Cell(text="not reported" if value is None else number(value), value=value,
                          note=notes.place(f"[{paper.name}]: {doubt}") if doubt else None))  # fmt: skip
    name = f"{recipe}, [{paper.name}] on {paper.base}, {paper.device}"
    return Line(name=name, recipe=recipe, cells=tuple(cells), source=paper.name)
