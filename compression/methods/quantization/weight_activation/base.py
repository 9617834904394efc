"""Weights and activations on one grid of floating-point numbers: what `fp8`, `nvfp4` and `mxfp4` share."""

from typing import TYPE_CHECKING, Any, ClassVar

from compression import layers, numeric
from compression.methods.rounding import RoundingQuantizer

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.activations import FloatRange
    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.floats import FloatGrid


class FloatMethod(RoundingQuantizer):
    """Weights and activations on one grid of floating-point numbers."""

    setting: ClassVar[dict[str, Any]]  # of the grid

    def grid(self) -> "FloatGrid":
        return numeric.floats.FloatGrid(**self.setting)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.setting["group_size"])

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return self._layer(linear, layers.activations.FloatRange(self.grid(), 1.0 if self.static else None))

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        ranged, grid = layers.activations.FloatRange, self.grid()
        entering = ranged.fitted(grid, self.largest(inputs)) if self.static else ranged(grid)
        return self.settled(self._layer(linear, entering), linear, inputs)

    def _layer(self, linear: "nn.Linear", entering: "FloatRange") -> "Linear":
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid(), input_part=entering)
