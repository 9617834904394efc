"""Weights of which only what is not zero is stored.

For a weight (rows, cols) with `itemsize` bytes to a number:

    bitmask    `mask` uint8 (rows, ceil(cols / 8)), one bit to a weight; `values` (kept,), row by row
               rows * ceil(cols / 8) + kept * itemsize bytes; of a bf16 weight, half of it zero: 0.5625
    n:m        of every m neighbours n `values` (rows, cols n/m), zeros among them where more went; `indices`, their
               places among the m, packed in ceil(log2 m) bits, uint8 (rows, ceil(cols n/m ceil(log2 m) / 8))
               a bf16 weight in 2:4: 0.5 + 0.0625; in 4:8: 0.5 + 0.09375, more than its bitmask would take
    csr        `values` (kept,), row by row, `places` int32 (kept,), their columns, and `ends` int32 (rows,), where each
               row ends: kept * (itemsize + 4) + 4 * rows bytes, for few outliers beside another part

The weight is made anew for every product and not kept. On CUDA, 2:4 in bf16 or fp16 is multiplied by the kernels behind
`torch.sparse.to_sparse_semi_structured`, from a copy in their layout that is made at the first forward and not saved.
"""

from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric import packing
from compression.numeric.checks import (
    FLOATS,
    check_finite,
    check_one_of,
    check_padding,
    check_places,
    check_shape,
    check_size,
    ones_in,
)

DENSIFY = "densify"

Pattern = tuple[int, int]


class _Values(WeightPart):
    """Values in their own dtype, and where they are."""

    plain = DENSIFY
    values: Tensor
    _shape: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def follows_dtype(self) -> frozenset[str]:
        return frozenset({"values"})

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._dense() if dtype is None else self._dense().to(dtype)

    def _dense(self) -> Tensor:
        raise NotImplementedError

    def _sized(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        check_size("in_features", cols)
        check_size("out_features", rows)
        check_one_of("dtype", dtype, FLOATS)
        self._shape = rows, cols


@part("sparse", place="weight")
class Sparse(_Values):
    """A bitmask and values, or n of every m neighbours.

    Args:
        rows, cols: of W.
        dtype: of the values.
        kept: how many values a bitmask keeps; without meaning for a pattern.
        pattern: (n, m), or None for a bitmask.

    Raises:
        LayerError: a value is not allowed, or m does not divide the inputs.
    """

    takes_others = exact = True

    def __init__(self, rows: int, cols: int, *, dtype: torch.dtype, kept: int = 0, pattern: Pattern | None = None):
        super().__init__()
        self._sized(rows, cols, dtype)
        if pattern is None:
            check_size("kept", kept, least=0, most=cols * rows)
            places, width, shape = "mask", packing.packed_width(cols, 1), (kept,)
        else:
            _check_pattern(pattern, cols)
            n, m = pattern
            shape = (rows, cols // m * n)
            places, width = "indices", packing.packed_width(shape[1], _index_bits(m))
        self.pattern, self.kept = pattern, kept
        self.register_buffer("values", torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer(places, torch.empty(rows, width, dtype=torch.uint8, device="meta"))

    @classmethod
    def from_weight(cls, weight: Tensor, pattern: Pattern | None = None) -> Self:
        """Store a weight (rows, cols) bit for bit: every value but +0 is kept.

        Raises:
            LayerError: more than n of m neighbours are not zero.
        """
        weight = weight.detach()
        rows, cols = weight.shape
        kept = (weight != 0) | weight.signbit()  # -0 is another bit pattern than 0
        made = cls(rows, cols, dtype=weight.dtype, pattern=pattern)
        if pattern is None:
            made.values, made.mask = weight[kept], packing.pack(kept.to(torch.uint8), 1)
            made.kept = made.values.numel()
        else:
            n, m = pattern
            groups = kept.view(rows, -1, m)
            if int(groups.sum(-1).max()) > n:
                raise LayerError(f"{int(groups.sum(-1).max())} of {m} neighbouring weights are not zero; store=nm with "
                                 f"{n}:{m} holds {n}")  # fmt: skip
            first = groups.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :n]
            places = first.sort(-1).values
            made.values = weight.view(rows, -1, m).gather(-1, places).flatten(1)
            made.indices = packing.pack(places.to(torch.uint8).flatten(1), _index_bits(m))
        made.check()
        return made

    @classmethod
    def empty(cls, rows: int, cols: int, *, pattern: Any, kept: Any, dtype: Any) -> Self:
        if pattern is not None and not (isinstance(pattern, list | tuple) and len(pattern) == 2):
            raise LayerError(f"pattern={pattern!r:.80} must be two numbers, n and m, or null")
        made = cls(rows, cols, dtype=dtype_named(dtype), kept=kept, pattern=pattern and (pattern[0], pattern[1]))
        if type(kept) is not int or made.values.numel() != kept:
            raise LayerError(f"kept={kept!r:.80}, but the pattern keeps {made.values.numel()}")
        return made

    @property
    def settings(self) -> dict[str, Any]:
        pattern = None if self.pattern is None else list(self.pattern)
        return {"pattern": pattern, "kept": self.values.numel(), "dtype": name_of(self.dtype)}

    @property
    def words(self) -> str:
        return "values and a bitmask" if self.pattern is None else "values and places, {}:{}".format(*self.pattern)

    @property
    def facts(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "stored": self.dtype}

    def check(self) -> None:
        (rows, cols), own = self.shape, {torch.uint8}
        if self.pattern is None:
            values = check_shape(self, "values", (self.kept,), FLOATS)
            mask = check_shape(self, "mask", (rows, packing.packed_width(cols, 1)), own)
            check_padding("mask", mask, cols, 1)
            if not mask.is_meta and (ones := ones_in(mask)) != self.kept:
                raise LayerError(f"mask has {ones} bits set for the {self.kept} values that are kept")
        else:
            n, m = self.pattern
            count, bits = cols // m * n, _index_bits(m)
            values = check_shape(self, "values", (rows, count), FLOATS)
            indices = check_shape(self, "indices", (rows, packing.packed_width(count, bits)), own)
            check_padding("indices", indices, count, bits)
            check_places(indices, count, bits, self.pattern)
        check_finite("values", values)

    def _dense(self) -> Tensor:
        rows, cols = self.shape
        if self.pattern is None:
            mask = packing.unpack(self.mask, 1, cols).bool()
            return self.values.new_zeros(rows, cols).masked_scatter_(mask, self.values)
        n, m = self.pattern
        places = packing.unpack(self.indices, _index_bits(m), self.values.shape[1]).long().view(rows, -1, n)
        weight = self.values.new_zeros(rows, cols // m, m)
        return weight.scatter_(-1, places, self.values.view(rows, -1, n)).view(rows, cols)

    def again(self, weight: Tensor) -> "Sparse":
        return Sparse.from_weight(weight.to(self.dtype), self.pattern)

    def rows(self, kept: Tensor) -> "Sparse":
        return Sparse.from_weight(self.value()[kept], self.pattern)

    def columns(self, kept: Tensor) -> "Sparse":
        """Patterns stay where the inputs that are left still have it; else what is left is stored with a bitmask."""
        weight = self.value()[:, kept]
        if self.pattern is not None:
            n, m = self.pattern
            if weight.shape[1] % m or (weight != 0).view(len(weight), -1, m).sum(-1).max() > n:
                return Sparse.from_weight(weight)
        return Sparse.from_weight(weight, self.pattern)


@part("csr", place="weight")
class Csr(_Values):
    """Compressed sparse rows: for few values, such as outliers beside codes.

    Args:
        values: (kept,), row by row.
        places: int32 (kept,), their columns, ascending within a row.
        ends: int32 (rows,), how many values there are up to the end of each row.
        cols: of W.
    """

    def __init__(self, values: Tensor, places: Tensor, ends: Tensor, cols: int):
        super().__init__()
        self._sized(len(ends), cols, values.dtype)
        for name, tensor in (("values", values), ("places", places), ("ends", ends)):
            self.register_buffer(name, tensor.detach())
        self.check()

    @classmethod
    def from_weight(cls, weight: Tensor) -> Self:
        """Every value of a weight (rows, cols) but zeros."""
        kept = weight.detach() != 0
        places = kept.nonzero()[:, 1].int()
        return cls(weight.detach()[kept], places, kept.sum(-1).cumsum(0).int(), weight.shape[1])

    @classmethod
    def empty(cls, rows: int, cols: int, *, kept: Any, dtype: Any) -> Self:
        check_size("kept", kept, least=0, most=rows * cols)
        places = torch.empty(kept, dtype=torch.int32, device="meta")
        ends = torch.empty(rows, dtype=torch.int32, device="meta")
        return cls(torch.empty(kept, dtype=dtype_named(dtype), device="meta"), places, ends, cols)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kept": self.values.numel(), "dtype": name_of(self.dtype)}

    @property
    def words(self) -> str:
        return f"{self.values.numel()} values by row"

    @property
    def weights(self) -> int:
        """Those that it stores: it is a summand beside the weights of another part."""
        return self.values.numel()

    def check(self) -> None:
        (rows, cols), count = self.shape, self.values.numel()
        check_finite("values", check_shape(self, "values", (count,), FLOATS))
        places, ends = check_shape(self, "places", (count,), {torch.int32}), check_shape(
            self, "ends", (rows,), {torch.int32}
        )  # fmt: skip
        if ends.is_meta:
            return
        if (ends.diff() < 0).any() or int(ends[0]) < 0 or int(ends[-1]) != count:
            raise LayerError(f"ends must ascend to the {count} values that are stored")
        if count and (int(places.min()) < 0 or int(places.max()) >= cols):
            raise LayerError(f"places must be from 0 to {cols - 1}")
        keys = self._row_of_each() * cols + places
        if (keys.diff() <= 0).any():
            raise LayerError("places must ascend within each row")

    def _row_of_each(self) -> Tensor:
        counts = torch.diff(self.ends.long(), prepend=self.ends.new_zeros(1).long())
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def _dense(self) -> Tensor:
        weight = self.values.new_zeros(self.shape)
        weight[self._row_of_each(), self.places.long()] = self.values
        return weight

    def rows(self, kept: Tensor) -> "Csr":
        return Csr.from_weight(self.value()[kept])

    def columns(self, kept: Tensor) -> "Csr":
        return Csr.from_weight(self.value()[:, kept])


def _check_pattern(pattern: Any, cols: int) -> None:
    n, m = pattern
    check_size("m of the pattern", m, least=2, most=256)
    check_size("n of the pattern", n, least=1, most=m - 1)
    if cols % m:
        raise LayerError(f"pattern {n}:{m} does not divide the {cols} inputs of the layer")


def _index_bits(m: int) -> int:
    return (m - 1).bit_length()
