"""SmoothQuant: 8-bit weights and activations, once weights carry part of the activations' outliers.

Paper: arXiv 2211.10438. Channel j of what layers read is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), eq. 4,
the maximum of |W_j| taken over all layers that read it, and their columns are multiplied by s_j; what comes before
takes the division in. Weights have one scale per output row, activations one per token, found at run time (O1), or one
per layer, found on the calibration text (O3) by an observer of what the division leaves (`calibration.ranges`). `bits`
are those of both; with 4 it is the yardstick of methods that go so low. `rounding=gptq` chooses weights' codes by GPTQ,
arXiv 2210.17323.
Departures: the authors' code divides what norms put out (`smooth=norms`). Here the inputs of the output and down
projections are divided too, in the rows of the value and up projections, heads that share values by their largest: on
the reference, with one step per layer, `smooth=norms` adds 0.7 % to the perplexity and `smooth=all` nothing. A channel
that no calibration token reaches is not scaled, nor is what has no linear producer (`SiteRow.fixed`); a norm in a short
dtype is rounded first, and its readers make up for that (`architectures.edits.Divide`).
Products are those of whole numbers where a kernel takes them (`layers.kernels.integer_products`).
"""

from typing import TYPE_CHECKING, Literal

from compression import architectures, calibration, layers
from compression.errors import RecipeError
from compression.methods.base import BlockMethod, Context, method
from compression.methods.quantization.weight_activation.observed import Observed
from compression.methods.rounding import Rounding

if TYPE_CHECKING:
    from torch import nn

    from compression.architectures.decoder import Block
    from compression.calibration.capture import Seen
    from compression.layers.linear import Linear


@method("smoothquant", needs=("calibration",), paper="arXiv:2211.10438")
class SmoothQuant(Observed, Rounding, BlockMethod):
    """8-bit weights and activations, part of the activations' outliers moved into the weights (SmoothQuant)."""

    bits: Literal[4, 6, 8] = 8  # of weights and activations
    alpha: float = 0.5  # share of an outlier that moves from the activation into the weight, 0 to 1
    activations: Literal["token", "static"] = "token"  # one step per token, or one per layer found on calibration text
    smooth: Literal["all", "norms"] = "all"  # all: every layer's input; norms, as the authors: only what norms put out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant(alpha={self.alpha}): must be from 0 to 1; the paper takes 0.5")

    def compress_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        import torch

        largest = seen.inputs(calibration.observers.Largest)
        for site in reversed(block.sites):
            if site.row.fixed is None and (self.smooth == "all" or site.row.of in ("norm", "latent")):
                x = site.largest(torch.stack([largest[name] for name in site.names]).amax(0))
                columns = torch.stack([reader.weight.abs().amax(0).float() for reader in site.readers]).amax(0)
                scales = x.pow(self.alpha) / site.largest(columns).clamp(min=1e-5).pow(1 - self.alpha)
                scales = torch.where(x > 0, scales.clamp(min=1e-5), 1)
                architectures.edits.Divide(site.number, scales).apply(block)
                largest |= {name: largest[name] / scales[site.channels] for name in site.names}

        static = self.activations == "static"
        ranges = seen.inputs(self.ranging()) if static and self.observer != "min_max" else {}

        def rounded(name: str, linear: "nn.Linear") -> "Linear":
            step = layers.rounded.static_step(largest[name], self.bits) if static else None
            if name in ranges:
                step = ranges[name].fit(self.bits, symmetric=True)[0]
            return layers.rounded.whole_numbers(linear, step, bits=self.bits)

        self.round_block(block, seen, context, rounded)

    def shape_block(self, block: "Block") -> None:
        step = None if self.activations == "token" else 1.0
        for name, linear in list(block.linears()):
            block.replace(name, layers.rounded.whole_numbers(linear, step, bits=self.bits))
