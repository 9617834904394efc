"""RPTQ: static steps of activations for clusters of channels that have like ranges.

Paper: arXiv 2304.01089, section 3. The channels of what layers read are clustered by (max, min) on calibration text
(k-means), and each cluster has one static step and zero point; heads of values have clusters of their own. Weights have
one scale per output row, their codes by GPTQ, arXiv 2210.17323 (`rounding`).
Departures: the authors put the channels of a cluster side by side, so that a kernel reads one step for many neighbours,
and fold that order into weights. Here channels stay, and each has the number of its cluster: the same numbers without a
permutation, and none is gathered behind norms, which no weight in front could take in across the residual stream.
Where keys and values share heads between queries, so do their clusters.
Limits: queries and keys are not rounded (the authors' R2), which only a quantized cache would need. No kernel computes
with steps for clusters (`simulated`). With one cluster it is the asymmetric static form of `int8`.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compression import layers, numeric
from compression.errors import RecipeError
from compression.methods.base import BlockMethod, Context, method
from compression.methods.quantization.weight_activation.observed import Observed
from compression.methods.rounding import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from compression.architectures.decoder import Block, Site
    from compression.calibration.capture import Seen
    from compression.calibration.ranges import Ranges


@method("rptq", needs=("calibration",), paper="arXiv:2304.01089")
class RPTQ(Observed, Rounding, BlockMethod):
    """Weights and activations in few bits, one static range of activations per cluster of channels (RPTQ)."""

    bits: Literal[3, 4, 6, 8] = 4  # of weights
    activation_bits: Literal[3, 4, 6, 8] = 4  # of whole numbers that activations become
    clusters: int = 32  # of the channels that a layer reads
    head_clusters: int | None = 4  # of each head of values; none: these are clustered as all other channels
    rounding: Literal["nearest", "gptq"] = "gptq"  # of weights; gptq: those to come make up for the error so far

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("clusters", 1024), ("head_clusters", 32)):
            if not 1 <= (getattr(self, name) or 1) <= most or getattr(self, name) == 0:
                raise RecipeError(f"rptq({name}={getattr(self, name)}): must be 1 to {most}")

    def compress_block(self, block: "Block", seen: "Seen", context: Context) -> None:
        ranges, parts = seen.inputs(self.ranging()), {}
        for site in block.sites:
            for stack in site.row.stacks:
                names = [block.full(path) for path in stack]
                parts |= dict.fromkeys(names, self._entering(site, ranges[names[0]]))
        self.round_block(block, seen, context, partial(self._rounded, parts))

    def _entering(self, site: "Site", ranges: "Ranges") -> Any:
        index, count = self._clustered(site, ranges)
        steps, zeros = ranges.fit(self.activation_bits, symmetric=False, index=index, count=count)
        return self._part(steps, zeros, index)

    def _clustered(self, site: "Site", ranges: "Ranges") -> "tuple[Tensor, int]":
        """The cluster of each channel, and how many there are."""
        import torch

        low, high = site.ends(ranges.low, ranges.high)
        k_means, clusters, points = numeric.clusters.k_means, self._of_head(site), torch.stack([high, low], 1)
        if clusters is None:
            return k_means(points, self.clusters)[site.channels], self._count(site)
        heads = enumerate(points.split(site.block.head_size))
        index = torch.cat([k_means(each, clusters) + clusters * number for number, each in heads])
        return index[site.channels], self._count(site)

    def _of_head(self, site: "Site") -> int | None:
        return self.head_clusters if site.row.of == "values" else None

    def _count(self, site: "Site") -> int:
        clusters = self._of_head(site)
        return self.clusters if clusters is None else clusters * site.block.heads[1]

    def _part(self, steps: "Tensor", zeros: "Tensor", index: "Tensor") -> Any:
        return layers.ranges.AffineRange(
            self.activation_bits, granularity="cluster", symmetric=False, steps=steps, zeros=zeros, index=index
        )

    def _rounded(self, parts: "dict[str, Any]", name: str, linear: Any) -> Any:
        return layers.rounded.whole_numbers(linear, bits=self.bits, input_part=parts[name])

    def shape_block(self, block: "Block") -> None:
        import torch

        for site in block.sites:
            cols = site.readers[0].in_features
            steps = torch.empty(self._count(site), device="meta")
            part = self._part(steps, steps, torch.empty(cols, dtype=torch.int16, device="meta"))
            for name, linear in zip(site.names, site.readers, strict=True):
                block.replace(name, self._rounded({name: part}, name, linear))
