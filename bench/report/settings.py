"""The recipes of a report: number format and all parameters, including defaults.

A recipe's text leaves out what has its default, so the name of a method alone says neither whether its grid is
symmetric nor how much text it read.
"""

import dataclasses

from bench.report.cells import Cell
from compression import Recipe
from compression.recipes.recipe import Step
from compression.recipes.registry import spell_value

TITLE = "What the recipes are"
HEADS = ("Grid", "Calibration Text", "Parameters")
_ABSENT = "-"


def cells(recipe: str) -> tuple[Cell, ...]:
    """The cells of a recipe under HEADS, what its steps have in common one behind the other.

    >>> [cell.text for cell in cells("rtn(bits=3)")][:2]
    ['3 bits in groups of 128, asymmetric', '-']
    >>> cells("rtn(bits=3)")[2].text
    'rtn: embeddings=16, bits=3, group_size=128, symmetric=false, backend=auto'
    """
    steps = Recipe.parse(recipe).steps
    texts = ["{} x {} tokens".format(*step.method.calibration) for step in steps if step.method.calibration]
    found = (grid(recipe), "; ".join(texts), "; ".join(map(_parameters, steps)))
    return tuple(Cell(text=text or _ABSENT) for text in found)


def grid(recipe: str) -> str:
    """The number formats of a recipe, each once; empty where none of its steps has one.

    >>> grid("sparsegpt-gptq(symmetric=true)"), grid("wanda")
    ('4 bits in groups of 128, symmetric', '')
    """
    found = (getattr(step.method, "grid", None) for step in Recipe.parse(recipe).steps)
    return "; ".join(dict.fromkeys(make().words for make in found if make is not None))


def _parameters(step: Step) -> str:
    fields = [field.name for field in dataclasses.fields(step.method)]  # type: ignore[arg-type]
    given = [f"{name}={spell_value(getattr(step.method, name))}" for name in fields]
    given += [f"keep={step.keep}"] if step.keep else []
    given += [f"layers={spell_value(step.parameters['layers'])}"] if step.layers else []
    return f"{step.name}: {', '.join(given)}" if given else step.name
