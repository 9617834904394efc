"""GPTQ: rounding that lets the weights to come make up for the error so far.

Paper: arXiv 2210.17323. What is minimised is ||W X - Q X||^2 of each layer, eq. 1; the arithmetic, and why it needs no
inverse of the Hessian, is in `numeric.rounding`. Activation order and static groups follow the authors' later code
(act_order, static_groups). With both, which is the default, columns are stored in the order of the inputs, so that
nothing is gathered at run time and every engine that reads the format can open what is written (vLLM: symmetric alone).
Departures: q/k/v and gate/up, which read the same input, are rounded as one matrix; the Hessian is averaged over
tokens, so that damping does not depend on their number; a column that no input reaches is rounded to nearest, where the
authors' code sets it to zero; a weight that is zero, as pruned ones are, stays zero; scales are rounded up to the dtype
of the weight, as in `rtn`.
Limits: all layers of a block are rounded for the inputs that they have before any of the block is rounded ("true
sequential" is not done).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import numeric
from compression.methods.base import method
from compression.methods.calibrated import CalibratedQuantizer

if TYPE_CHECKING:
    import torch

    from compression.numeric.grids import AffineGrid
    from compression.numeric.rounding import Rounded


@method("gptq", needs=("calibration",))
@dataclass(frozen=True, kw_only=True)
class GPTQ(CalibratedQuantizer):
    """Round column by column, adjusting the next columns for each error by second-order information (GPTQ)."""

    bits: Literal[2, 3, 4, 8] = 4  # of a weight
    group_size: int = 128  # inputs that share a scale; -1: one scale per output channel
    symmetric: bool = False  # no zero points: levels lie around zero; the only GPTQ format that vLLM opens
    act_order: bool = True  # round the columns with the largest inputs first
    static_groups: bool = True  # find scales before rounding; without, act_order reorders inputs at run time
    damp: float = 0.01  # share of the mean of the Hessian's diagonal that is added to it
    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each sample
    backend: Literal["auto", "native", "torch", "gptqmodel"] = "auto"  # whose kernel multiplies

    @property
    def fits_hessian(self) -> bool:
        return True

    def grid(self) -> "AffineGrid":
        return numeric.grids.AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def round(self, weight: "torch.Tensor", hessian: "torch.Tensor", dtype: "torch.dtype") -> "Rounded":
        grid = self.grid()
        params = grid.fit(weight, dtype) if self.static_groups else None
        order = self.act_order
        return numeric.rounding.gptq(weight, hessian, grid, damp=self.damp, act_order=order, params=params, dtype=dtype)
