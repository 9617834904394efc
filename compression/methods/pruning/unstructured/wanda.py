"""Wanda: weights go by their size times the norm of the input that they multiply; the others stay as they are.

Paper: arXiv 2306.11695. The score is |W_ij| ||x_j||_2, eq. 1, over all calibration tokens, compared within each output
row: floor(sparsity * cols) weights of every row go, among equal ones those of the first inputs.
Departures: none in the score. Norms are all that is summed up of the inputs: the output error of the report is taken
over about 1,024 of the tokens, evenly spread.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compression import calibration, numeric
from compression.methods.base import method
from compression.methods.pruning.unstructured.base import CalibratedPruner

if TYPE_CHECKING:
    import torch

    from compression.calibration.observers import Norms
    from compression.numeric.sparsity import Pruned


@method("wanda", needs=("calibration",), takes=("dense", "sparse"), leaves="sparse")
@dataclass(frozen=True, kw_only=True)
class Wanda(CalibratedPruner):
    """Set weights to zero by their size times the norm of their input, row by row (Wanda)."""

    def observer(self, cols: int, device: Any) -> "Norms":
        return calibration.observers.Norms(cols, self.samples * self.sequence_length, device)

    def output_error(self, weight: "torch.Tensor", changed: "torch.Tensor", seen: "Norms") -> float:
        return seen.relative_error(weight, changed)

    def prune(self, weights: "list[torch.Tensor]", seen: "Norms") -> "Pruned":
        pruned = []
        for weight in weights:
            mask = numeric.sparsity.choose(weight.abs() * seen.norms, self.share, self.kept, by_row=True)
            pruned.append(weight.masked_fill(mask, 0))
        return numeric.sparsity.Pruned(pruned)
