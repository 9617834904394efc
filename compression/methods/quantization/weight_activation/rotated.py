"""What `quarot` and `spinquant` share: a decoder is rotated as a whole, which changes nothing, and then rounded.

    R1      the residual stream (`architectures.rotations.RotateStream`), the gains of norms folded, the head untied
    R2      within each head of values (`architectures.edits.Rotate`), one matrix to a layer
    R4      a Hadamard transform in front of each down projection (`layers.transforms.Hadamard`), its inverse merged

R1 and R2 are merged into weights, all of it rounded once; R4 is computed at run time. R3, of queries and keys behind
RoPE, serves a quantized cache alone and is not done. Weights have one scale per output row, symmetric; activations one
per token, found at run time. Products are computed in floating point on the rounded numbers (`simulated`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import architectures, layers, numeric
from compression.errors import RecipeError
from compression.layers.report import LayerReport
from compression.methods.base import Context, ModelMethod
from compression.recipes.registry import spell

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.architectures.decoder import Decoder
    from compression.calibration.capture import Stream


@dataclass(frozen=True, kw_only=True)
class RotatedMethod(ModelMethod):
    """Subclasses define `matrices`."""

    bits: Literal[2, 3, 4, 8] = 4  # of a weight
    activation_bits: Literal[3, 4, 6, 8, 16] = 4  # 16: as they are
    clip: float = 0.9  # share of a token's largest absolute value that its largest number stands for
    online: bool = True  # a Hadamard transform in front of down projections (R4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip <= 1:
            raise RecipeError(f"{self.info.name}(clip={self.clip}): must be above 0 and at most 1; the paper takes 0.9")

    @property
    def rotates(self) -> bool:
        """Whether anything is rotated, as the method is set."""
        return True

    def matrices(self, decoder: "Decoder", context: Context) -> "tuple[Tensor, list[Tensor]]":
        """R1 (width, width), and R2 of each block (head size, head size), for a decoder whose norms are folded."""
        raise NotImplementedError

    def reshape(self, model: "nn.Module") -> "nn.Module":
        import torch

        decoder = architectures.edits.fold_norms(model)
        if self.rotates:
            blank = torch.empty(decoder.width, decoder.width, device="meta")
            architectures.rotations.RotateStream(blank).check(decoder)
            numeric.hadamard.block_for(decoder.width, f"{decoder.row.embeddings}: the residual stream")
            for block in decoder.blocks:
                numeric.hadamard.block_for(block.head_size, f"{block.name}: a head of values")
            self._transform_neurons(decoder)
        self._round(decoder)
        return model

    def compress_model(self, decoder: "Decoder", seen: "Stream | None", context: Context) -> None:
        architectures.edits.Untie().apply(decoder)
        with architectures.rotations.in_float32(decoder.model):
            architectures.edits.fold_norms(decoder.model)
            if self.rotates:
                for edit in architectures.rotations.merged(decoder, *self.matrices(decoder, context)):
                    edit.apply(decoder)
                self._transform_neurons(decoder)
                context.report.append(self._turned(decoder.width))
        self._round(decoder)

    def _turned(self, width: int) -> LayerReport:
        block = numeric.hadamard.block_of(width)
        blocks = "" if block == width else f", in blocks of {block} that a Hadamard matrix can be made of"
        return LayerReport("residual stream", "replaced", f"{spell(self)}, turned by one matrix{blocks}")

    def _transform_neurons(self, decoder: "Decoder") -> None:
        for block, path in architectures.rotations.down_projections(decoder) if self.online else ():
            name, linear = block.full(path), block.layer(path)
            size = numeric.hadamard.block_for(linear.in_features, f"{name}: what it reads")
            block.replace(name, layers.rounded.transformed_inputs(linear, size))

    def _round(self, decoder: "Decoder") -> None:
        for block in decoder.blocks:
            for name, linear in list(block.linears()):
                rounded = layers.rounded.rounded_numbers(linear, self.bits, self.activation_bits, self.clip)
                block.replace(name, rounded)
