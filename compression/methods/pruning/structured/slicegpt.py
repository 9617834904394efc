"""SliceGPT: the residual stream in its principal directions, without the last of them.

Paper: arXiv 2401.15024, sections 3.1 to 3.4: an RMS norm whose weight is folded into its readers commutes with
rotations, so that the stream can be turned at each norm into the eigenvectors of X^T X of what reaches it there (PCA on
the model as it is cut up to there), and its last directions cut off. Between two norms a matrix beside the block takes
the stream from one basis into the next.
Departures: the eigenvectors are those of the calibration text, without the damping of the authors' code, which does not
change them; embeddings that are the head too are untied.
Limits: a share of the width is less of the parameters, because of the matrices beside the blocks.
"""

from typing import TYPE_CHECKING

from compression import architectures, calibration
from compression.errors import LayerError, RecipeError
from compression.methods.base import Context, ModelMethod, check_samples, method

if TYPE_CHECKING:
    from torch import nn

    from compression.architectures.decoder import Decoder
    from compression.calibration.capture import Stream


@method("slicegpt", needs=("calibration",), leaves="dense", keeps_zeros=False, paper="arXiv:2401.15024")
class SliceGPT(ModelMethod):
    """Turn the residual stream into its principal directions and cut off the last of them (SliceGPT)."""

    share: float = 0.25  # of the hidden width that goes; what stays is a multiple of 8, rounded down
    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each sample

    def __post_init__(self) -> None:
        check_samples(self)
        if not 0 <= self.share < 1:
            raise RecipeError(f"slicegpt(share={self.share}): must be from 0 to below 1; the paper takes 0.2 to 0.3")

    @property
    def calibration(self) -> tuple[int, int]:
        return self.samples, self.sequence_length

    def kept(self, decoder: "Decoder") -> int:
        """Directions that stay. Raises LayerError: none does."""
        gone = architectures.cuts.share_of(self.share, decoder.width)
        kept = (decoder.width - gone) // 8 * 8 if gone else decoder.width
        if not kept:
            raise LayerError(f"slicegpt(share={self.share}) leaves fewer than 8 of {decoder.width} channels")
        return kept

    def reshape(self, model: "nn.Module") -> "nn.Module":
        import torch

        decoder = architectures.edits.fold_norms(model)
        basis = torch.empty(decoder.width, self.kept(decoder), device="meta")
        for place in decoder.places():
            architectures.edits.Turn(place.number, basis).apply(decoder)
        return model

    def compress_model(self, decoder: "Decoder", seen: "Stream", context: Context) -> None:
        import torch

        architectures.edits.fold_norms(decoder.model)
        for place in decoder.places():
            _, directions = torch.linalg.eigh(seen.at(place, calibration.observers.Hessian).double())
            seen.turn(place, directions.flip(-1)[:, : self.kept(decoder)])
