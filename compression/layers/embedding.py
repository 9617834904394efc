"""Embeddings that are rows of a linear layer, such as the head that a model ties to them."""

import torch
from torch import Tensor, nn

from compression.layers.linear import Linear

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
