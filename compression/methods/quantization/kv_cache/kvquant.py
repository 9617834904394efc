"""KVQuant: keys before RoPE, and values, on a few levels per channel; outliers and the first tokens stay.

Paper: arXiv 2401.18079, sections 3.1 (keys per channel, before RoPE), 3.2 (levels at means of clusters), 3.3 (1 % of
the values of a channel stay, half of them at either end) and 3.5 (the first token, which attention looks at most).
The levels stand behind the key and value layers, so that whatever reads the cache sees them.
Departures: each channel has levels of its own for keys and values alike, found once on the calibration text; the
paper's are one table per layer, scaled per channel (keys) or per token (values), from clusters weighted by the gradient
of the loss. Where keys pass a norm (Qwen3) they are rounded in front of it.
Limits: the cache is stored in the dtype of the model: what is measured is what the levels do to the answers, no memory.
"""

from typing import TYPE_CHECKING, Literal

from compression import calibration, layers
from compression.errors import LayerError, RecipeError
from compression.methods.base import BlockMethod, Context, method

if TYPE_CHECKING:
    from compression.architectures.decoder import Block
    from compression.calibration.capture import Seen


@method("kvquant", needs=("calibration",), takes=("dense", "packed", "sparse"), leaves=None, paper="arXiv:2401.18079")
class KVQuant(BlockMethod):
    """Keys and values on a few levels per channel, outliers and the first tokens as they are (KVQuant)."""

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = 3  # 2**bits levels
    outliers: float = 0.01  # share of the values of a channel that stay as they are
    keep_first: int = 1  # tokens at the start of a sequence that stay as they are
    samples: int = 32  # of calibration text
    sequence_length: int = 512  # tokens of each sample

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (("outliers", 0, 0.5), ("keep_first", 0, 2**20)):
            if not least <= getattr(self, name) <= most:
                raise RecipeError(f"kvquant({name}={getattr(self, name)}): must be from {least} to {most}")

    def compress_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        paths = self._paths(block)
        for name, outputs in seen.outputs(calibration.observers.Sample, paths).items():
            layer = layers.Linear.of(dict(block.linears())[name])
            layer.output_part = layers.activations.Levels.fitted(outputs, self.bits, self.outliers, self.keep_first)
            block.replace(name, layer)

    @staticmethod
    def _paths(block: "Block") -> tuple[str, str]:
        """Layers of keys and of values. Raises LayerError: the cache holds no such keys."""
        if block.attention.keys is None:
            raise LayerError(f"{block.full(block.attention.module)}: kvquant rounds keys and values, and the cache of "
                             f"{block.row.name} holds a latent of both")  # fmt: skip
        return block.attention.keys, block.attention.producer

    def shape_block(self, block: "Block") -> None:
        for path in self._paths(block):
            layer = layers.Linear.of(block.layer(path))
            layer.output_part = layers.activations.Levels.empty(
                layer.out_features, layer.in_features, bits=self.bits, keep_first=self.keep_first
            )
            block.replace(block.full(path), layer)
