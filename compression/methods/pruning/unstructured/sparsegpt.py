"""SparseGPT: weights go column by column, and those to come make up for them.

Paper: arXiv 2301.00774. What is minimised is ||W X - Q X||^2 of each layer, eq. 1; Algorithm 1 is
`numeric.sparsity.sparsegpt`, on the column loop of `numeric.rounding`, which needs no inverse of the Hessian.
Masks are chosen in blocks of 128 columns (B_s), floor(sparsity * rows * 128) weights of each; with a pattern, in every
m columns when the loop reaches them. `sparsegpt-gptq` prunes first and rounds what is left in a second loop; the
paper's joint form does both in one.
Departures: layers of less than 1,024 inputs have blocks of an eighth of them, because a mask that is chosen for half of
a layer at once knows too little of what is made up for (on a layer of 128 inputs the error was 1.5 times as large);
q/k/v and gate/up, which read the same input, share one factorization; the Hessian is averaged over tokens,
so that damping does not depend on their number; columns that no input reaches are the first to go and keep their
values if they need not; a pattern n:m leaves n of m weights, where the paper's n counts zeros.
Limits: all layers of a block are pruned for the inputs that they have before any of the block is pruned.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compression import numeric
from compression.methods.base import method
from compression.methods.pruning.unstructured.base import CalibratedPruner

if TYPE_CHECKING:
    import torch

    from compression.numeric.sparsity import Pruned


@method("sparsegpt", needs=("calibration",), takes=("dense", "sparse"), leaves="sparse")
@dataclass(frozen=True, kw_only=True)
class SparseGPT(CalibratedPruner):
    """Set weights to zero column by column, adjusting the others by second-order information (SparseGPT)."""

    damp: float = 0.01  # share of the mean of the Hessian's diagonal that is added to it

    @property
    def fits_hessian(self) -> bool:
        return True

    def prune(self, weights: "list[torch.Tensor]", seen: "torch.Tensor") -> "Pruned":
        return numeric.sparsity.sparsegpt(weights, seen, self.share, self.kept, damp=self.damp)
