"""Blocks: a weight in a block type of ggml, held as the raw bytes that a GGUF file has."""

from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric import ggml
from compression.numeric.checks import FLOATS, check_finite, check_one_of, check_shape, check_size


@part("ggml", place="weight")
class Blocks(WeightPart):
    """W (rows, cols) as `raw`, uint8 (rows, row_bytes): every row a whole number of blocks.

    Args:
        type: of the blocks, a key of `numeric.ggml.TYPES`, such as "Q4_K".
        rows, cols: of W.
        dtype: in which products are taken.

    Raises:
        LayerError: there is no such type, or its blocks do not tile the inputs.
    """

    def __init__(self, type: str, rows: int, cols: int, *, dtype: torch.dtype):
        super().__init__()
        check_size("in_features", cols)
        check_size("out_features", rows)
        check_one_of("dtype", dtype, FLOATS)
        self.takes_others = ggml.find(type).encode is not None
        self.type, self._shape, self._dtype = type, (rows, cols), dtype
        raw = torch.empty(rows, ggml.row_bytes(type, cols), dtype=torch.uint8, device="meta")
        self.register_buffer("raw", raw)

    @classmethod
    def from_weight(cls, weight: Tensor, type: str) -> Self:
        """Round a weight (rows, cols) as ggml does.

        Raises:
            LayerError: a weight is not finite or out of range, blocks do not tile the inputs, or the type is read
                alone.
        """
        check_finite("the weight", weight)
        return cls.from_raw(ggml.encode(weight, type), type, weight.shape[1], dtype=weight.dtype)

    @classmethod
    def from_raw(cls, raw: Tensor, type: str, cols: int, *, dtype: torch.dtype) -> Self:
        """Of given bytes, uint8 (rows, row_bytes)."""
        made = cls(type, len(raw), cols, dtype=dtype)
        made.raw = raw
        made.check()
        return made

    @classmethod
    def empty(cls, rows: int, cols: int, *, type: Any, dtype: Any) -> Self:
        return cls(type, rows, cols, dtype=dtype_named(dtype))

    @property
    def settings(self) -> dict[str, Any]:
        return {"type": self.type, "dtype": name_of(self.dtype)}

    @property
    def words(self) -> str:
        return f"ggml {self.type}"

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def facts(self) -> dict[str, Any]:
        return {"type": self.type}

    def check(self) -> None:
        rows, cols = self.shape
        raw = check_shape(self, "raw", (rows, ggml.row_bytes(self.type, cols)), {torch.uint8})
        if not raw.is_meta and not ggml.finite(raw, self.type):
            raise LayerError("raw has scales that are NaN or infinite")

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        return ggml.decode(self.raw, self.type).to(dtype or self.dtype)

    def lookup(self, places: Tensor) -> Tensor:
        """Its rows alone are decoded."""
        rows = ggml.decode(self.raw[places.reshape(-1)], self.type)
        return rows.to(self.dtype).view(*places.shape, self.shape[1])

    def rows(self, kept: Tensor) -> "Blocks":
        """The same bytes."""
        return self._with(self.raw[kept.to(self.raw.device)], self.shape[1])

    def columns(self, kept: Tensor) -> "Blocks":
        """The same bytes where the inputs that are left are whole blocks, else rounded anew.

        Raises:
            LayerError: blocks do not tile the inputs that are left, or the type cannot be written.
        """
        kind, count = ggml.find(self.type), len(kept)
        ggml.row_bytes(self.type, count)
        blocks = kept.cpu().view(-1, kind.weights)
        first = blocks[:, 0] // kind.weights
        if torch.equal(blocks, first[:, None] * kind.weights + torch.arange(kind.weights)):
            raw = self.raw.unflatten(-1, (-1, kind.bytes))[:, first.to(self.raw.device)]
            return self._with(raw.flatten(1), count)
        if not self.takes_others:
            raise LayerError(f"of a weight in {self.type} whole blocks of {kind.weights} inputs can go: the type is "
                             "read and not written; dequantize it first")  # fmt: skip
        weight = ggml.decode(self.raw, self.type)[:, kept.to(self.raw.device)]
        return self._with(ggml.encode(weight, self.type), count)

    def again(self, weight: Tensor) -> "Blocks":
        """Rounded anew. Raises LayerError if the type cannot be written."""
        return self._with(ggml.encode(weight, self.type), weight.shape[1])

    def _with(self, raw: Tensor, cols: int) -> "Blocks":
        return type(self).from_raw(raw, self.type, cols, dtype=self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.raw.device)).dtype
        return super()._apply(fn, recurse)
