"""Rounding of weights and activations: W8A8 without anything that makes outliers smaller.

Sources: ZeroQuant, arXiv 2206.01861, section 3.1 (a step to each token, found at run time); the static form as in
SmoothQuant, arXiv 2211.10438, section 3 (one step to each layer, found on calibration text by an observer, see
`calibration.ranges`). Weights have one scale per output row, symmetric around zero. `bits` are those of both, 6 and 4
the yardsticks of methods that go so low. `scale=power_of_two` is fixed point: steps of weights and activations are
rounded up to powers of two.
`rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323, on the same scales.
Departures: ZeroQuant's weights are rounded in groups, for which products of whole numbers have no scale.
The yardstick of `smoothquant`, which is this method behind its scaling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import layers
from compression.methods.base import check_samples, method
from compression.methods.quantization.weight_activation.observed import Observed
from compression.methods.rounding import RoundingQuantizer

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context


@method("int8", paper="arXiv:2206.01861")
@dataclass(frozen=True, kw_only=True)
class Int8(Observed, RoundingQuantizer):
    """8-bit weights and activations, rounded to nearest or, the weights, by GPTQ (W8A8)."""

    bits: Literal[4, 6, 8] = 8  # of weights and activations
    activations: Literal["token", "static"] = "token"  # one step per token, or one per layer found on calibration text
    symmetric: bool = True  # whether ranges of activations lie around zero
    scale: Literal["float", "power_of_two"] = "float"  # power_of_two: fixed point
    samples: int = 128  # of calibration text, for static steps and for rounding=gptq
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def static(self) -> bool:
        return self.activations == "static"

    @property
    def measured(self) -> Any:
        return self.ranging(hessian=self.fits_hessian) if self.static else super().measured

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        import torch

        return self._layer(linear, (torch.ones(1), torch.zeros(1)) if self.static else None)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        static = None
        if self.static:
            static = self.ranges_of(inputs).fit(self.bits, symmetric=self.symmetric, scale=self.scale)
        return self.settled(self._layer(linear, static), linear, getattr(inputs, "reached", inputs))

    def _layer(self, linear: "nn.Linear", static: Any) -> "Linear":
        entering = layers.ranges.range_of(self.bits, static, symmetric=self.symmetric, scale=self.scale)
        return layers.rounded.whole_numbers(linear, bits=self.bits, scale=self.scale, input_part=entering)
