"""Round to nearest on an even grid: the plainest quantizer, and the yardstick of the others.

Sources: the baseline "RTN" of GPTQ, arXiv 2210.17323; the grid is described in `compression.numeric.grids.AffineGrid`.
Departures: scales are rounded up to the dtype of the weight, so that storing them never clips a weight.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compression import layers, numeric
from compression.errors import RecipeError
from compression.methods.base import Quantizer, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.grids import AffineGrid


@method("rtn")
@dataclass(frozen=True, kw_only=True)
class RTN(Quantizer):
    """Round every weight to the nearest of 2**bits evenly spaced levels, group by group, without data."""

    variants: ClassVar[tuple[str, ...]] = (
        "bits=4,group_size=32,symmetric=true", "bits=8,group_size=32,symmetric=true", "bits=8,group_size=-1",
    )  # fmt: skip

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4  # of a weight
    group_size: int = 128  # inputs that share a scale; -1: one scale per output channel
    symmetric: bool = False  # no zero points: levels lie around zero
    backend: Literal["auto", "native", "torch"] = "auto"  # whose kernel multiplies

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"rtn(group_size={self.group_size}): allowed are -1 (per channel) and 8 or more")

    def grid(self) -> "AffineGrid":
        return numeric.grids.AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.group_size)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid(), backend=self.backend)
