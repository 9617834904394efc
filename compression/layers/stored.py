"""Layers as JSON: `describe` says what a layer is, `restore` makes it of that, without its tensors.

What is described is checked by the parts it is built of, and their tensors once they are there, whichever way they
come: an artefact is opened, a run is resumed and a method builds by the same rules.
"""

from typing import Any

import torch
from torch import nn

from compression.errors import CompressionError, LayerError
from compression.files.strict_json import exact_fields
from compression.layers.embedding import EMBEDDINGS, HEAD, Embedding
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
    """Raise LayerError unless each describes what can be stored; of which model, `put_all` looks at."""
    for name, description in descriptions.items():
        stored = description.get("embedding") if isinstance(description, dict) else None
        if stored == "tied":  # to the head, which has a description of its own
            continue
        try:
            restore(description if stored is None else stored)
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from None


def put_all(model: nn.Module, descriptions: dict[str, Any]) -> None:
    """Restore layers by name, each in the place of the dense one.

    Raises:
        LayerError: one of them describes no layer that can be, or another one than the dense one.
    """
    embeddings = [name for name, each in descriptions.items() if isinstance(each, dict) and "embedding" in each]
    for name, description in descriptions.items():
        if name not in embeddings:
            _put(model, name, description)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and HEAD in descriptions and not embeddings:
        raise LayerError(f"{HEAD} is stored as a layer of its own, and config.json ties it to the embeddings")
    if embeddings:
        _put_embeddings(model, embeddings, descriptions[embeddings[0]], tied)


def _put_embeddings(model: nn.Module, names: list[str], description: dict[str, Any], tied: bool) -> None:
    """Stored embeddings, on a head that is stored already where the model ties the two."""
    stored = exact_fields(description, {"embedding"})["embedding"]
    dense, head = model.get_submodule(EMBEDDINGS), model.get_submodule(HEAD)
    if names != [EMBEDDINGS] or (stored == "tied") != tied or not isinstance(head, Linear):
        raise LayerError(
            f"{names[0]}: packed embeddings are those of {EMBEDDINGS}, on the head where config.json ties them"
        )
    try:
        table = head if tied else restore(stored)
    except LayerError as error:
        raise LayerError(f"{EMBEDDINGS}: {error}") from None
    if (table.out_features, table.in_features) != (dense.num_embeddings, dense.embedding_dim):
        raise LayerError(f"{EMBEDDINGS} is stored with {table.extra_repr()}, and by the configuration it is {dense}")
    model.set_submodule(EMBEDDINGS, Embedding(table, tied=tied))


def _put(model: nn.Module, name: str, description: Any) -> None:
    """Restore a layer in the place of the dense one of that name.

    Raises:
        LayerError: it describes no layer that can be, or another one than the dense one.
    """
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        dense = None
    if type(dense) is not nn.Linear:
        raise LayerError(f"{name} is no linear layer of the model")
    try:
        layer = restore(description)
    except LayerError as error:
        raise LayerError(f"{name}: {error}") from None
    wanted, got = ((each.in_features, each.out_features, each.bias is not None) for each in (dense, layer))
    if wanted != got:
        raise LayerError(f"{name} is stored with {layer.extra_repr()}, and by the configuration it is {dense}")
    model.set_submodule(name, layer)
