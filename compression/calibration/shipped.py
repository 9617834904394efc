"""Texts that packages ship, by name: what calibration "embedded" and the downstream task "arithmetic" are.

A package offers texts by an entry point of the group `compression.texts` that names a module with one or both tables:

    CALIBRATION    {name: a function that gives documents}
    DOWNSTREAM     {name: a function that gives (prompt, answer) pairs}

Entry points are those of installed distributions. In a clone that is not installed, or was installed before an entry
point was added, those in the `pyproject.toml` beside this package count as well, and before the installed ones.
"""

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from compression.errors import CompressionError

GROUP = "compression.texts"

_CLONE = Path(__file__).parents[2] / "pyproject.toml"


@functools.cache
def shipped(table: Literal["CALIBRATION", "DOWNSTREAM"]) -> Mapping[str, Callable[[], Sequence]]:
    """The texts of one table, of all packages.

    Raises:
        CompressionError: a package cannot be imported, or two ship texts of one name.
    """
    found: dict[str, Callable[[], Sequence]] = {}
    owners: dict[str, str] = {}
    for point in entry_points():
        try:
            offered = getattr(point.load(), table, {})
        except (ImportError, AttributeError) as error:
            raise CompressionError(
                f"the texts of {point.value} cannot be imported: {error}; install its package again, or remove it"
            ) from error
        for name in offered:
            if name in found:
                raise CompressionError(f"{owners[name]} and {point.value} both ship texts named {name!r}; remove one")
            found[name], owners[name] = offered[name], point.value
    return found


def entry_points() -> list[metadata.EntryPoint]:
    """The entry points of the group, each name once, in order of names."""
    installed = {point.name: point for point in metadata.entry_points(group=GROUP)}
    clone = {name: metadata.EntryPoint(name, value, GROUP) for name, value in _of_clone().items()}
    return [point for _, point in sorted({**installed, **clone}.items())]


def _of_clone() -> dict[str, str]:
    """What the pyproject.toml of a clone declares; nothing where this package is installed."""
    try:
        declared = tomllib.loads(_CLONE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return declared.get("project", {}).get("entry-points", {}).get(GROUP, {})
