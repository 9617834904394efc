"""The headline metrics of the page's overview and Pareto fronts."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.cells import Chosen, Notes, by_ratio, cell_of, choose, is_ranked, mark_best, number, with_base
from bench.report.layout import FAMILIES, Column, family_of
from bench.results.row import Param, Row
from compression.recipes.recipe import UNCOMPRESSED

BASE_FAMILY = "uncompressed"
FAMILY_NAMES = {each: each.replace("_", "-").capitalize() for each in (BASE_FAMILY, *FAMILIES)} | {
    "orderings": "Several steps"
}
QUALITY = (
    Column(head="Accuracy", metric="quality.average_accuracy"),
    Column(head="Perplexity", metric="quality.perplexity"),
    Column(head="RAG F1", metric="rag.f1", params=(("decoding", "greedy"),)),
    Column(head="G-Eval", metric="judge.g_eval"),
)
COSTS = (
    Column(head="Size (MiB)", metric="efficiency.stored_bytes", scale=2**-20),
    Column(head="Latency (ms/token)", metric="efficiency.latency_ms", params=(("mode", "eager"), ("batch", 1))),
    Column(head="Energy (mJ/token)", metric="efficiency.energy_mj_per_token", params=(("batch", 1),)),
    Column(head="Memory (MiB)", metric="efficiency.peak_memory_mb", params=(("batch", 1),)),
)
BITS = Column(head="Bits per weight", metric="efficiency.bits_per_parameter")


def family(recipe: str) -> str:
    """The family of a recipe on the page, where the uncompressed base has one of its own."""
    return family_of(recipe) or BASE_FAMILY


class Overview:
    """The headline metrics of one base on one device, each under the conditions that most recipes were measured under.

    Attributes:
        rows: by column and recipe, for the columns that have a value.
        conditions: by column what its rows were measured with.
        by_ratio: what times and memory are multiples of, in words; None where nothing is one.
    """

    def __init__(self, rows: Sequence[Row]):
        rows = with_base(rows)
        self.rows: dict[Column, dict[str, Row]] = {}
        self.conditions: dict[Column, dict[str, Param]] = {}
        known: dict[Column, Chosen] = {}
        for column in (COSTS[0], BITS, *QUALITY, *COSTS[1:]):
            known[column] = chosen = choose(column, (), [row for row in rows if row.metric == column.metric])
            if any(row.value is not None for row in chosen.rows.values()):
                self.rows[column] = {recipe: row for (recipe, _), row in chosen.rows.items()}
                self.conditions[column] = dict(column.params) | dict(chosen.conditions[()])
        self.by_ratio = by_ratio(known)

    def better(self, column: Column) -> str:
        return next(iter(self.rows[column].values())).better

    def values(self, column: Column) -> dict[str, float]:
        """By recipe what can be compared, in the unit of the column's head."""
        found = self.rows.get(column, {}).items()
        return {recipe: row.value * column.scale for recipe, row in found if row.value is not None and is_ranked(row)}

    def cells(self, recipes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """By recipe what the overview shows, and the whole of it, interval or reason, as `title`."""
        lines = {recipe: [] for recipe in recipes}
        for column, rows in self.rows.items():
            notes = Notes()
            cells = {recipe: [cell_of(column, rows[recipe], notes)] for recipe in recipes if recipe in rows}
            best = mark_best({recipe: each for recipe, each in cells.items() if recipe != UNCOMPRESSED},
                             [self.better(column)])  # fmt: skip
            for recipe, line in lines.items():
                (cell,) = best.get(recipe) or cells.get(recipe) or [None]
                row = rows.get(recipe)
                line.append({
                    "value": cell and cell.value, "best": cell is not None and cell.best,
                    "text": "not measured" if cell is None else cell.text if cell.value is None else number(cell.value),
                    "estimated": row is not None and row.status == "estimated",
                    "title": ": ".join(filter(None, [cell and cell.text, row and row.reason])),
                })  # fmt: skip
        return lines


def spelled(params: Mapping[str, Param]) -> str:
    """Parameters in words.

    >>> spelled({"batch": 1, "new_tokens": 128})
    'batch 1, new tokens 128'
    """
    return ", ".join(f"{name.replace('_', ' ')} {each}" for name, each in params.items())
