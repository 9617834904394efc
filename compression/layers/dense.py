"""A weight as it is: floating-point numbers."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric.checks import FLOATS, check_finite, check_shape


@part("dense", place="weight")
class Dense(WeightPart):
    """W (rows, cols) as a parameter; a layer of this part and nothing else is kept as torch.nn.Linear."""

    plain = "dense"
    takes_others = exact = True

    def __init__(self, weight: Tensor):
        super().__init__()
        kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.weight = kept

    @classmethod
    def empty(cls, rows: int, cols: int, *, dtype: Any) -> Self:
        return cls(torch.empty(rows, cols, dtype=dtype_named(dtype), device="meta"))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dtype": name_of(self.dtype)}

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weight.shape
        return rows, cols

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def follows_dtype(self) -> frozenset[str]:
        return frozenset({"weight"})

    def check(self) -> None:
        check_finite("weight", check_shape(self, "weight", self.shape, FLOATS))

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def product_dtype(self, x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
        return wanted or x.dtype

    def again(self, weight: Tensor) -> "Dense":
        return Dense(weight.to(self.dtype))

    def alone(self, bias: Tensor | None) -> nn.Linear:
        return dense_linear(self.weight, bias)

    def rows(self, kept: Tensor) -> "Dense":
        return Dense(self.weight.detach()[kept])

    def columns(self, kept: Tensor) -> "Dense":
        return Dense(self.weight.detach()[:, kept])


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """torch's layer around a weight (rows, cols) and a bias (rows,); tensors become frozen parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            setattr(linear, name, kept)
    return linear
