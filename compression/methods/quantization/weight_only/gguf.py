"""GGUF: weights in the block types of ggml, rounded as llama.cpp rounds them without an importance matrix.

Source: ggml's reference quantizers (`compression.numeric.ggml`), whose bytes these are. `q4_k_m` is the mix of that
name in llama.cpp: Q4_K, and Q6_K for values and the layer that leaves the MLP in the blocks of `takes_more_bits`
(llama-quant.cpp, use_more_bits).
Rows that are no multiple of 256 inputs take Q5_0 for Q4_K and Q8_0 for Q6_K, as there; the report names these layers.
Departures: embeddings and head stay as they are, which llama.cpp would round too; its exceptions for single families
(models of 80 blocks, mixtures of 8 experts) are left out. Zero is no level of q4_1, q5_1 and q4_k.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import layers, numeric
from compression.errors import LayerError
from compression.methods.base import NOT_FINITE, Quantizer, method

if TYPE_CHECKING:
    from torch import nn

    from compression.architectures.decoder import Block
    from compression.layers.linear import Linear
    from compression.methods.base import Context

MIX = "q4_k_m"


@method("gguf", keeps_zeros=False)
@dataclass(frozen=True, kw_only=True)
class GGUF(Quantizer):
    """Round every weight to a block type of llama.cpp, to the byte as it does, without data."""

    type: Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "q4_k_m"] = "q4_k_m"  # q4_k_m: a mix

    def in_block(self, name: str, block: "Block") -> "GGUF":
        if self.type != MIX:
            return self
        larger = {block.full(path) for path in (block.attention.producer, *block.mlp.writers)}
        more = name in larger and takes_more_bits(block.number, block.count)
        return dataclasses.replace(self, type="q6_k" if more else "q4_k")

    def block_type(self, in_features: int) -> str:
        """ggml's name of what a layer is stored in."""
        name = "Q4_K" if self.type == MIX else self.type.upper()
        whole = in_features % numeric.ggml.find(name).weights == 0
        return name if whole else numeric.ggml.FALLBACKS.get(name, name)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.ggml.row_bytes(self.block_type(in_features), in_features)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        if not linear.weight.isfinite().all():
            raise LayerError(NOT_FINITE)
        part = layers.blocks.Blocks.from_weight(linear.weight.detach(), self.block_type(linear.in_features))
        return layers.linear.Linear(part, linear.bias)

    def describe(self, linear: "nn.Linear", layer: Any) -> str:
        words, wanted = super().describe(linear, layer), self.type.upper()
        if layer.weight_part.type == wanted:
            return words
        return f"{words}; {linear.in_features} inputs are no whole number of blocks of {wanted}"


def takes_more_bits(number: int, count: int) -> bool:
    """Whether the mix stores values and down projection of a block, of so many, in Q6_K.

    >>> [number for number in range(16) if takes_more_bits(number, 16)]
    [0, 1, 4, 7, 10, 13, 14, 15]
    """
    eighth = count // 8
    return number < eighth or number >= 7 * count // 8 or (number - eighth) % 3 == 2
