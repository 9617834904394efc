"""A quantizer of a layer's inputs to whole numbers, of any granularity.

    tensor    one static step for all inputs
    cluster   one static step for each cluster of channels
    token     a step for each token, found at run time
    group     a step for each group of channels of a token, found at run time

Steps stand for ranges around zero (symmetric) or anywhere (with zero points), and are real numbers or powers of two.
The layers of `activations.TokenRange`, which products of whole numbers take, are the symmetric tensor and token; all
else is computed in floating point on the rounded numbers (`simulated`).
"""

from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.activations import TokenRange
from compression.layers.parts import InputPart, part, straight_through
from compression.numeric import whole_numbers
from compression.numeric.checks import check_finite, check_one_of, check_shape, check_size
from compression.numeric.grouping import check_group

STATIC, DYNAMIC = ("tensor", "cluster"), ("token", "group")
GRANULARITIES = (*STATIC, *DYNAMIC)
MOST_CLUSTERS = 2**15


@part("affine_range", place="input")
class AffineRange(InputPart):
    """Whole numbers of `bits` bits.

    Args:
        bits: 2 to 8.
        granularity: what shares a step.
        group_size: channels of a group; -1 for all other granularities.
        symmetric: whether ranges lie around zero.
        scale: "float", or "power_of_two" for fixed point.
        steps, zeros: fp32 (clusters,) of static ranges, None of those that are found at run time; a tensor has one.
        index: of clusters, that of each channel, int16 (cols,).
        offsets: fp32 (cols,), taken off x before it is rounded and added behind; None: nothing is. What a bias of the
            layer would make up for, is made up for here, whatever stands in front of the layer.

    Raises:
        LayerError: these do not go together.

    Sources: clusters as RPTQ, arXiv 2304.01089, section 3; offsets as the shift of Outlier Suppression+, arXiv
    2304.09145, section 4.1. Departure: RPTQ puts the channels of a cluster side by side. Here they stay where they
    are, and each knows its cluster, which gives the same numbers.
    """

    simulated = True

    def __init__(
        self,
        bits: int = 8,
        *,
        granularity: str = "token",
        group_size: int = -1,
        symmetric: bool = True,
        scale: str = "float",
        steps: Tensor | None = None,
        zeros: Tensor | None = None,
        index: Tensor | None = None,
        offsets: Tensor | None = None,
    ):
        super().__init__()
        check_size("bits", bits, least=2, most=8)
        check_one_of("granularity", granularity, GRANULARITIES)
        check_one_of("scale", scale, whole_numbers.SCALES)
        check_one_of("symmetric", symmetric, (True, False))
        if (granularity == "group") != (group_size != -1):
            raise LayerError(f"group_size={group_size} beside granularity={granularity}: groups alone have a size, "
                             "and it is 1 or more")  # fmt: skip
        if (steps is None) != (granularity in DYNAMIC):
            raise LayerError(f"granularity={granularity}: static ranges, found on calibration text, are those of "
                             f"{' and '.join(STATIC)}; {' and '.join(DYNAMIC)} find theirs at run time")  # fmt: skip
        if (index is None) == (granularity == "cluster"):
            raise LayerError(f"granularity={granularity}: clusters have the index of each channel, all else has none")
        self.bits, self.granularity, self.group_size = bits, granularity, group_size
        self.symmetric, self.scale = symmetric, scale
        zeros = None if symmetric else zeros
        for name, tensor in (("steps", steps), ("zeros", zeros), ("offsets", offsets)):
            self.register_buffer(name, None if tensor is None else tensor.detach().float())
        self.register_buffer("index", None if index is None else index.to(torch.int16))
        self.check()

    @classmethod
    def empty(
        cls,
        rows: int,
        cols: int,
        *,
        bits: Any,
        granularity: Any,
        group_size: Any,
        symmetric: Any,
        scale: Any,
        clusters: Any,
        shifted: Any,
    ) -> Self:
        check_one_of("shifted", shifted, (True, False))
        check_one_of("symmetric", symmetric, (True, False))
        check_one_of("granularity", granularity, GRANULARITIES)
        if granularity == "group":
            check_size("group_size", group_size, least=1)
            check_group(cols, group_size)
        static = granularity in STATIC
        check_size("clusters", clusters, least=int(static), most=MOST_CLUSTERS if static else 0)
        found = torch.empty(clusters, device="meta") if static else None
        return cls(
            bits, granularity=granularity, group_size=group_size, symmetric=symmetric, scale=scale,
            steps=found, zeros=found,
            index=torch.empty(cols, dtype=torch.int16, device="meta") if granularity == "cluster" else None,
            offsets=torch.empty(cols, device="meta") if shifted else None,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits, "granularity": self.granularity, "group_size": self.group_size,
            "symmetric": self.symmetric, "scale": self.scale,
            "clusters": 0 if self.steps is None else len(self.steps), "shifted": self.offsets is not None,
        }  # fmt: skip

    @property
    def words(self) -> str:
        of = {"tensor": "layer", "token": "token", "group": f"group of {self.group_size}",
              "cluster": f"cluster, {self.settings['clusters']} clusters"}[self.granularity]  # fmt: skip
        steps = "step that is a power of two" if self.scale == "power_of_two" else "step"
        ends = "" if self.symmetric else ", asymmetric"
        shifted = ", shifted at run time" if self.offsets is not None else ""
        return f"activations in {self.bits} bits, one {steps} per {of}{ends}{shifted}"

    def check(self) -> None:
        if self.steps is not None:
            count = (1 if self.granularity == "tensor" else len(self.steps),)
            for name in ("steps", "zeros"):
                if getattr(self, name) is not None:
                    check_finite(name, check_shape(self, name, count, {torch.float32}))
            if not self.symmetric and self.zeros is None:
                raise LayerError("ranges that are not symmetric have zero points")
            if not self.steps.is_meta and not (self.steps > 0).all():
                raise LayerError("steps must be above 0")
            if self.zeros is not None and not self.zeros.is_meta and (self.zeros != self.zeros.round()).any():
                raise LayerError("zero points must be whole numbers")
        if self.index is not None:
            check_shape(self, "index", (len(self.index),), {torch.int16})
            known = self.index.is_meta or ((self.index >= 0) & (self.index < len(self.steps))).all()
            if not known:
                raise LayerError(f"the cluster of a channel must be 0 to {len(self.steps) - 1}")
        if self.offsets is not None:
            check_finite("offsets", check_shape(self, "offsets", (len(self.offsets),), {torch.float32}))

    def columns(self, kept: Tensor) -> "AffineRange":
        """Raises LayerError: some of a group goes, which would change the step of the rest."""
        size, places = self.group_size, kept.to("cpu")
        if self.granularity == "group" and not (len(places) % size == 0 and all(
            int(group[0]) % size == 0 and int(group[-1]) - int(group[0]) == size - 1 for group in places.split(size)
        )):  # fmt: skip
            raise LayerError(f"its inputs are rounded in groups of {size}, which go whole; remove before quantizing")
        own = {name: None if (each := getattr(self, name)) is None else each[kept.to(each.device)]
               for name in ("index", "offsets")}  # fmt: skip
        return AffineRange(
            self.bits, granularity=self.granularity, group_size=size, symmetric=self.symmetric, scale=self.scale,
            steps=self.steps, zeros=self.zeros, **own,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = x.detach().float()
        y = y if self.offsets is None else y - self.offsets
        grouped = y.unflatten(-1, (-1, self.group_size)) if self.granularity == "group" else y
        steps, zeros = self._ranges(grouped)
        found = whole_numbers.rounded(grouped, steps, zeros, self.bits, symmetric=self.symmetric).view(y.shape)
        found = found if self.offsets is None else found.add_(self.offsets)
        return straight_through(x, found.to(x.dtype))

    def _ranges(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and zero points that are broadcast to y."""
        if self.steps is None:
            low, high = torch.aminmax(y, dim=-1, keepdim=True)
            low, high = low.clamp(max=0), high.clamp(min=0)  # so that zeros stay what they are
            return whole_numbers.fit(low, high, self.bits, symmetric=self.symmetric, scale=self.scale)
        zeros = torch.zeros_like(self.steps) if self.zeros is None else self.zeros
        if self.index is None:
            return self.steps, zeros
        index = self.index.long()
        return self.steps[index], zeros[index]


def range_of(
    bits: int,
    static: tuple[Tensor, Tensor] | None = None,
    *,
    symmetric: bool = True,
    scale: str = "float",
    offsets: Tensor | None = None,
) -> TokenRange | AffineRange:
    """The simplest quantizer of a whole layer (`static`: its step and zero point) or of its tokens."""
    if static is None:
        if symmetric and scale == "float" and offsets is None:
            return TokenRange(bits)
        return AffineRange(bits, symmetric=symmetric, scale=scale, offsets=offsets)
    steps, zeros = static
    if symmetric and offsets is None:
        return TokenRange(bits, steps)
    return AffineRange(
        bits, granularity="tensor", symmetric=symmetric, scale=scale, steps=steps, zeros=zeros, offsets=offsets
    )
