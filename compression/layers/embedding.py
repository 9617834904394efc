"""Embeddings and head in 8 bits: one scale to a token, read by row where tokens come in, multiplied where they go out.

What quantizers do with `embeddings=8`. The head is a `Linear` with the 8-bit product kernel; the embeddings are rows of
such a layer: of the head itself where the model ties the two, so that they are stored once, and of one of their
own where it does not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.numeric.grids import AffineGrid

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
GRID = AffineGrid(bits=8, group_size=-1, symmetric=True)
LOOKUP = "lookup"  # where kernels are named


class Embedding(nn.Module):
    """Rows of a layer (vocabulary, width) by token ids.

    Args:
        table: the layer.
        tied: whether it is the head of the model, which then stores, moves and counts it.
    """

    def __init__(self, table: Linear, *, tied: bool):
        super().__init__()
        self.tied = tied
        if tied:
            object.__setattr__(self, "table", table)
        else:
            self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.lookup(ids)

    @property
    def num_embeddings(self) -> int:
        return self.table.out_features

    @property
    def weight(self) -> Tensor:
        """W (vocabulary, width) as it is stored, made anew."""
        return self.table.dequantize()

    @property
    def exact(self) -> bool:
        return self.table.exact

    @property
    def weights(self) -> int:
        """How many weights of the model it stands for, beside those of the head."""
        return 0 if self.tied else self.table.weights

    def kernel_name(self, device: torch.device | str | None = None) -> str:
        return LOOKUP

    def to_dense(self) -> nn.Embedding:
        """Dense embeddings with the dequantized weight."""
        return nn.Embedding.from_pretrained(self.weight, freeze=True)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, tied={self.tied}"


def pack(model: nn.Module) -> None:
    """Put embeddings and head of a model into 8 bits, where they are not.

    Raises:
        LayerError: a weight is not finite.
    """
    head = model.get_submodule(HEAD)
    if isinstance(head, nn.Linear):
        packed = _packed(head)
        _put(model, packed, packed if _tied(model) else _packed(model.get_submodule(EMBEDDINGS)))


def shaped(model: nn.Module) -> None:
    """The same for a model without weights."""
    head, embeddings = model.get_submodule(HEAD), model.get_submodule(EMBEDDINGS)
    if isinstance(head, nn.Linear):
        _put(model, *(_empty(*layer.weight.shape, dtype=layer.weight.dtype) for layer in (head, embeddings)))  # type: ignore[union-attr, operator]


def unpack(model: nn.Module) -> None:
    """Dense embeddings and head again, tied if they were."""
    embeddings, head = model.get_submodule(EMBEDDINGS), model.get_submodule(HEAD)
    if isinstance(embeddings, Embedding):
        dense = embeddings.to_dense()
        linear = head.to_linear()  # type: ignore[operator]
        if embeddings.tied:
            linear.weight = dense.weight
        model.set_submodule(EMBEDDINGS, dense)
        model.set_submodule(HEAD, linear)


def is_packed(model: nn.Module) -> bool:
    return isinstance(model.get_submodule(EMBEDDINGS), Embedding)


def _put(model: nn.Module, head: Linear, embeddings: Linear) -> None:
    tied = _tied(model)
    model.set_submodule(HEAD, head)
    model.set_submodule(EMBEDDINGS, Embedding(head if tied else embeddings, tied=tied))


def _tied(model: nn.Module) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _packed(layer: Any) -> Linear:
    return Linear(Codes.from_weight(layer.weight.detach(), GRID), getattr(layer, "bias", None))


def _empty(rows: int, cols: int, *, dtype: torch.dtype) -> Linear:
    return Linear(Codes(GRID, rows, cols, dtype=dtype))
