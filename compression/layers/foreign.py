"""A linear layer of another library, as a part: bitsandbytes' own layers, under an adapter.

It multiplies by itself, bias and all; nothing of it is described or stored by this package.
"""

import torch
from torch import Tensor, nn

from compression.layers.dense import Dense
from compression.layers.parts import WeightPart


class Foreign(WeightPart):
    """The weight of a module that has `in_features`, `out_features` and `weight`, and inherits from torch.nn.Linear; of
    no registered kind."""

    kind, place = "foreign", "weight"
    plain = "dense"

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype  # type: ignore[union-attr, return-value]

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.module(x)

    def product_dtype(self, x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
        return x.dtype

    def alone(self, bias: Tensor | None) -> nn.Module:
        return self.module


def part_around(layer: nn.Linear) -> WeightPart:
    """The part that a layer which is no `Linear` stands for."""
    return Dense(layer.weight) if type(layer) is nn.Linear else Foreign(layer)
