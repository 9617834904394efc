"""AWQ: input channels that carry large activations are scaled up before rounding, so that they lose less.

Paper: arXiv 2306.00978. What is minimised is ||Q(W s) (x / s) - W x||^2 over s, eq. 4, with s a power of the channels'
mean activation, eq. 5; then every group may leave out its largest weights. The arithmetic is in `channel_scales`.
Scales are folded into what comes before: norms, and the rows of v_proj and up_proj. `duo_scaling`, which also divides
by the weights' own size, is AutoAWQ's.
Departures: the error is that of the layers which read the same input themselves, each as a share of its own output,
computed from the Hessian of the inputs; the authors' code runs the attention or the MLP around them. The mean
activation is the root mean square, the diagonal of that Hessian. A norm in bf16 is rounded first, and the scales are
what it was then divided by, so that only the rounding to the grid changes the function. With grouped-query attention
o_proj is scaled too: heads that share a head of values share its scales, by their mean activation. q_proj and k_proj
are clipped too, all calibration tokens are used for it, and weights beyond the range take its last level. With
`duo_scaling` no scales at all are tried as well. Levels are those of `rtn`, whose range holds zero. With
`rounding="gptq"` scales and clipping are still those found for rounding to nearest.
Limits: scales are one power for all channels of a stack; clipping looks at one group at a time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import numeric
from compression.errors import RecipeError
from compression.methods.base import method
from compression.methods.calibrated import CalibratedQuantizer

if TYPE_CHECKING:
    import torch

    from compression.numeric.channel_scales import AwqScales
    from compression.numeric.grids import AffineGrid
    from compression.numeric.rounding import Rounded


@method("awq", needs=("calibration",))
@dataclass(frozen=True, kw_only=True)
class AWQ(CalibratedQuantizer):
    """Scale up channels with large activations and clip weights, by search on the output error, then round (AWQ)."""

    bits: Literal[2, 3, 4, 8] = 4  # of a weight
    group_size: int = 128  # inputs that share a scale; -1: one scale per output channel
    symmetric: bool = False  # no zero points: levels lie around zero
    n_grid: int = 20  # powers of the activations that are tried, in [0, 1)
    duo_scaling: bool = False  # divide by a power of the weights' own size too
    clip: bool = True  # let groups leave out their largest weights
    rounding: Literal["nearest", "gptq"] = "nearest"  # how scaled weights are rounded
    damp: float = 0.01  # of rounding=gptq: share of the mean of the Hessian's diagonal that is added to it
    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each sample
    backend: Literal["auto", "native", "torch", "gptqmodel"] = "auto"  # whose kernel multiplies

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_grid <= 1000:
            raise RecipeError(f"awq(n_grid={self.n_grid}): allowed are 1 (no scaling) to 1000; the paper takes 20")

    @property
    def fits_hessian(self) -> bool:
        return self.rounding == "gptq"

    def grid(self) -> "AffineGrid":
        return numeric.grids.AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def transform(self) -> "AwqScales":
        return numeric.channel_scales.AwqScales(ratios=self.n_grid, duo_scaling=self.duo_scaling)

    def round(self, weight: "torch.Tensor", hessian: "torch.Tensor", dtype: "torch.dtype") -> "Rounded":
        grid = self.grid()
        params = numeric.channel_scales.clipped(weight, hessian, grid, dtype) if self.clip else grid.fit(weight, dtype)
        if self.rounding == "gptq":
            return numeric.rounding.gptq(weight, hessian, grid, damp=self.damp, params=params, dtype=dtype)
        return numeric.rounding.Rounded(grid.encode(weight, params), params)
