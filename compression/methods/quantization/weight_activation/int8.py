"""Rounding of weights and activations: W8A8 without anything that makes outliers smaller.

Sources: ZeroQuant, arXiv 2206.01861, section 3.1 (a step to each token, found at run time); the static form as in
SmoothQuant, arXiv 2211.10438, section 3 (one step to each layer, found on calibration text). Weights have one scale per
output row, symmetric around zero.
`rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323, on the same scales.
Departures: ZeroQuant's weights are rounded in groups, for which products of whole numbers have no scale.
The yardstick of `smoothquant`, which is this method behind its scaling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import layers
from compression.methods.base import check_samples, method
from compression.methods.rounding import RoundingQuantizer

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context


@method("int8", paper="arXiv:2206.01861")
@dataclass(frozen=True, kw_only=True)
class Int8(RoundingQuantizer):
    """8-bit weights and activations, rounded to nearest or, the weights, by GPTQ (W8A8)."""

    activations: Literal["token", "static"] = "token"  # one step per token, or one per layer found on calibration text
    samples: int = 128  # of calibration text, for static steps and for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def static(self) -> bool:
        return self.activations == "static"

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        return layers.rounded.whole_numbers(linear, 1.0 if self.static else None)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        step = layers.rounded.static_step(self.largest(inputs)) if self.static else None
        return self.settled(layers.rounded.whole_numbers(linear, step), linear, inputs)
