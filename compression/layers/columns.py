"""Columns: some whole columns of a weight in floating point, beside a part that stores the others in fewer bits.

As OWQ, arXiv 2306.02272, keeps the inputs that hurt most when they are rounded.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric.checks import FLOATS, check_finite, check_shape, check_size


@part("columns", place="weight")
class Columns(WeightPart):
    """Zero but for some columns.

    Args:
        values: (rows, k), the columns.
        places: int32 (k,), which columns they are, ascending.
        cols: of W.
    """

    plain = "dense"

    def __init__(self, values: Tensor, places: Tensor, cols: int):
        super().__init__()
        check_size("in_features", cols)
        self._cols = cols
        self.register_buffer("values", values.detach())
        self.register_buffer("places", places.detach().int())
        self.check()

    @classmethod
    def from_weight(cls, weight: Tensor, places: Tensor) -> Self:
        """These columns of a weight (rows, cols)."""
        return cls(weight.detach()[:, places.long()], places, weight.shape[1])

    @classmethod
    def empty(cls, rows: int, cols: int, *, count: Any, dtype: Any) -> Self:
        check_size("count", count, most=cols)
        values = torch.empty(rows, count, dtype=dtype_named(dtype), device="meta")
        return cls(values, torch.empty(count, dtype=torch.int32, device="meta"), cols)

    @property
    def settings(self) -> dict[str, Any]:
        return {"count": len(self.places), "dtype": name_of(self.dtype)}

    @property
    def words(self) -> str:
        return f"{len(self.places)} columns as they are"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.values), self._cols

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def follows_dtype(self) -> frozenset[str]:
        return frozenset({"values"})

    @property
    def weights(self) -> int:
        """Those that it stores: it is a summand beside the weights of another part."""
        return self.values.numel()

    def check(self) -> None:
        (rows, cols), count = self.shape, len(self.places)
        check_finite("values", check_shape(self, "values", (rows, count), FLOATS))
        places = check_shape(self, "places", (count,), {torch.int32})
        if not places.is_meta and ((places.diff() <= 0).any() or int(places[0]) < 0 or int(places[-1]) >= cols):
            raise LayerError(f"places must ascend from 0 to {cols - 1}")

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.values.new_zeros(self.shape)
        weight[:, self.places.long()] = self.values
        return weight if dtype is None else weight.to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        chosen = x.index_select(-1, self.places)
        return nn.functional.linear(chosen, self.values.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def rows(self, kept: Tensor) -> "Columns":
        return Columns(self.values[kept], self.places, self._cols)

    def columns(self, kept: Tensor) -> WeightPart:
        """Raises LayerError: none of its columns would be left."""
        place = torch.full((self._cols,), -1, device=self.places.device)
        place[kept.to(place.device)] = torch.arange(len(kept), device=place.device)
        found = place[self.places.long()]
        if not (found >= 0).any():
            raise LayerError("none of the columns that are kept as they are is among the inputs that are left")
        return Columns(self.values[:, found >= 0], found[found >= 0], len(kept))
