"""Layers of a description put into a model that has no weights yet."""

from typing import Any

from torch import nn

from compression.architectures.embeddings import tied
from compression.architectures.table import architecture_of
from compression.errors import LayerError
from compression.files.strict_json import exact_fields
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.layers.stored import restore


def put_all(model: nn.Module, descriptions: dict[str, Any]) -> None:
    """Restore layers by name, each in the place of the dense one.

    Raises:
        LayerError: one of them describes no layer that can be, or another one than the dense one.
    """
    embeddings = [name for name, each in descriptions.items() if isinstance(each, dict) and "embedding" in each]
    for name, description in descriptions.items():
        if name not in embeddings:
            _put(model, name, description)
    head = architecture_of(model).head
    if tied(model) and head in descriptions and not embeddings:
        raise LayerError(f"{head} is stored as a layer of its own, and config.json ties it to the embeddings")
    if embeddings:
        _put_embeddings(model, embeddings, descriptions[embeddings[0]])


def _put_embeddings(model: nn.Module, names: list[str], description: dict[str, Any]) -> None:
    """Stored embeddings, on a head that is stored already where the model ties the two."""
    row, on_head = architecture_of(model), tied(model)
    place, stored = row.embeddings, exact_fields(description, {"embedding"})["embedding"]
    dense, head = model.get_submodule(place), model.get_submodule(row.head)
    if names != [place] or (stored == "tied") != on_head or not isinstance(head, Linear):
        raise LayerError(f"{names[0]}: packed embeddings are those of {place}, on the head where config.json ties them")
    try:
        table = head if on_head else restore(stored)
    except LayerError as error:
        raise LayerError(f"{place}: {error}") from None
    if (table.out_features, table.in_features) != (dense.num_embeddings, dense.embedding_dim):
        raise LayerError(f"{place} is stored with {table.extra_repr()}, and by the configuration it is {dense}")
    model.set_submodule(place, Embedding(table, tied=on_head))


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
