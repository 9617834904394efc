"""One layer between the published formats and `Codes`."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compression.architectures import fused
from compression.checkpoints.formats.description import Published
from compression.errors import LayerError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredLayer:
    """What every affine format stores, in our layout.

    Attributes:
        codes: uint8 (rows, cols * bits / 8), as `_packing` has them.
        scales: (rows, groups), in the dtype of the file.
        zeros: uint8 (rows, groups), zero points 0 .. 2**bits - 1.
        permutation: for each stored column the input that it multiplies, int64 (cols,); None if they are in order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    permutation: Tensor | None

    def parts(self, sizes: Sequence[int], *, by_head: bool) -> "list[StoredLayer]":
        """The layers that a fused one holds, see `architectures.fused.split`."""
        split = [fused.split(each, sizes, by_head=by_head) for each in (self.codes, self.scales, self.zeros)]
        return [replace(self, codes=c, scales=s, zeros=z) for c, s, z in zip(*split, strict=True)]

    @classmethod
    def joined(cls, parts: "Sequence[StoredLayer]", sizes: Sequence[int], *, by_head: bool) -> "StoredLayer":
        """The inverse of `parts`, of one order of columns (`check_order`)."""
        return cls(*(fused.join([getattr(each, name) for each in parts], sizes, by_head=by_head)
                     for name in ("codes", "scales", "zeros")), parts[0].permutation)  # fmt: skip


def check_order(name: str, permutations: Sequence[Tensor | None]) -> None:
    """Raise LayerError if the parts of a fused layer have their columns in different orders."""
    first, *others = permutations
    for each in others:
        if (first is None) != (each is None) or not (first is None or each is None or torch.equal(first, each)):
            raise LayerError(f"{name}: its parts have their columns in different orders, and are one layer there; give "
                             "them the same settings")  # fmt: skip


def module_of(published: Published) -> Any:
    """The module that translates the tensors of a layer."""
    return importlib.import_module(f"compression.checkpoints.formats.{published.quant_method}")
