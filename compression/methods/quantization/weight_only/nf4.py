"""4-bit NormalFloat, as bitsandbytes has it.

Paper: QLoRA, arXiv 2305.14314, section 3 (NF4, double quantization); the grid is `numeric.normal_float.NF4Grid`.
Departures: none in what is stored: codes and scales equal those of bitsandbytes. (On CPU it rounds an absmax to 8 bits
through a table of 2**16 cells; ours is the nearest level.) On CPU the product is taken by the project's own kernel by
default, on CUDA by that of bitsandbytes.
Limits: the compute dtype of the papers is float16, which is the dtype of their checkpoints; "stored" follows the
checkpoint, so that a bfloat16 model is not squeezed into the range of float16 unless asked for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import layers, numeric
from compression.errors import RecipeError
from compression.methods.base import Quantizer, method

if TYPE_CHECKING:
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.normal_float import NF4Grid


GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@method("nf4", aliases=("q",))
@dataclass(frozen=True, kw_only=True)
class NF4(Quantizer):
    """4-bit NormalFloat with double-quantized scales, without data (QLoRA's format)."""

    double_quant: bool = True  # store scales in 8 bits, 256 of them with one scale of their own
    group_size: int = 64  # weights that share a scale
    compute_dtype: Literal["stored", "float16", "bfloat16", "float32"] = "stored"  # of products; stored: the base's
    backend: Literal["auto", "native", "bitsandbytes"] = "auto"  # whose kernel multiplies

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise RecipeError(f"nf4(group_size={self.group_size}): allowed are {', '.join(map(str, GROUP_SIZES))}")

    def grid(self) -> "NF4Grid":
        return numeric.normal_float.NF4Grid(group_size=self.group_size, double_quant=self.double_quant)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.group_size, allowed=GROUP_SIZES)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        import torch

        dtype = None if self.compute_dtype == "stored" else getattr(torch, self.compute_dtype)
        options = {"compute_dtype": dtype, "backend": self.backend}
        return layers.codes.packed_linear(linear.weight, linear.bias, self.grid(), **options)
