"""Compression methods for language models, by name.

    >>> import compression
    >>> compression.Recipe.parse("rtn(bits=3)").text
    'rtn(bits=3)'

`compress(base, recipe)` yields a `Compressed`, with `into=folder` it writes one block by block; `plan(base, recipe)`
says what that takes, and can be given to `compress`. `load(folder)` opens what was saved, `open_base` a checkpoint.
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
    TeacherError,
    TrainingError,
    WorkerError,
)
from compression.recipes import registry
from compression.recipes.recipe import UNCOMPRESSED, Recipe, Step, parse_setting, slug, split_recipes

__all__ = [
    "UNCOMPRESSED",
    "BackendError",
    "Base",
    "BaseSource",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Compressed",
    "CompressionError",
    "Cost",
    "Downstream",
    "LayerError",
    "LayerReport",
    "Plan",
    "Planner",
    "Recipe",
    "RecipeError",
    "Step",
    "StepCache",
    "TeacherError",
    "TrainingError",
    "WorkerError",
    "compress",
    "compress_to",
    "list_methods",
    "load",
    "locate",
    "open_base",
    "outline",
    "parse_setting",
    "plan",
    "slug",
    "split_recipes",
]

_LATE = {
    "Base": "checkpoints.base",
    "BaseSource": "checkpoints.base",
    "Calibration": "calibration.text",
    "Compressed": "checkpoints.artefact",
    "Cost": "cost",
    "Downstream": "training.downstream",
    "LayerReport": "checkpoints.artefact",
    "Plan": "engine.plan",
    "Planner": "engine.plan",
    "StepCache": "engine.kept_steps",
    "compress": "engine.run",
    "compress_to": "engine.run",
    "load": "checkpoints.opening",
    "locate": "checkpoints.base",
    "open_base": "checkpoints.base",
    "outline": "checkpoints.opening",
    "plan": "engine.plan",
}


def list_methods() -> dict[str, type]:
    """Every registered method by name."""
    return registry.discover()


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"compression.{_LATE[name]}"), name)
    raise AttributeError(f"module 'compression' has no attribute {name!r}")
