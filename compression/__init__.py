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
    "list_methods",
    "load",
    "locate",
    "open_base",
    "parse_setting",
    "split_recipes",
]

_LATE = {
    "Base": "checkpoints.base",
    "Calibration": "calibration.text",
    "Compressed": "checkpoints.artefact",
    "compress": "engine.run",
    "compress_to": "engine.stream",
    "load": "checkpoints.artefact",
    "locate": "checkpoints.base",
    "open_base": "checkpoints.base",
}


def list_methods() -> dict[str, type]:
    """Every registered method by name."""
    from compression.recipes import registry

    return registry.discover()


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"compression.{_LATE[name]}"), name)
    raise AttributeError(f"module 'compression' has no attribute {name!r}")
