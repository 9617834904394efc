"""QuaRot: weights and activations in 4 bits, outliers spread over all channels by Hadamard rotations.

Paper: arXiv 2404.00456, section 4. The residual stream is turned by a random Hadamard matrix and each head of values by
another (stages 1a and 1c), a Hadamard transform stands in front of down projections (1b), and weights have the
inverses. Weights are symmetric per output row, activations symmetric per token with their largest cut off at 0.9
(section 5).
Departures: no Hadamard transform across heads in front of output projections; keys and values are not quantized, so
that none is needed behind RoPE (1d); norms of RMS models keep the mean of the embeddings, which the authors' code
subtracts, although that changes what they compute; scales of weights are searched for by the squared error among 40,
the authors' by its power of 2.4 instead among 80. Sizes that no Hadamard matrix is made of here (`numeric.hadamard`)
are rotated in blocks.
Limits: the model is held as a whole, and in fp32 while it is rotated.
Where every weight counts alike, searched scales cut off the few largest of them: on `smollm2` they halve the perplexity
that W4A4 has with scales from the largest, on the reference they raise it by 5 %. With `rounding=gptq` the divergence
from the base is less than with either.
"""

from typing import Literal

from compression.methods.base import method
from compression.methods.quantization.weight_activation.rotated import RotatedMethod


@method("quarot", keeps_zeros=False, paper="arXiv:2404.00456")
class QuaRot(RotatedMethod):
    """4-bit weights and activations behind random Hadamard rotations (QuaRot)."""

    rotation: Literal["hadamard", "identity"] = "hadamard"  # identity: what the same rounding costs without any

    @property
    def rotates(self) -> bool:
        return self.rotation == "hadamard"
