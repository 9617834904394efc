"""Static ranges of activations, from calibration text: what observers keep of channels, and the ranges that follow.

    min_max         the smallest and the largest value
    moving_average  the mean of those of each sample of text, the latest weighing the most: m becomes 0.99 m + 0.01 new
    percentile      what 99.99 % of the values lie within, half of the others beyond either end
    mse             of the ranges that are the whole one scaled down, that with the least squared error of rounding

The last two look at some of the tokens, evenly spread, `mse` at fewer. Of several channels that share a range, it is
the widest of theirs for the first two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compression.calibration.observers import Hessian, Reached, Sample, _finite
from compression.numeric import whole_numbers
from compression.numeric.whole_numbers import Scale

Rule = Literal["min_max", "moving_average", "percentile", "mse"]
MOMENTUM = 0.99
WITHIN = 0.9999
TOKENS = 4096  # of the text that `percentile` looks at
VALUES = 2**19  # that `mse` looks at
SHRUNK = tuple(1 - n / 50 for n in range(45))  # to which part of the whole range


@dataclass(frozen=True)
class Ranges:
    """Of the channels of what reaches a layer.

    Attributes:
        low, high: fp32 (cols,).
        sample: some of the activations, fp32 (tokens, cols), of rules that look at them.
        reached: largest values and Hessian, if these were asked for.
    """

    low: Tensor
    high: Tensor
    rule: Rule = "min_max"
    sample: Tensor | None = None
    reached: Reached | None = None

    @property
    def largest(self) -> Tensor:
        """Absolute, fp32 (cols,)."""
        return torch.maximum(self.high, -self.low)

    def shifted(self, offsets: Tensor | None) -> "Ranges":
        """Of what is left once numbers (cols,), if any, are taken off."""
        if offsets is None:
            return self
        offsets = offsets.to(self.low)
        sample = None if self.sample is None else self.sample - offsets
        return replace(self, low=self.low - offsets, high=self.high - offsets, sample=sample)

    def fit(
        self, bits: int, *, symmetric: bool, index: Tensor | None = None, count: int = 1, scale: Scale = "float"
    ) -> tuple[Tensor, Tensor]:
        """Steps and zero points, fp32 (count,).

        Args:
            index: int64 (cols,), the cluster of each channel, below `count`; None: one for all of them.
        """
        index = torch.zeros(len(self.low), dtype=torch.int64) if index is None else index
        index = index.to(self.low.device)
        low, high = whole_numbers.widest(self.low, self.high, index, count)
        if self.sample is not None and len(self.sample) and self.rule == "percentile":
            low, high = self._within(index, len(low))
        if self.sample is not None and len(self.sample) and self.rule == "mse":
            low, high = self._least(low, high, index, partial(whole_numbers.fit, scale=scale), bits, symmetric)
        return whole_numbers.fit(low, high, bits, symmetric=symmetric, scale=scale)

    def _within(self, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        assert self.sample is not None
        values = [self.sample[:, index == cluster].flatten() for cluster in range(count)]
        values = [each if len(each) else self.sample.new_zeros(1) for each in values]
        beyond = [max(1, round(each.numel() * (1 - WITHIN) / 2)) for each in values]
        low = torch.stack([each.kthvalue(k).values for each, k in zip(values, beyond, strict=True)])
        high = torch.stack([-(-each).kthvalue(k).values for each, k in zip(values, beyond, strict=True)])
        return low, high

    def _least(self, low: Tensor, high: Tensor, index: Tensor, fit: partial[tuple[Tensor, Tensor]], bits: int,
               symmetric: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert self.sample is not None
        x = self.sample[:: -(-self.sample.numel() // VALUES)]
        top = torch.maximum(high, -low)
        middle, half = (torch.zeros_like(top), top) if symmetric else ((high + low) / 2, (high - low) / 2)
        least, best = torch.full_like(top, torch.inf), torch.ones_like(top)
        for shrunk in SHRUNK:
            steps, zeros = fit(middle - shrunk * half, middle + shrunk * half, bits, symmetric=symmetric)
            wrong = whole_numbers.rounded(x, steps[index], zeros[index], bits, symmetric=symmetric).sub_(x)
            errors = torch.zeros_like(top).index_add_(0, index, wrong.square_().sum(0))
            best = torch.where(errors < least, shrunk, best)
            least = torch.minimum(errors, least)
        return middle - best * half, middle + best * half


class Ranging:
    """An observer whose value are `Ranges`.

    Args:
        tokens: how many are to come.
        hessian: whether the Hessian is kept too.
    """

    def __init__(
        self, cols: int, device: torch.device | str = "cpu", *, rule: Rule = "min_max", tokens: int = 1,
        hessian: bool = False,
    ):  # fmt: skip
        self._rule, self._count = rule, 0
        self._first, self._rest = torch.zeros(2, cols, device=device), torch.zeros(2, cols, device=device)
        self._largest = torch.zeros(cols, device=device)
        wanted = min(TOKENS, max(1, VALUES // cols)) if rule == "mse" else TOKENS
        looks = rule in ("percentile", "mse")
        self._sample = Sample(cols, device, every=max(1, tokens // wanted)) if looks else None
        self._hessian = Hessian(cols, device) if hessian else None

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        if not len(flat):
            return
        ends = torch.stack(torch.aminmax(flat, dim=0)).float()
        torch.maximum(self._largest, ends.abs().amax(0), out=self._largest)
        self._take(1, ends, ends * (1 - MOMENTUM))
        for each in self._others():
            each.add(x)

    def _take(self, count: int, first: Tensor, rest: Tensor) -> None:
        """`count` samples whose average is MOMENTUM**count times the one before them, and `rest`."""
        if self._rule == "moving_average":
            if self._count == 0:
                self._first = first
            self._rest = MOMENTUM**count * self._rest + rest
        elif self._count == 0:
            self._first = first
        else:
            (low, high), (lower, higher) = self._first, first
            self._first = torch.stack([torch.minimum(low, lower), torch.maximum(high, higher)])
        self._count += count

    def _others(self) -> Iterator[Sample | Hessian]:
        yield from (each for each in (self._sample, self._hessian) if each is not None)

    def merge(self, other: "Ranging") -> None:
        if other._count:
            self._take(other._count, other._first, other._rest)
        torch.maximum(self._largest, other._largest, out=self._largest)
        for mine, theirs in zip(self._others(), other._others(), strict=True):
            mine.merge(theirs)  # type: ignore[arg-type]

    def value(self) -> Ranges:
        """Raises LayerError: an activation is not finite."""
        largest = _finite(self._largest)
        low, high = self._first
        if self._rule == "moving_average":
            low, high = MOMENTUM**self._count * self._first + self._rest
        reached = None if self._hessian is None else Reached(largest, self._hessian.value())
        return Ranges(low, high, self._rule, None if self._sample is None else self._sample.value(), reached)
