"""The recipes of the whole report, and the tests that each is measured by: `pytest bench --model report`."""

from collections.abc import Set

from bench.metrics import recovery
from bench.report.orders import BEGINNINGS, CONTROL, ORDERS
from compression import split_recipes
from compression.recipes.recipe import UNCOMPRESSED

_FAMILIES = (
    ("rtn", "rtn(bits=3)", "nf4", "llm_int8", "gptq", "awq", "hqq"),
    ("magnitude", "wanda", "sparsegpt", "structured", "nf4-structured", "p"),
    ("distilled", "kd", CONTROL),
    ORDERS,
)

ALL = (UNCOMPRESSED, *(recipe for family in _FAMILIES for recipe in family), *BEGINNINGS)

_ONLY = {  # by marker: the recipes that a table has a line for; all others have one for every recipe
    "recovery": frozenset(split_recipes(recovery.DEFAULT)),
    "judge": frozenset((UNCOMPRESSED, "p", "kd", CONTROL, "nf4", *ORDERS)),
}


def has_a_line(recipe: str, markers: Set[str]) -> bool:
    """Whether a table of the report shows what a test with these markers measures of a recipe.

    The first steps of an order stand in one cell of its line: of them size and perplexity are enough.

    >>> has_a_line("p-kd", {"quality", "ordering"}), has_a_line("p-kd", {"rag"}), has_a_line("gptq", {"judge"})
    (True, False, False)
    """
    if recipe in BEGINNINGS:
        return "ordering" in markers
    return all(recipe in recipes for marker, recipes in _ONLY.items() if marker in markers)
