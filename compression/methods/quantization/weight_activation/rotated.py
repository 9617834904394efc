"""What `quarot` and `spinquant` share: a decoder is rotated as a whole, which changes nothing, and then rounded.

    R1      the residual stream (`architectures.rotations.RotateStream`), the gains of norms folded, the head untied
    R2      within each head of values (`architectures.edits.Rotate`), one matrix to a layer
    R4      a Hadamard transform in front of each down projection (`layers.transforms.Hadamard`), its inverse merged

R1 and R2 are merged into weights, all of it rounded once; R4 is computed at run time. R3, of queries and keys behind
RoPE, serves a quantized cache alone and is not done. Weights have one scale per output row, symmetric. Products are
computed in floating point on the rounded numbers (`simulated`), but for those of 8 bits that a kernel takes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import architectures, calibration, layers, numeric
from compression.errors import RecipeError
from compression.layers.report import LayerReport
from compression.methods.base import Context, ModelMethod, check_samples
from compression.methods.rounding import Rounding
from compression.recipes.registry import spell

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.architectures.decoder import Decoder
    from compression.calibration.capture import Inputs, Stream


@dataclass(frozen=True, kw_only=True)
class RotatedMethod(Rounding, ModelMethod):
    """The parameters and the two stages; `matrices` are random Hadamard ones, unless a subclass finds others."""

    bits: Literal[2, 3, 4, 8] = 4  # of a weight
    activation_bits: Literal[3, 4, 6, 8, 16] = 4  # 16: as they are
    activations: Literal["token", "static"] = "token"  # one step per token, or one per layer found on calibration text
    clip: float = 0.9  # share of the largest absolute value that the largest number stands for
    weight_scales: Literal["largest", "search"] = "search"  # of a row: from its largest weight, or of least error
    online: bool = True  # a Hadamard transform in front of down projections (R4)
    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each

    def __post_init__(self) -> None:
        super().__post_init__()
        check_samples(self)
        if not 0 < self.clip <= 1:
            raise RecipeError(f"{self.info.name}(clip={self.clip}): must be above 0 and at most 1; the paper takes 0.9")

    @property
    def rotates(self) -> bool:
        """Whether anything is rotated, as the method is set."""
        return True

    @property
    def static(self) -> bool:
        return self.activations == "static" and self.activation_bits < 16

    @property
    def calibration(self) -> tuple[int, int] | None:
        return (self.samples, self.sequence_length) if self.static or self.fits_hessian else None

    def matrices(self, decoder: "Decoder", context: Context) -> "tuple[Tensor, list[Tensor]]":
        """R1 (width, width), and R2 (head size, head size) of each block, for a decoder whose norms are folded."""
        return numeric.hadamard.random_rotations(decoder.width, [b.head_size for b in decoder.blocks], context.seed)

    def reshape(self, model: "nn.Module") -> "nn.Module":
        import torch

        decoder = architectures.edits.fold_norms(model)
        if self.rotates:
            blank = torch.empty(decoder.width, decoder.width, device="meta")
            architectures.rotations.RotateStream(blank).check(decoder)
            numeric.hadamard.block_for(decoder.width, f"{decoder.row.embeddings}: the residual stream")
            for block in decoder.blocks:
                numeric.hadamard.block_for(block.head_size, f"{block.name}: a head of values")
            self.transform_neurons(decoder)
        for block in decoder.blocks:
            for name, linear in list(block.linears()):
                block.replace(name, self._rounded(linear, 1.0 if self.static else None))
        return model

    def compress_model(self, decoder: "Decoder", seen: "Stream | None", context: Context) -> None:
        architectures.edits.Untie().apply(decoder)
        with architectures.rotations.in_float32(decoder.model):
            architectures.edits.fold_norms(decoder.model)
            if self.rotates:
                for edit in architectures.rotations.merged(decoder, *self.matrices(decoder, context)):
                    edit.apply(decoder)
                self.transform_neurons(decoder)
                if (block := numeric.hadamard.block_of(decoder.width)) < decoder.width:
                    words = f"{spell(self)}, turned in blocks of {block}, of which a Hadamard matrix can be made"
                    context.report.append(LayerReport("residual stream", "replaced", words))
        inputs = None
        if self.static or self.fits_hessian:
            inputs = calibration.capture.Inputs.of_first_block(decoder.model, context.ids)
        for number, block in enumerate(decoder.blocks):
            with architectures.decoder.keeping_outputs(block):
                self._round(block, inputs, context)
            context.progress(number + 1, len(decoder.blocks), "rounding")
            if inputs is not None:
                inputs.advance(block)

    def transform_neurons(self, decoder: "Decoder") -> None:
        """R4, if it is set."""
        for block, path in architectures.rotations.down_projections(decoder) if self.online else ():
            name, linear = block.full(path), block.layer(path)
            size = numeric.hadamard.block_for(linear.in_features, f"{name}: what it reads")
            block.replace(name, layers.rounded.transformed_inputs(linear, size))

    def _round(self, block: Any, inputs: "Inputs | None", context: Context) -> None:
        seen = calibration.capture.Seen(block, inputs)  # type: ignore[arg-type]
        largest = seen.at_weights(calibration.observers.Largest) if self.static else {}

        def rounded(name: str, linear: Any) -> Any:
            static = (
                layers.rounded.static_step(largest[name] * self.clip, self.activation_bits) if self.static else None
            )
            return self._rounded(linear, static)

        self.round_block(block, seen, context, rounded)

    def _rounded(self, linear: Any, step: float | None) -> Any:
        searches = self.weight_scales == "search"
        return layers.rounded.rounded_numbers(
            linear, self.bits, self.activation_bits, self.clip, step, searches=searches
        )  # fmt: skip
