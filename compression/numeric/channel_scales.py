"""Scales of the channels between two layers, found by search on the output error and folded into what produces them.

Dividing channel j of what produces the inputs of a linear layer by s_j, and multiplying column j of its weight by s_j,
leaves the function of the block as it is, and changes what rounding does to it. Shapes: W (rows, cols) the weights that
read the same inputs x; H = 2/n sum x x^T (cols, cols); s (channels,) as the producer has them: several inputs can be
multiples of one channel (grouped-query attention). All arithmetic is in fp32.

`search` and `clipped` are those of AWQ, arXiv 2306.00978; `weight_only.awq` tells where they depart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import Params
from compression.numeric.rounding import output_error

SEARCH_ROWS = 512  # of each weight, by which its scales are judged
FLOOR = 1e-4  # of a channel's size, as a share of their mean
SHRINKS = tuple(1 - i / 20 for i in range(10))  # of the largest weight of a group, that are tried
CHUNK = 2**18  # weights whose clipping is sought at once: what that takes stays in the processor's cache

# a weight, fp32 (rows, cols), the grid that it is to be rounded on, and H (cols, cols) of what reaches it
Reader = tuple[Tensor, AffineGrid, Tensor]


@dataclass(frozen=True)
class Producer:
    """What the inputs of a stack of layers come from.

    Attributes:
        channels: for each input the channel of the producer that it is a multiple of, int64 (cols,).
        stored: what is divided and then stored densely, (channels,): the weight of a norm, or the bias of a linear
            layer that is itself rounded; None if there is none.
        offset: what is added to what is stored before it is multiplied by.
    """

    channels: Tensor
    stored: Tensor | None
    offset: float = 0.0

    def pooled(self, values: Tensor) -> Tensor:
        """The mean of `values` (cols,) over the inputs of each channel, (channels,)."""
        counts = self.channels.bincount()
        return values.new_zeros(len(counts)).index_add_(0, self.channels, values) / counts

    def divisible(self, scales: Tensor) -> Tensor:
        """The scales next to `scales` (channels,) that divide what is stored without rounding it.

        What is stored is rounded first, n' = round(n / s), and s' = n / n' is what it is then divided by exactly: a
        weight scaled by s' makes up for the rounding. 1 where n' would vanish or overflow.
        """
        if self.stored is None:
            return scales
        stored = self.stored.float() + self.offset
        exact = stored / ((stored / scales - self.offset).to(self.stored.dtype).float() + self.offset)
        return torch.where(stored == 0, scales, torch.where(exact.isfinite() & (exact > 0), exact, 1))

    def divided(self, scales: Tensor) -> Tensor | None:
        """What is stored, in its dtype, divided by scales (channels,) that `divisible` gave."""
        if self.stored is None:
            return None
        return ((self.stored.float() + self.offset) / scales - self.offset).to(self.stored.dtype)


@dataclass(frozen=True)
class AwqScales:
    """How scales are sought.

    Attributes:
        ratios: how many there are, evenly spaced in [0, 1).
        duo_scaling: whether the sizes of the weights count too; see `candidates`.
    """

    ratios: int
    duo_scaling: bool

    def search(self, readers: Sequence[Reader], producer: Producer, dtype: torch.dtype) -> tuple[float, Tensor]:
        """The ratio, of those of `candidates`, and its scales (channels,) with the least output error (eq. 4).

        Summed over the readers is tr(D H D^T) / tr(W H W^T), D = Q(W s) / s - W, with Q rounding to nearest on the
        reader's grid, whose scales are stored in `dtype`. Of each weight at most SEARCH_ROWS rows are looked at, evenly
        spread. Where readers see different tokens, as experts do, channels are as large as in the mean of their H.

        Raises:
            LayerError: H is not finite, or a scaled weight exceeds `dtype`.
        """
        seen = list({id(hessian): hessian for _, _, hessian in readers}.values())
        if not all(hessian.isfinite().all() for hessian in seen):
            raise LayerError("the inputs of the calibration text to this layer are not finite; check the base")
        readers = [(weight[:: -(-len(weight) // SEARCH_ROWS)], grid, hessian) for weight, grid, hessian in readers]
        wholes = [float(output_error(weight, hessian).sum()) for weight, _, hessian in readers]
        sizes = producer.pooled(_relative_size(readers)) if self.duo_scaling else None
        squares = seen[0].diagonal() if len(seen) == 1 else torch.stack([h.diagonal() for h in seen]).mean(0)
        magnitude = producer.pooled(squares.sqrt())
        best, least = (0.0, torch.ones_like(magnitude)), torch.inf
        for ratio, wanted in candidates(magnitude, self.ratios, sizes):
            scales = producer.divisible(wanted)
            columns, error = scales[producer.channels], 0.0
            for (weight, grid, hessian), whole in zip(readers, wholes, strict=True):
                scaled = weight * columns
                difference = nearest(scaled, grid, grid.fit(scaled, dtype)).sub_(scaled).div_(columns)
                error += float(output_error(difference, hessian).sum()) / whole if whole > 0 else 0.0
            if error < least:
                best, least = (ratio, scales), error
        return best


def candidates(magnitude: Tensor, ratios: int, sizes: Tensor | None = None) -> Iterator[tuple[float, Tensor]]:
    """Ratios a = i / `ratios` in [0, 1) and scales magnitude^a (channels,), eq. 5, whose extremes are inverse to each
    other. With the relative `sizes` of the weights (channels,), magnitude^a / sizes^(1 - a), and 1 before them.
    """
    magnitude = _floored(magnitude)
    if sizes is not None:
        sizes = _floored(sizes)
        yield 0.0, torch.ones_like(magnitude)
    for i in range(ratios):
        ratio = i / ratios
        scales = magnitude.pow(ratio) if sizes is None else magnitude.pow(ratio) / sizes.pow(1 - ratio)
        yield ratio, scales / (scales.max() * scales.min()).sqrt()


def clipped(weight: Tensor, hessian: Tensor, grid: AffineGrid, dtype: torch.dtype) -> Params:
    """Stored parameters of a weight (rows, cols) whose groups may leave out their largest weights.

    Every group of a row is fitted to its weights cut off at each of SHRINKS of its largest absolute one, and keeps the
    fit with the least error of its own part of the output: that by the block of H on the diagonal.
    """
    cols = weight.shape[1]
    size = cols if grid.group_size == -1 else grid.group_size
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, cols, size)])
    parts = [_clipped(part, blocks, grid, dtype) for part in weight.split(max(1, CHUNK // cols))]
    return grid.store(*(torch.cat(levels) for levels in zip(*parts, strict=True)), dtype)


def _clipped(weight: Tensor, blocks: Tensor, grid: AffineGrid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points (rows, groups); `blocks` of H (groups, size, size)."""
    by_group = weight.view(len(weight), len(blocks), -1)
    largest = by_group.abs().amax(-1, keepdim=True)
    best, least = grid.expand(grid.fit(weight, dtype), *weight.shape), torch.inf
    for shrink in SHRINKS:
        limit = shrink * largest
        params = grid.fit(by_group.clamp(-limit, limit).view_as(weight), dtype)
        difference = nearest(weight, grid, params).sub_(weight).view_as(by_group).transpose(0, 1)
        error = (difference.bmm(blocks) * difference).sum(-1).t()
        better = error < least
        levels = zip(grid.expand(params, *weight.shape), best, strict=True)
        best = tuple(torch.where(better, new, old) for new, old in levels)
        least = torch.where(better, error, least)
    return best


def nearest(weight: Tensor, grid: AffineGrid, params: Params) -> Tensor:
    """What the grid decodes of what it encodes, without the codes: fp32 (rows, cols)."""
    scales, zeros = (levels[..., None] for levels in grid.expand(params, *weight.shape))
    levels = (weight.view(*scales.shape[:2], -1) / scales).add_(zeros).round_().clamp_(0, 2**grid.bits - 1)
    return levels.sub_(zeros).mul_(scales).view_as(weight)


def _relative_size(readers: Sequence[Reader]) -> Tensor:
    """Mean over all rows of |W| / the largest |W| of the group, (cols,)."""
    parts = []
    for weight, grid, _ in readers:
        by_group = weight.abs().unflatten(-1, (-1, weight.shape[1] if grid.group_size == -1 else grid.group_size))
        parts.append((by_group / by_group.amax(-1, keepdim=True)).nan_to_num_(0).flatten(1))
    return torch.cat(parts).mean(0)


def _floored(sizes: Tensor) -> Tensor:
    """As multiples of their mean, at least FLOOR; 1 where all are zero."""
    return torch.where(sizes.mean() > 0, (sizes / sizes.mean()).clamp(min=FLOOR), 1)
