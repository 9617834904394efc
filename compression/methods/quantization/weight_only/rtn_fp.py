"""Round to nearest on the values of a small floating-point type: FP8, NVFP4 and MXFP4 weights.

Sources: FP8 formats, arXiv 2209.05433; OCP Microscaling Formats 1.0; the grids are described in `numeric.floats`.
Departures: weights alone are rounded; what hardware multiplies in FP8 or FP4 are activations as well.
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
    from compression.numeric.floats import FloatGrid


@method("rtn_fp")
@dataclass(frozen=True, kw_only=True)
class RTNFloat(Quantizer):
    """Round every weight to the nearest value of FP8 or FP4, without data."""

    variants: ClassVar[tuple[str, ...]] = (
        "element=e4m3", "element=e2m1,group_size=16,scale=e4m3", "element=e2m1,group_size=32,scale=e8m0",
    )  # fmt: skip

    element: Literal["e4m3", "e2m1"] = "e4m3"  # 8 bits, or 4
    group_size: int = -1  # inputs that share a scale; -1: one scale per output channel
    scale: Literal["float", "e4m3", "e8m0"] = "float"  # of a group: the base's dtype, NVFP4's E4M3, powers of two

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"rtn_fp(group_size={self.group_size}): allowed are -1 (per channel) and 8 or more")

    def grid(self) -> "FloatGrid":
        return numeric.floats.FloatGrid(element=self.element, group_size=self.group_size, scale=self.scale)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.group_size)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid())
