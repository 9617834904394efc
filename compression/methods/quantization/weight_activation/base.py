"""Weights and activations on one grid of floating-point numbers: what `fp8`, `nvfp4` and `mxfp4` share."""

from typing import TYPE_CHECKING, Any, ClassVar

from compression import calibration, layers, numeric
from compression.errors import LayerError
from compression.methods.base import Quantizer

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.floats import FloatGrid


class FloatMethod(Quantizer):
    """Weights and activations on one grid of floating-point numbers; `static` is whether text is read for ranges."""

    setting: ClassVar[dict[str, Any]]  # of the grid
    static: ClassVar[bool] = False

    def grid(self) -> "FloatGrid":
        return numeric.floats.FloatGrid(**self.setting)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.setting["group_size"])

    @property
    def measured(self) -> Any:
        return calibration.observers.Largest if self.static else None

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return self._layer(linear, 1.0 if self.static else None)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        if self.static and inputs is None:
            raise LayerError("no text was read for its static range; set activations=static for the whole recipe, and "
                             "token for the layers that are to have it")  # fmt: skip
        return self._layer(linear, inputs)

    def _layer(self, linear: "nn.Linear", largest: Any) -> "Linear":
        grid, ranged = self.grid(), layers.activations.FloatRange
        if not self.static:
            entering = ranged(grid)
        else:
            entering = ranged(grid, largest) if isinstance(largest, float) else ranged.fitted(grid, largest)
        return layers.codes.packed_linear(linear.weight, linear.bias, grid, input_part=entering)
