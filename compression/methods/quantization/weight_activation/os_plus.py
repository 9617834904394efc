"""Outlier Suppression+: channels made symmetric by a shift and even by a scale before anything is rounded.

Paper: arXiv 2304.09145, sections 4.1 and 4.2. Channel j of what layers read is shifted by z_j = (max_j + min_j) / 2 and
divided by s_j = max(1, max|X_j - z_j| / t); what is in front takes both in, the readers make up for them. The t of each
site is searched from the largest value (no scale) down, for the least squared error of what the consumer gets
(`calibration.trials`). Weights have one scale per output row, activations one per token or per layer.
`shift=auto` shifts where biases are that take it in: norms with a bias, and values of attention, whose product with the
reader's weight goes onto its bias, where both have one. Elsewhere it scales alone, as the authors' Llama does.
`shift=true` gives values and readers biases that they did not have, and shifts the others at run time; the report says.
Departures: t is searched in equal ratios down to 0.1 (the authors: in equal differences), on two samples. The inputs of
output and down projections are scaled too. `rounding=gptq` chooses weights' codes by GPTQ, arXiv 2210.17323.
Limits: a shift at run time has no kernel (`simulated`). Symmetric channels have no shift.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compression import architectures, calibration, layers, numeric
from compression.errors import RecipeError
from compression.layers.report import LayerReport
from compression.methods.base import BlockMethod, Context, method
from compression.methods.quantization.weight_activation.observed import Observed
from compression.methods.rounding import Rounding

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.architectures.decoder import Block, Site
    from compression.calibration.capture import Seen
    from compression.layers.linear import Linear


@method("os_plus", needs=("calibration",), paper="arXiv:2304.09145")
class OSPlus(Observed, Rounding, BlockMethod):
    """Weights and activations in whole numbers, outlier channels shifted and scaled away (Outlier Suppression+)."""

    bits: Literal[4, 6, 8] = 8  # of weights
    activation_bits: Literal[4, 6, 8] = 8  # of whole numbers that activations become
    activations: Literal["tensor", "token"] = "tensor"  # one step per layer found on calibration text, or one per token
    shift: Literal["auto", True, False] = "auto"  # auto: where there are biases for it; true: everywhere
    steps: int = 20  # thresholds that are tried

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 1000:
            raise RecipeError(f"os_plus(steps={self.steps}): must be 1 to 1000; 1 scales nothing")

    def compress_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        ranges, parts = seen.inputs(calibration.ranges.Ranging), {}
        for site in block.sites:
            parts |= dict.fromkeys(site.names, self._moved(block, seen, site, ranges))
        if self.activations == "tensor" and self.observer != "min_max":
            for name, each in seen.inputs(self.ranging()).items():
                offsets = getattr(parts[name], "offsets", None)
                parts[name] = self._entering(each.shifted(offsets).fit(self.activation_bits, symmetric=True), offsets)
        self._say(block, context)
        self.round_block(block, seen, context, lambda name, linear: self._rounded(linear, parts[name]))

    def _moved(self, block: "Block", seen: "Seen", site: "Site", ranges: "dict[str, Any]") -> Any:
        """Shift and scale what a site's readers take in; the quantizer of what is left."""
        import torch

        each = [ranges[name] for name in site.names]
        low, high = (torch.stack(ends) for ends in ([one.low for one in each], [one.high for one in each]))
        low, high = site.ends(low.amin(0), high.amax(0))
        middle, folds = (low + high) / 2, self._folds(site)
        offsets = middle[site.channels] if self.shift is True and not folds else None
        if folds:
            architectures.edits.Shift(site.number, middle).apply(block)
        if folds or self.shift is True:
            low, high = low - middle, high - middle
        top = torch.maximum(high, -low)

        def entering(scales: "Tensor") -> Any:
            left = None if offsets is None else offsets / scales[site.channels]
            return self._entering(self._static(top / scales), left)

        def form(scales: "Tensor", linear: "nn.Linear") -> "Linear":
            return layers.rounded.scaled(linear, scales[site.channels], self.bits, entering(scales))

        if site.row.fixed is not None:
            return entering(torch.ones_like(top))
        scales = [(top / t).clamp(min=1) for t in numeric.whole_numbers.thresholds(float(top.amax()), self.steps)]
        chosen = scales[calibration.trials.best(seen, site, [partial(form, each) for each in scales])]
        architectures.edits.Divide(site.number, chosen).apply(block)
        return entering(chosen)

    def _folds(self, site: "Site") -> bool:
        """Whether biases take the shift of a site in."""
        there = site.shiftable and all(each.bias is not None for each in (site.producer, *site.readers))
        return site.shiftable if self.shift is True else self.shift == "auto" and there

    def _static(self, top: "Tensor") -> "tuple[Tensor, Tensor] | None":
        most, token = top.amax()[None], self.activations == "token"
        return None if token else numeric.whole_numbers.fit(-most, most, self.activation_bits, symmetric=True)

    def _entering(self, static: Any, offsets: "Tensor | None") -> Any:
        return layers.ranges.range_of(self.activation_bits, static, offsets=offsets)

    def _rounded(self, linear: "nn.Linear", entering: Any) -> "Linear":
        return layers.rounded.whole_numbers(linear, bits=self.bits, input_part=entering)

    def _say(self, block: "Block", context: Context) -> None:
        """Report, once, what became of the shift that no bias takes in."""
        bare = dict.fromkeys(site.row.of for site in block.sites if not self._folds(site))
        done = "shifted where they are read" if self.shift is True else "not shifted"
        entry = LayerReport(architectures.anatomy.NORMS, "kept", f"{self.info.name}: {', '.join(bare)}: {done}")
        if bare and self.shift is not False and entry not in context.report:
            context.report.append(entry)

    def shape_block(self, block: "Block") -> None:
        import torch

        for site in filter(self._folds, block.sites):
            architectures.edits.Shift(site.number, torch.empty(len(site.producer.weight), device="meta")).apply(block)
        for site in block.sites:
            width = torch.empty(site.readers[0].in_features, device="meta")
            part = self._entering(self._static(width), width if self.shift is True and not self._folds(site) else None)
            for name, linear in zip(site.names, site.readers, strict=True):
                block.replace(name, self._rounded(linear, part))
