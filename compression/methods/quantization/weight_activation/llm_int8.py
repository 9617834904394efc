"""LLM.int8(): 8-bit weights and activations, with the outlier features left in high precision.

Paper: arXiv 2208.07339, section 3.2, eq. 8. Weights: one absmax per output row. Activations: one absmax per token,
taken at run time. Features (columns) in which any token of the batch reaches the threshold are multiplied in high
precision.
Departures: as in bitsandbytes, the absmax of a token counts its values in outlier features too, where they are below
the threshold themselves.
The product is that of bitsandbytes; `compression.layers.activations.OutlierColumns` is its slow reference.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compression import layers, numeric
from compression.errors import RecipeError
from compression.methods.base import Quantizer, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.grids import Int8RowGrid


@method("llm_int8", needs=("bitsandbytes",))
@dataclass(frozen=True, kw_only=True)
class LLMInt8(Quantizer):
    """8-bit weights and activations, outlier features above the threshold in high precision (bitsandbytes)."""

    threshold: float = 6.0  # absolute value of an activation from which its feature counts as an outlier

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise RecipeError(f"llm_int8(threshold={self.threshold}): must be above 0 and finite; the paper takes 6.0")

    def grid(self) -> "Int8RowGrid":
        return numeric.grids.Int8RowGrid()

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        outliers = layers.activations.OutlierColumns(self.threshold)
        return layers.codes.packed_linear(
            linear.weight, linear.bias, self.grid(), input_part=outliers, backend="bitsandbytes"
        )
