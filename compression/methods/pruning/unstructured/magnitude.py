"""Magnitude pruning: the weights nearest to zero go, without data; the yardstick of the others.

Source: S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626, without
its retraining. floor(sparsity * n) weights go of each row, each layer, or all layers of the blocks together; among
equal ones those that come first (layers in the order of the model, weights row by row).
`scope="global"` counts over all layers before any is changed, so that it works on the whole model at once, in memory:
one pass over all weights counts the upper 16 bits of |w|, a second the lower ones of those at the threshold.
Layers that the recipe leaves alone are not counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import architectures, numeric
from compression.errors import LayerError, RecipeError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import ModelMethod, method
from compression.methods.pruning.unstructured.base import Pruner
from compression.recipes.registry import Unit

if TYPE_CHECKING:
    import torch

    from compression.methods.base import Context


@method("magnitude", takes=("dense", "sparse"), leaves="sparse")
@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner, ModelMethod):
    """Set the weights nearest to zero to zero, without data."""

    scope: Literal["row", "layer", "global"] = "layer"  # among which weights the smallest are sought

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and self.scope != "layer":
            raise RecipeError(f"magnitude(pattern={self.pattern},scope={self.scope}): a pattern is kept within its own "
                              "neighbours; leave one of the two out")  # fmt: skip

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        return "model" if self.scope == "global" else "layer"

    def magnitude_mask(self, weight: "torch.Tensor") -> "torch.Tensor":
        return numeric.sparsity.choose(weight.abs(), self.share, self.kept, by_row=self.scope == "row")

    def apply(self, model: Any, context: "Context") -> Any:
        """Prune with one threshold for all layers of the blocks.

        Raises:
            RecipeError: a layer has settings of its own.
            LayerError: a weight is not finite.
        """
        import torch

        layers = {}
        for block in architectures.decoder.decoder_blocks(model):
            for name, layer in block.linears():
                own = context.step.for_layer(name)
                if own is None:
                    context.report.append(LayerReport(name, "kept", LEFT_ALONE))
                    continue
                if own != self:
                    raise RecipeError(f"{context.step}: {name} has settings of its own, but scope=global seeks one "
                                      "threshold for all; leave it alone with none, or take scope=layer")  # fmt: skip
                linear = architectures.decoder.as_linear(layer)
                if not torch.isfinite(linear.weight).all():
                    raise LayerError(
                        f"{name}: the weight has NaN or infinite values: the checkpoint is damaged, or was saved in "
                        "too narrow a dtype"
                    )
                layers[name] = block, linear
        masks = numeric.sparsity.smallest_overall([linear.weight.detach() for _, linear in layers.values()], self.share)
        for (name, (block, linear)), mask in zip(layers.items(), masks, strict=True):
            layer = self.layer(linear.weight.detach().masked_fill(mask, 0), linear.bias)
            block.replace(name, layer)
            context.report.append(LayerReport(name, "replaced", self.describe(linear, layer)))
        return model
