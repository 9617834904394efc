"""Ranges as whole numbers: the step and the zero point that a range gets, and their simulated rounding.

x becomes s (q - z), q = round(x / s) + z, cut off to the numbers of `bits` bits. Symmetric: -(2**(bits - 1) - 1) up to
its negative, z = 0. Asymmetric: 0 to 2**bits - 1, z a whole number, which need not be one of these: a range far from
zero is as fine as one around it.

Powers of two (fixed point): s is rounded up to the next one, so that nothing is cut off.
"""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["float", "power_of_two"]
SCALES = ("float", "power_of_two")
SMALLEST = 1e-30  # that a step counts as


def edges(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest number."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def power_of_two(steps: Tensor) -> Tensor:
    """The smallest powers of two that are not below positive numbers."""
    fraction, exponent = torch.frexp(steps)
    return torch.ldexp(torch.ones_like(steps), exponent - (fraction == 0.5).to(exponent.dtype))


def fit(low: Tensor, high: Tensor, bits: int, *, symmetric: bool, scale: Scale = "float") -> tuple[Tensor, Tensor]:
    """Steps and zero points, fp32, for ranges `low` to `high`; NaN where a range is."""
    low, high = low.float(), high.float()
    first, last = edges(bits, symmetric)
    top = torch.maximum(high, -low)
    steps = top / last if symmetric else (high - low) / (last - first)
    if not symmetric:
        steps = torch.where(high == low, low.abs(), steps)  # a constant is a number itself
    steps = torch.where(steps < SMALLEST, 1, steps)  # but not NaN
    if scale == "power_of_two":
        steps = torch.where(steps.isfinite(), power_of_two(steps), steps)
    return steps, torch.zeros_like(steps) if symmetric else first - (low / steps).round()


def rounded(x: Tensor, steps: Tensor, zeros: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """What becomes of fp32 x under steps and zero points that are broadcast to it."""
    first, last = edges(bits, symmetric)
    return ((x / steps).round_() + zeros).clamp_(first, last).sub_(zeros).mul_(steps)


def widest(low: Tensor, high: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The widest of the ranges (n,) in each of `count` clusters, `index` int64 (n,); 0 to 0 of one that has none."""
    nothing = low.new_zeros(count)
    return (
        nothing.scatter_reduce(0, index, low, "amin", include_self=False),
        nothing.scatter_reduce(0, index, high, "amax", include_self=False),
    )


def thresholds(most: float, count: int) -> list[float]:
    """`count` numbers from `most` down towards 0.1 in equal ratios; of small ones towards a tenth."""
    least = min(0.1, most / 10)
    return [most * (least / most) ** (i / count) for i in range(count)] if most > 0 else [1.0]
