"""SpinQuant: weights and activations in 4 bits behind rotations that are learned.

Paper: arXiv 2405.16406, sections 3.1 and 3.2. Of all rotations of the residual stream (R1) and of the values of each
layer (R2), none of which changes what the model computes, those are learned under which it computes best once it is
rounded: by the loss of the next token on calibration text, through rounding as if it had no slope, with Cayley SGD from
random Hadamard matrices (`numeric.cayley`). Down projections read a Hadamard transform (R4). With `rounding=gptq`
weights are not rounded while rotations are learned, as GPTQ makes up for part of that.
Departures: a step reads one sample, the authors' eight on as many GPUs; matrices are made orthogonal again after every
step (`numeric.cayley`); while they are learned, activations have one step to a token and weights scales from their
largest, however both are set; no R3, which serves a
quantized cache alone.
Limits: the model is held as a whole in fp32, with the gradient of all its weights while rotations are learned.
On the reference it is below `quarot` in perplexity and in divergence from the base. With `weight_scales=largest`, which
are those that rotations are learned with, its perplexity is below the uncompressed base's and its divergence above
`quarot`'s: as any training on that text, it teaches the model the text besides. Read the divergence beside it.
"""

from typing import TYPE_CHECKING

from compression import architectures, layers, training
from compression.errors import RecipeError
from compression.methods.base import Context, method
from compression.methods.quantization.weight_activation.rotated import RotatedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compression.architectures.decoder import Decoder


@method("spinquant", needs=("calibration",), keeps_zeros=False, paper="arXiv:2405.16406")
class SpinQuant(RotatedMethod):
    """4-bit weights and activations behind learned rotations (SpinQuant)."""

    steps: int = 100  # of learning, each on one sample; 0: the random Hadamard matrices that it starts from
    learning_rate: float = 1.5  # the highest; falls to 0 by a cosine
    sequence_length: int = 1024  # tokens of each sample

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise RecipeError(f"spinquant(steps={self.steps}): must be 0 or more; the paper takes 100")
        if not 0 < self.learning_rate < float("inf"):
            raise RecipeError(f"spinquant(learning_rate={self.learning_rate}): must be above 0; the paper takes 1.5")
        if self.steps and self.activation_bits == 16 and self.rounding == "gptq":
            raise RecipeError("spinquant(activation_bits=16,rounding=gptq): nothing is rounded while rotations are "
                              "learned, and there is nothing to learn; take quarot, or rounding=nearest")  # fmt: skip

    @property
    def calibration(self) -> tuple[int, int]:
        return self.samples, self.sequence_length

    def matrices(self, decoder: "Decoder", context: Context) -> "tuple[Tensor, list[Tensor]]":
        start = super().matrices(decoder, context)
        if not self.steps:
            return start
        student = architectures.decoder.Decoder(architectures.decoder.copy_sharing_tensors(decoder.model))
        self.transform_neurons(student)
        for block in student.blocks:
            for name, linear in list(block.linears()):
                block.replace(name, layers.rounded.rounded_numbers(linear, 16, self.activation_bits, self.clip))
        assert context.ids is not None
        learned = training.rotations.learn(
            student.model, context.ids, start, bits=None if self.rounding == "gptq" else self.bits, steps=self.steps,
            learning_rate=self.learning_rate,
            progress=lambda step: context.progress(step, self.steps, "learning rotations"),
        )  # fmt: skip
        return learned.rotations
