"""Rounding to the values of a small floating-point type: FP8, NVFP4 and MXFP4 weights.

Sources: FP8 formats, arXiv 2209.05433; OCP Microscaling Formats 1.0; the grids are described in `numeric.floats`.
`rounding=gptq` chooses the codes by GPTQ, arXiv 2210.17323, on the same scales, and reads calibration text for it.
Departures: weights alone are rounded; what hardware multiplies in FP8 or FP4 are activations as well.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compression import layers, numeric
from compression.errors import RecipeError
from compression.methods.base import check_samples, method
from compression.methods.rounding import RoundingQuantizer

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.floats import FloatGrid


@method("rtn_fp")
@dataclass(frozen=True, kw_only=True)
class RTNFloat(RoundingQuantizer):
    """Round every weight to a value of FP8 or FP4, by default the nearest, without data."""

    variants: ClassVar[tuple[str, ...]] = (
        "element=e4m3", "element=e2m1,group_size=16,scale=e4m3", "element=e2m1,group_size=32,scale=e8m0",
    )  # fmt: skip

    element: Literal["e4m3", "e2m1"] = "e4m3"  # 8 bits, or 4
    group_size: int = -1  # inputs that share a scale; -1: one scale per output channel
    scale: Literal["float", "e4m3", "e8m0"] = "float"  # of a group: the base's dtype, NVFP4's E4M3, powers of two
    samples: int = 128  # of calibration text, for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"rtn_fp(group_size={self.group_size}): allowed are -1 (per channel) and 8 or more")

    def grid(self) -> "FloatGrid":
        return numeric.floats.FloatGrid(element=self.element, group_size=self.group_size, scale=self.scale)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.group_size)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid())

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        return self.settled(self.compress_linear(linear, context), linear, inputs)
