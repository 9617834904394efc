"""OliVe: weights and activations in 4 bits, in pairs in which an outlier takes its neighbour's place as well.

Paper: arXiv 2304.07493. Outliers are few and lie apart, so that a pair seldom holds two: its normal number is the
victim, set to zero, and the outlier has a code on a wider grid. Weights have one scale per output row, activations one
per layer; each is the one of least squared error between 75 and 150 % of three standard deviations.
Departures: pairs stay inside a row, where the authors' run through the flattened tensor; see `numeric.outlier_victim`
for two outliers in a pair. Layers in 8 bits, which the paper mixes in, are other recipes for these layers (`layers`).
Limits: no hardware multiplies this code; products are those of decoded numbers (`simulated`), and no speed follows.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import calibration, layers, numeric
from compression.errors import LayerError
from compression.methods.base import Quantizer, check_samples, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context


@method("olive", paper="arXiv:2304.07493")
@dataclass(frozen=True, kw_only=True)
class OliVe(Quantizer):
    """4-bit weights and activations in outlier-victim pairs (OliVe, W4A4)."""

    activation_bits: Literal[4, 16] = 4  # 4: one scale per layer, found on calibration text; 16: weights alone
    samples: int = 4  # of calibration text, all of whose activations are held
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int] | None:
        return (self.samples, self.sequence_length) if self.activation_bits == 4 else None

    @property
    def measured(self) -> Any:
        return calibration.observers.Sample if self.activation_bits == 4 else None

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.outlier_victim.check_pairs(in_features)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        entering = layers.outlier_victim.OutlierVictimRange(1.0) if self.activation_bits == 4 else None
        return self._layer(linear, entering)

    def fit_linear(self, linear: "nn.Linear", inputs: Any, context: "Context") -> "Linear":
        if self.activation_bits == 16:
            return self._layer(linear, None)
        if inputs is None:
            raise LayerError("no text was read for its static range; set activation_bits=4 for the whole recipe, and "
                             "16 for the layers that are to have none")  # fmt: skip
        return self._layer(linear, layers.outlier_victim.OutlierVictimRange.fitted(inputs))

    def _layer(self, linear: "nn.Linear", entering: Any) -> "Linear":
        part = layers.outlier_victim.OutlierVictim.from_weight(linear.weight)
        return layers.linear.Linear(part, linear.bias, input_part=entering)
