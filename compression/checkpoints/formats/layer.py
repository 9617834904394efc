"""One layer between the published formats and `Codes`."""

from dataclasses import dataclass

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
