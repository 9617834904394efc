"""The table that a run prints at its end: metrics in groups, the base beside each recipe, ratios and verdicts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from bench.gate.words import short
from bench.metrics import all_metrics
from bench.report.cells import GIVEN, on_one_base
from bench.report.columns import WIDTH, Line, blocks, needed, wrapped
from bench.report.escaping import terminal
from bench.results.row import Param, Row
from compression.recipes.recipe import UNCOMPRESSED

ABSENT = "-"  # the cell of what was not measured
UNCOMPARED = ("no_baseline", "new", "not_comparable")  # outcomes without a mark
_MARKS = {"pass": "ok", "regressed": "REGRESSED", "invalid": "INVALID", "missing": "MISSING"}
_GROUPS = {  # by kind of measurement, in this order; a kind that is not named has the first part of its metrics' names
    "artefact": "size",
    "cost": "cost of compression",
    "generation": "speed",
    "against": "speed against a commit",
    "memory": "memory",
    "energy": "energy",
    "perplexity": "perplexity",
    "divergence": "perplexity",
    "task": "tasks",
    "tasks": "tasks",
    "recovery": "recovery",
    "recovery_share": "recovery",
    "rag_context": "retrieval",
    "rag_judged_context": "retrieval",
    "rag_ranking": "retrieval",
    "rag_answers": "answers",
    "rag_comparison": "answers",
    "rag_spread": "answers",
    "rag_bertscore": "answers",
    "rag_distracted": "robustness of answers",
    "rag_unanswerable": "robustness of answers",
    "rag_speed": "speed of answers",
    "no_rag_speed": "speed of answers",
    "judge": "judged answers",
    "clarity": "clarity of answers",
    "likelihood": "clarity of answers",
    "judge_bias": "bias of the judge",
}
_OTHERWISE = {"efficiency.kv_cache_mb": "memory"}  # metrics of another group than the rest of their measurement

Conditions = tuple[tuple[str, Param], ...]
Parts = tuple[str, str, str, str]  # of a cell: value, ratio, interval of the paired difference, verdict


@dataclass(frozen=True)
class Measured:
    """The cells of one metric under the same conditions, by recipe."""

    group: str
    conditions: Conditions
    metric: str
    unit: str
    cells: dict[str, Parts] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The metric's name without its first part, which the group says, and its unit."""
        return terminal(f"{self.metric.partition('.')[2]} ({self.unit})")


def terminal_table(
    rows: Iterable[Row], outcomes: Mapping[tuple[str, str], str], width: int = WIDTH, *, verbose: bool = False
) -> list[str]:
    """Rows in groups of metrics, none of the lines longer than `width`.

    A column per recipe and a line per metric where all recipes fit beside each other, else a line per recipe. A group's
    common conditions are in its heading; of the others those that tell its lines apart, with `verbose` all.
    """
    rows = list(rows)
    measured, remark = cells_of(rows, outcomes)
    recipes = list(dict.fromkeys(recipe for each in measured for recipe in each.cells))
    recipes.sort(key=lambda recipe: recipe != UNCOMPRESSED)
    order = [*dict.fromkeys(_GROUPS.values())]
    groups: dict[str, list[Measured]] = {}
    for each in sorted(measured, key=lambda each: order.index(each.group) if each.group in order else len(order)):
        groups.setdefault(each.group, []).append(each)
    heads = [terminal(each) for each in recipes]
    lines = _by_metric(groups, recipes, verbose)
    shown: list[str] = []
    if needed(heads, lines) <= width:
        shown = blocks(heads, lines, width=width)
    else:
        for name, own in groups.items():
            shown += [""] if shown else []
            shown += [*wrapped(_heading(name, own), width), *_by_recipe(own, recipes, verbose, width)]
    given = _given(rows) or {}
    texts = {own: [recipe for recipe, each in given.items() if each == own] for own in given.values() if own}
    remarks = [f"{', '.join(_spelled(own))}: {', '.join(of)}" for own, of in texts.items()]
    below = [each for words in [*remarks, *([remark] if remark else [])] for each in wrapped(terminal(words), width)]
    return [*shown, *([""] if below else []), *below]


def cells_of(rows: Sequence[Row], outcomes: Mapping[tuple[str, str], str]) -> tuple[list[Measured], str | None]:
    """The cells of all metrics; and what times and memory are multiples of, where that has to be said.

    Times and memory are ratios laid on one value of the base, as in the report. What a recipe was calibrated on or
    learnt from is a condition only where one recipe has several.
    """
    given = _given(rows)
    grouped: dict[tuple[str, Conditions], dict[str, Row]] = {}
    for row in rows:
        own = tuple(pair for pair in row.params.items() if given is None or pair[0] not in GIVEN)
        grouped.setdefault((row.metric, own), {})[row.recipe] = row
    found, several = [], False
    for (name, conditions), of in grouped.items():
        laid, base = on_one_base(of)
        several = several or (base is not None and base.low != base.high)
        row = next(iter(of.values()))
        group = _OTHERWISE.get(name) or _GROUPS.get(row.of, name.partition(".")[0])
        cells = {recipe: _parts(each, outcomes.get((recipe, each.key), "")) for recipe, each in laid.items()}
        if UNCOMPRESSED not in laid:
            beside = next((each for each in laid.values() if each.base_value is not None), None)
            if beside is not None:
                cells[UNCOMPRESSED] = (_value(beside.base_value, beside.status), "", "", "")
        found.append(Measured(group, conditions, name, row.unit, cells))
    remark = f"times and memory: ratio to {UNCOMPRESSED}, measured in turn with each recipe, times one value of it"
    return found, remark if several else None


def _given(rows: Iterable[Row]) -> dict[str, Conditions] | None:
    """What each recipe was calibrated on and learnt from; None where a recipe has rows of several."""
    found: dict[str, Conditions] = {}
    for row in rows:
        own = tuple((name, row.params[name]) for name in GIVEN if name in row.params)
        if found.setdefault(row.recipe, own) != own:
            return None
    return found


def _parts(row: Row, outcome: str) -> Parts:
    if row.value is None:
        return row.status.replace("_", " "), "", "", ""
    verdict = "" if outcome in UNCOMPARED else _MARKS.get(outcome, outcome)
    return _value(row.value, row.status), _ratio(row.ratio), _paired(row) if row.paired else "", verdict


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return (f"{ratio:.3f}" if 0.1 <= abs(ratio) < 10 else f"{ratio:.3g}") + "x"


def _value(value: float, status: str) -> str:
    return short(value) + (" est." if status == "estimated" else "")


def _paired(row: Row) -> str:
    """The 95 % interval of the paired difference to the base, or of the ratio where the metric is exp of the items.

    A share of answers that flipped follows, where the items are answers.
    """
    found, metric = row.paired or {}, all_metrics().get(row.metric)
    if metric is not None and metric.of_items == "exp":
        return f"[{math.exp(found['low']):.4g}, {math.exp(found['high']):.4g}]"
    shown = f"{found['difference']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}]"
    return shown + (f" {100 * found['flipped']:.3g} % flipped" if "flipped" in found else "")


# --- lines ------------------------------------------------------------------------------------------------------------


def _heading(name: str, measured: Sequence[Measured]) -> str:
    return terminal(", ".join([name.upper(), *_spelled(_common(measured))]))


def _by_metric(groups: Mapping[str, Sequence[Measured]], recipes: Sequence[str], verbose: bool) -> list[Line]:
    """A line per metric, below its conditions; behind its name where no other metric has them."""
    cells = [each.cells for measured in groups.values() for each in measured]
    sizes = {recipe: _sizes(of[recipe] for of in cells if recipe in of) for recipe in recipes}
    lines: list[Line] = []
    for name, measured in groups.items():
        lines += [("", ())] if lines else []
        lines += [(_heading(name, measured), ())]
        told = _told_apart(measured, verbose)
        for conditions in sorted(told, key=lambda each: bool(told[each])):
            head = terminal(", ".join(told[conditions]))
            own = [each for each in measured if each.conditions == conditions]
            lines += [(f"  {head}", ())] if head and len(own) > 1 else []
            for each in own:
                label = f"  {each.label} {head}" if len(own) == 1 else f"  {each.label}"
                lines.append((label.rstrip(), [_joined(each.cells.get(one), sizes[one]) for one in recipes]))
    return lines


def _by_recipe(measured: Sequence[Measured], recipes: Sequence[str], verbose: bool, width: int) -> list[str]:
    """A line per recipe, a column per metric and its conditions."""
    told = _told_apart(measured, verbose)
    heads = [terminal(" ".join([each.label, ", ".join(told[each.conditions])])).rstrip() for each in measured]
    sizes = [_sizes(each.cells.values()) for each in measured]
    lines = [
        (f"  {terminal(recipe)}", [
            _joined(each.cells.get(recipe), size) for each, size in zip(measured, sizes, strict=True)])
        for recipe in recipes if any(recipe in each.cells for each in measured)
    ]  # fmt: skip
    return blocks(heads, lines, width=width)


def _sizes(cells: Iterable[Parts]) -> list[int]:
    """The widths of the parts of a column's cells."""
    return [max(map(len, parts)) for parts in zip(*cells, strict=True)]


def _joined(parts: Parts | None, sizes: Sequence[int]) -> str:
    """The parts of a cell below those of the other cells of its column."""
    if parts is None:
        return ABSENT
    value, ratio, items, verdict = parts
    shown = [value.rjust(sizes[0]), ratio.rjust(sizes[1]), items.ljust(sizes[2]), verdict.ljust(sizes[3])]
    return "  ".join(part for part, size in zip(shown, sizes, strict=True) if size)


# --- conditions -------------------------------------------------------------------------------------------------------


def _common(measured: Sequence[Measured]) -> Conditions:
    """The conditions that all metrics of a group have in common."""
    return tuple(pair for pair in measured[0].conditions if all(pair in each.conditions for each in measured))


def _told_apart(measured: Sequence[Measured], verbose: bool) -> dict[Conditions, list[str]]:
    """Of each line's conditions the fewest that tell it apart from the others; with `verbose` all that differ."""
    common = _common(measured)
    heads = {each.conditions: dict(pair for pair in each.conditions if pair not in common) for each in measured}
    names = sorted({name for own in heads.values() for name in own}, key=lambda name: name != "task")
    chosen: Sequence[str] = names
    for count in range(0 if verbose else len(names)):
        if apart := [each for each in combinations(names, count) if _tells_apart(heads.values(), each)]:
            chosen = next((each for each in apart if all(set(each) <= own.keys() for own in heads.values())), apart[0])
            break
    return {key: _spelled((name, own[name]) for name in chosen if name in own) for key, own in heads.items()}


def _tells_apart(heads: Iterable[Mapping[str, Param]], names: Sequence[str]) -> bool:
    found = [tuple(own.get(name) for name in names) for own in heads]
    return len(set(found)) == len(found)


def _spelled(conditions: Iterable[tuple[str, Param]]) -> list[str]:
    return [f"{name}={value}" for name, value in conditions]
