"""Round to nearest, weights and activations: W8A8 without anything that makes outliers smaller.

Sources: ZeroQuant, arXiv 2206.01861, section 3.1 (a step to each token, found at run time); the static form as in
SmoothQuant, arXiv 2211.10438, section 3 (one step to each layer, found on calibration text). Weights have one scale per
output row, symmetric around zero.
Departures: ZeroQuant's weights are rounded in groups, for which products of whole numbers have no scale.
The yardstick of `smoothquant`, which is this method behind its scaling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import calibration, layers
from compression.errors import LayerError
from compression.methods.base import Quantizer, check_samples, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context


@method("int8", paper="arXiv:2206.01861")
@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """8-bit weights and activations, rounded to nearest (W8A8)."""

    activations: Literal["token", "static"] = "token"  # one step per token, or one per layer found on calibration text
    samples: int = 128  # of calibration text, for static steps
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int] | None:
        return (self.samples, self.sequence_length) if self.activations == "static" else None

    @property
    def measured(self) -> Any:
        return calibration.observers.Largest if self.activations == "static" else None

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return layers.rounded.whole_numbers(linear, None if self.activations == "token" else 1.0)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        if self.activations == "token":
            return self.compress_linear(linear, context)
        if inputs is None:
            raise LayerError("no text was read for its static step; set activations=static for the whole recipe, and "
                             "token for the layers that are to have it")  # fmt: skip
        return layers.rounded.whole_numbers(linear, layers.rounded.static_step(inputs))
