"""Removal of whole layers, then of heads of keys and values together with the query heads that attend to them.

Paper: [E], "Structured Pruning (Layer + Head Removal)" and its listing 6. Stage 1 keeps 20 of 32 layers: the first 40 %
of the kept from the front (8), the rest from the back (12). Stage 2 keeps the first 75 % of the KV heads of each layer,
at least 1; both shares are rounded down. The paper applies it to a quantized model: `nf4-structured`.
Departures: the listing leaves shapes that cannot run; here the query heads of a removed KV head go with it, with the
matching columns of o_proj, so that each query head that stays attends to the keys it attended to before.
`choose` and `heads` can replace the paper's positions by what calibration text says: layers whose output is most like
their input go (ShortGPT, arXiv 2403.03853), or those whose removal raises perplexity least (Shortened LLaMA, arXiv
2402.02834: each by itself, at once; neither is asked again after a removal); KV heads go that add least to the output
of o_proj, measured after the layers are gone, block by block behind blocks that are cut.
Limits: a model with as many KV heads as query heads has no groups, and the paper's stage 2 does not say which query
heads would be alike; it is refused, `keep_kv_heads=none` removes layers alone. On a packed model rows keep their bits,
and so do columns where they fall into groups (`compression.layers.codes.Codes.columns`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression import architectures, calibration
from compression.errors import LayerError, RecipeError
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.methods.base import ModelMethod, check_samples, method
from compression.recipes.registry import spell

if TYPE_CHECKING:
    from torch import nn

    from compression.methods.base import Context


@method("structured", takes=("dense", "packed"), leaves=None)
@dataclass(frozen=True, kw_only=True)
class Structured(ModelMethod):
    """Remove whole layers, then the same number of KV heads, with their query heads, from every layer."""

    keep_layers: int | float | None = 0.625  # how many, or a share below 1; none: all
    keep_kv_heads: int | float | None = 0.75  # of each layer, in the same way
    choose: Literal["position", "similarity", "perplexity"] = "position"  # which layers go
    heads: Literal["position", "importance"] = "position"  # which KV heads go
    samples: int = 32  # of calibration text, where something is measured
    sequence_length: int = 256  # tokens of each

    def __post_init__(self) -> None:
        for name in ("keep_layers", "keep_kv_heads"):
            keep = getattr(self, name)
            if isinstance(keep, float) and not 0 < keep <= 1:
                raise RecipeError(f"structured({name}={keep}): a share must be above 0 and at most 1; a number of them "
                                  "is written without a point")  # fmt: skip
            if isinstance(keep, int) and keep < 1:
                raise RecipeError(f"structured({name}={keep}): at least 1 must stay")
            if isinstance(keep, float) and keep == 1:  # not to be taken for 1 of them, which is equal in Python
                object.__setattr__(self, name, None)
        check_samples(self)

    @property
    def calibration(self) -> tuple[int, int] | None:
        measures = (self.choose != "position" and self.keep_layers is not None) or (
            self.heads != "position" and self.keep_kv_heads is not None
        )
        return (self.samples, self.sequence_length) if measures else None

    def reshape(self, model: "nn.Module") -> "nn.Module":
        import torch

        layers, heads = self._counts(model)
        architectures.cuts.keep_layers(
            model, layers_by_position(layers, len(architectures.decoder.decoder_blocks(model)))
        )
        for block in architectures.decoder.decoder_blocks(model):
            if heads < block.heads[1]:
                architectures.cuts.keep_heads(block, torch.arange(heads))
        return architectures.cuts.conform(model)

    def apply(self, model: "nn.Module", context: "Context") -> "nn.Module":
        """Raises LayerError: a weight is not finite, or groups of a packed layer cannot be cut."""
        architectures.cuts.check_weights(model)
        count, heads = self._counts(model)
        before = architectures.decoder.decoder_blocks(model)
        kept, scores = self._choose_layers(model, count, context)
        architectures.cuts.keep_layers(model, kept)
        cut = self._cut_heads(model, heads, context)
        place, names = {old: new for new, old in enumerate(kept)}, [block.name for block in before]
        for i, block in enumerate(before):
            for name, _ in block.linears():
                if i not in place:
                    what = f"{spell(self)}: layer {i} of {len(before)} is none of the {count} that stay{scores[i]}"
                    context.report.append(LayerReport(name, "removed", what))
                    continue
                now = name.replace(block.name, names[place[i]], 1)
                words = cut.get(now, LEFT_ALONE)
                moved = "" if now == name else f"; now {now}"
                context.report.append(LayerReport(name, "replaced" if now in cut else "kept", words + moved))
        conformed = architectures.cuts.conform(model)
        if conformed is not model:
            was, now = type(model).__name__, type(conformed).__name__
            words = f"a {now}, the same function: a {was} wants a width that its number of heads divides"
            context.report.append(LayerReport("model", "replaced", words))
        return conformed

    def _counts(self, model: "nn.Module") -> tuple[int, int]:
        """Layers, and KV heads of each, that stay.

        Raises:
            LayerError: there are fewer of them, or no groups of heads.
        """
        blocks = architectures.decoder.decoder_blocks(model)
        layers = _count(self.keep_layers, len(blocks))
        if layers > len(blocks):
            raise LayerError(
                f"structured(keep_layers={layers}): the model has {len(blocks)} layers, {blocks[0].name} to "
                f"{blocks[-1].name}; allowed are 1 to {len(blocks)}, a share, or none for all"
            )
        queries, there = blocks[0].heads
        attention = blocks[0].full(blocks[0].attention.module)
        heads = _count(self.keep_kv_heads, there)
        if heads > there:
            raise LayerError(
                f"structured(keep_kv_heads={heads}): {attention} has {there} heads of keys and values; "
                f"allowed are 1 to {there}, a share, or none for all"
            )
        if heads < there == queries:
            raise LayerError(
                f"structured(keep_kv_heads={self.keep_kv_heads}): {attention} has no grouped heads, "
                f"{there} of keys and values for {queries} of queries; keep_kv_heads=none removes layers alone"
            )
        return layers, heads

    def _choose_layers(self, model: "nn.Module", count: int, context: "Context") -> tuple[list[int], list[str]]:
        """Numbers of the layers that stay, and for each layer what was measured of it, in words."""
        total = len(architectures.decoder.decoder_blocks(model))
        if self.choose == "position" or count == total:
            return layers_by_position(count, total), [""] * total
        if self.choose == "similarity":
            found = calibration.importance.layer_similarity(model, context.ids)
            importance, words = [-x for x in found], [f", similarity {x:.4f}" for x in found]
        else:
            importance = calibration.importance.perplexity_without(model, context.ids)
            words = [f", perplexity without it {x:.4g}" for x in importance]
        return most(importance, count), words

    def _cut_heads(self, model: "nn.Module", count: int, context: "Context") -> dict[str, str]:
        """Removes the heads of every block; what to say of each layer that changed, by name."""
        import torch

        blocks, words = architectures.decoder.decoder_blocks(model), {}
        queries, there = blocks[0].heads
        if count == there:
            return {}
        measured = self.heads == "importance"
        inputs = calibration.capture.Inputs.of_first_block(model, context.ids) if measured else None
        for i, block in enumerate(blocks):
            kept = list(range(count))
            if inputs is not None:
                kept = most(calibration.importance.head_contribution(block, inputs).tolist(), count)
            changes = architectures.cuts.keep_heads(block, torch.tensor(kept))
            if inputs is not None:
                inputs.advance(block)
            group = queries // there
            names = ", ".join(map(str, kept))
            what = f"{spell(self)}: KV heads {names} of {there} stay, {count * group} of {queries} query heads"
            words |= {name: what + how for name, how in changes.items()}
            context.progress(i + 1, len(blocks), spell(self))
        return words


def layers_by_position(kept: int, total: int) -> list[int]:
    """The paper's: the first 40 % of the kept from the front, rounded down, the rest from the back.

    >>> layers_by_position(5, 8)
    [0, 1, 5, 6, 7]
    """
    front = kept * 2 // 5
    return [*range(front), *range(total - kept + front, total)]


def most(importance: Sequence[float], count: int) -> list[int]:
    """The numbers of the `count` most important, ascending; of equals the first.

    >>> most([1.0, 3.0, 1.0, 2.0], 3)
    [0, 1, 3]
    """
    return sorted(sorted(range(len(importance)), key=lambda i: -importance[i])[:count])


def _count(keep: int | float | None, total: int) -> int:
    return (
        total if keep is None else keep if isinstance(keep, int) else max(1, architectures.cuts.share_of(keep, total))
    )
