"""One layer between the published formats and PackedLinear."""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def to_bytes(words: Tensor) -> Tensor:
    """int32 (n, m) -> uint8 (n, 4 m), lowest bits first."""
    return words.reshape(-1).view(torch.uint8).view(len(words), -1)


def to_words(packed: Tensor) -> Tensor:
    """uint8 (n, 4 m) -> int32 (n, m): the inverse of `to_bytes`."""
    return packed.reshape(-1).view(torch.int32).view(len(packed), -1)
