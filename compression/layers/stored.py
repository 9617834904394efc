"""Layers as JSON: `describe` says what a layer is, `restore` makes it of that, without its tensors.

What is described is checked by the parts it is built of, and their tensors once they are there, whichever way they
come: an artefact is opened, a run is resumed and a method builds by the same rules.
"""

from typing import Any

import torch

from compression.errors import CompressionError, LayerError
from compression.files.strict_json import exact_fields
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.layers.parts import build, described, dtype_named, name_of
from compression.numeric.checks import check_size

_FIELDS = {"in_features", "out_features", "bias", "compute_dtype", "backend", "input", "weight", "output"}


def describe(layer: Linear | Embedding) -> dict[str, Any]:
    """What compression.json says of a layer."""
    if isinstance(layer, Embedding):
        return {"embedding": "tied" if layer.tied else describe(layer.table)}
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": None if layer.bias is None else name_of(layer.bias.dtype),
        "compute_dtype": None if layer.compute_dtype is None else name_of(layer.compute_dtype),
        "backend": layer.backend,
        "input": None if layer.input_part is None else described(layer.input_part),
        "weight": described(layer.weight_part),
        "output": None if layer.output_part is None else described(layer.output_part),
    }


def restore(description: Any) -> Linear:
    """The layer that `describe` gave this of, on the meta device.

    Raises:
        LayerError: it describes no layer that can be.
    """
    try:
        if not isinstance(description, dict):
            raise ValueError(f"{description!r:.80} is not a table of names and values")
        given = exact_fields(description, _FIELDS)
        rows, cols = given["out_features"], given["in_features"]
        check_size("out_features", rows)
        check_size("in_features", cols)
        parts = {place: None if given[place] is None else build(given[place], rows, cols, place)
                 for place in ("input", "output")}  # fmt: skip
        bias = None if given["bias"] is None else torch.empty(rows, dtype=dtype_named(given["bias"]), device="meta")
        return Linear(
            build(given["weight"], rows, cols, "weight"), bias, input_part=parts["input"], output_part=parts["output"],
            compute_dtype=None if given["compute_dtype"] is None else dtype_named(given["compute_dtype"]),
            backend=given["backend"],
        )  # fmt: skip
    except (CompressionError, ValueError) as error:
        raise LayerError(str(error)) from None


def check_all(descriptions: dict[str, Any]) -> None:
    """Raise LayerError unless each describes a layer; `architectures.stored.put_all` looks whether the model has it."""
    for name, description in descriptions.items():
        stored = description.get("embedding") if isinstance(description, dict) else None
        if stored == "tied":  # to the head, which has a description of its own
            continue
        try:
            restore(description if stored is None else stored)
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from None
