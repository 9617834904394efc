"""Strict reading of what was written as JSON: names once, finite numbers, exactly the fields that are known."""

import json
from typing import Any

from bench.metrics._registry import finite


def strict_json(text: str) -> Any:
    """JSON without what other readers would refuse or lose: raises ValueError for NaN, infinity and repeated names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return table

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number that JSON knows")

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse, parse_float=lambda digits: finite(float(digits))
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def exact_fields(table: object, wanted: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """`table`, which must be a dict with exactly these names; raises ValueError naming what is missing or unknown."""
    if not isinstance(table, dict):
        raise ValueError(f"{table!r} is not a table of names and values")
    if missing := sorted(wanted - set(table)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(set(table) - wanted - optional):
        raise ValueError(f"it has the unknown {', '.join(unknown)}; known are {', '.join(sorted(wanted | optional))}")
    return table


def finite_field(name: str, value: object) -> float:
    """`value` as a Python float; raises ValueError, beginning with the name, for NaN, infinities and no numbers."""
    try:
        return finite(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
