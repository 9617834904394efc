"""Embeddings and head in 8 bits: one scale to a token, read by row where tokens come in, multiplied where they go out.

What quantizers do with `embeddings=8`. The head is a `Linear` with the 8-bit product kernel; the embeddings are rows of
such a layer: of the head itself where the model ties the two, so that they are stored once, and of one of their own
where it does not.
"""

from typing import Any

import torch
from torch import nn

from compression.architectures.table import architecture_of
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.embedding import Embedding
from compression.layers.linear import Linear
from compression.numeric.grids import AffineGrid

GRID = AffineGrid(bits=8, group_size=-1, symmetric=True)


def pack(model: nn.Module) -> None:
    """Put embeddings and head of a model into 8 bits, where they are not.

    Raises:
        LayerError: a weight is not finite, or the embeddings multiply what they look up.
    """
    embeddings, head = _pair(model)
    if isinstance(head, nn.Linear):
        packed = _packed(head)
        _put(model, packed, packed if tied(model) else _packed(embeddings))


def shaped(model: nn.Module) -> None:
    """The same for a model without weights."""
    embeddings, head = _pair(model)
    if isinstance(head, nn.Linear):
        _put(model, *(_empty(*layer.weight.shape, dtype=layer.weight.dtype) for layer in (head, embeddings)))


def unpack(model: nn.Module) -> None:
    """Dense embeddings and head again, tied if they were."""
    embeddings, head = _pair(model)
    if isinstance(embeddings, Embedding):
        dense, linear = embeddings.to_dense(), head.to_linear()
        if embeddings.tied:
            linear.weight = dense.weight
        row = architecture_of(model)
        model.set_submodule(row.embeddings, dense)
        model.set_submodule(row.head, linear)


def is_packed(model: nn.Module) -> bool:
    return isinstance(_pair(model)[0], Embedding)


def tied(model: Any) -> bool:
    """Whether the head is the embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _pair(model: nn.Module) -> tuple[Any, Any]:
    row = architecture_of(model)
    return model.get_submodule(row.embeddings), model.get_submodule(row.head)


def _put(model: nn.Module, head: Linear, embeddings: Linear) -> None:
    row = architecture_of(model)
    if row.embeddings_scaled:
        raise LayerError(f"{row.embeddings} of {row.name} multiplies what it looks up, for which packed embeddings "
                         "have no place; leave embeddings=8 out")  # fmt: skip
    model.set_submodule(row.head, head)
    model.set_submodule(row.embeddings, Embedding(head if tied(model) else embeddings, tied=tied(model)))


def _packed(layer: Any) -> Linear:
    return Linear(Codes.from_weight(layer.weight.detach(), GRID), getattr(layer, "bias", None))


def _empty(rows: int, cols: int, *, dtype: torch.dtype) -> Linear:
    return Linear(Codes(GRID, rows, cols, dtype=dtype))
