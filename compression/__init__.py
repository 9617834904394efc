"""Compression methods for language models, by name.

    >>> import compression
    >>> compression.Recipe.parse("rtn(bits=3)").text
    'rtn(bits=3)'

`compress(base, recipe)` yields a `Compressed`, `compress_to(folder, base, recipe)` writes one block by block,
`load(folder)` opens one that was saved, `open_base` opens a checkpoint.
Nothing heavy is imported before it is used.
"""

import importlib
from typing import Any

from compression.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    CompressionError,
    LayerError,
    RecipeError,
)
from compression.recipes.recipe import Recipe, Step, parse_setting, split_recipes

__all__ = [
    "BackendError",
    "Base",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Compressed",
    "CompressionError",
    "LayerError",
    "Recipe",
    "RecipeError",
    "Step",
    "compress",
    "compress_to",
    "load",
    "locate",
    "methods",
    "open_base",
    "parse_setting",
    "split_recipes",
]

_LATE = {
    "Base": "_checkpoint",
    "Calibration": "_calibration",
    "Compressed": "_artefact",
    "compress": "_compress",
    "compress_to": "_stream",
    "load": "_artefact",
    "locate": "_checkpoint",
    "open_base": "_checkpoint",
}


def methods() -> dict[str, type]:
    """Every registered method by name."""
    from compression.recipes import registry

    return registry.discover()


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"compression.{_LATE[name]}"), name)
    raise AttributeError(f"module 'compression' has no attribute {name!r}")
