"""Which weights of a layer become zero, and what the others become.

Every choice here is a ranking: of a unit of n weights the floor(sparsity * n) with the lowest scores become zero, with
a pattern n:m all but n of every m neighbouring inputs. Among equal scores those that come first go first, so that
exactly the promised number goes. Shapes: W (rows, cols); x (cols,); H = 2/n sum x x^T (cols, cols). Masks are true
where a weight goes. All arithmetic is in fp32.

SparseGPT (arXiv 2301.00774) is GPTQ's column loop with zero or the weight itself in the place of levels, so that it is
written on `numeric.rounding.Columns`: with H = R R^T, R upper triangular, taking w_j away costs w_j^2 R_jj^2, the
paper's w^2 / [H^-1]_jj^2 with its Cholesky factor of the inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from compression.numeric.rounding import Columns, upper_factor

BLOCK = 128  # columns whose mask SparseGPT chooses at once, B_s of the paper,
BLOCKS = 8  # but of narrow layers fewer, so that there are at least so many blocks

Pattern = tuple[int, int]  # n weights of every m neighbouring ones stay


def removed(sparsity: float, count: int) -> int:
    """floor(sparsity * count), of the number as it is written: 0.29 of 100 are 29, which floats make 28.

    >>> removed(0.29, 100), removed(0.5, 5)
    (29, 2)
    """
    return int(Fraction(repr(sparsity)) * count)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` lowest scores of each slice along the last dimension are; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":  # several times as fast as sorting
        parted = np.partition(scores.numpy(), count - 1, axis=-1)
        threshold = torch.from_numpy(parted[..., count - 1 : count])
    else:
        threshold = scores.sort(dim=-1).values[..., count - 1 : count]
    mask = scores <= threshold
    if (mask.sum(-1) == count).all():
        return mask
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def lowest_of_patterns(scores: Tensor, pattern: Pattern) -> Tensor:
    """Where the m - n lowest of every m neighbours along the last dimension are; of equal ones the first."""
    n, m = pattern
    members = scores.unflatten(-1, (-1, m)).movedim(-1, 0).contiguous()  # (m, ...): few, long, contiguous
    rank = torch.zeros_like(members, dtype=torch.uint8)
    for i in range(m):
        for j in range(m):
            if j != i:
                rank[i] += members[j] <= members[i] if j < i else members[j] < members[i]
    return (rank < m - n).movedim(0, -1).flatten(-2)


def smallest_overall(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Where the smallest of all weights are, of tensors that are never held as one; of equal ones those of the first.

    The bits of |w| in fp32, read as whole numbers, are in the order of |w|. Two counts of 16 bits each find the
    threshold.
    """
    left, threshold = removed(sparsity, sum(weight.numel() for weight in weights)), 0
    if left == 0:
        return [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    for shift in (16, 0):
        counts = torch.zeros(2**16, dtype=torch.int64)
        for weight in weights:
            bits = _bits(weight).flatten()
            if shift == 0:
                bits = bits[bits >> 16 == threshold >> 16]
            counts += (bits >> shift & 0xFFFF).bincount(minlength=2**16).cpu()
        reached = counts.cumsum(0)
        digit = int((reached >= left).nonzero()[0])
        left -= int(reached[digit] - counts[digit])
        threshold |= digit << shift
    masks = []
    for weight in weights:  # `left` of those at the threshold itself go
        bits = _bits(weight)
        equal = bits == threshold
        first = equal & (equal.flatten().cumsum(0).view_as(equal) <= left)
        left -= int(first.sum())
        masks.append((bits < threshold) | first)
    return masks


def _bits(weight: Tensor) -> Tensor:
    return weight.float().abs().contiguous().view(torch.int32)


def choose(scores: Tensor, sparsity: float, pattern: Pattern | None, *, by_row: bool) -> Tensor:
    """The mask of scores (rows, cols): by the pattern, or the lowest of each row, or of all."""
    if pattern is not None:
        return lowest_of_patterns(scores, pattern)
    units = scores if by_row else scores.reshape(1, -1)
    return lowest(units, removed(sparsity, units.shape[-1])).view_as(scores)


def block_size(cols: int) -> int:
    """Columns whose mask SparseGPT chooses at once: the paper's 128, but of narrow layers an eighth.

    >>> block_size(4096), block_size(256)
    (128, 32)
    """
    return max(1, min(BLOCK, cols // BLOCKS))


@dataclass(frozen=True)
class Pruned:
    """Weights fp32 (rows, cols), one for each that was given; `damping` as in `numeric.rounding.Rounded`."""

    weights: list[Tensor]
    damping: float = 0.0


def sparsegpt(
    weights: Sequence[Tensor], hessian: Tensor, sparsity: float, pattern: Pattern | None, *, damp: float = 0.01
) -> Pruned:
    """SparseGPT of weights that read the same inputs.

    Args:
        weights: fp32 (rows, cols) each.
        hessian: fp32 (cols, cols).
        sparsity: share of each block of columns of a weight that goes, chosen when the loop reaches them (the last
            block may have fewer); without meaning where there is a pattern, which is chosen when the loop reaches it.
        damp: share of the mean of H's diagonal that is added to it; ten times as much as long as H cannot be
            factorized.

    Among equal scores earlier columns go first, then earlier rows. Columns that no input reaches go before all others.

    Raises:
        LayerError: H is not finite, or no damping makes it positive definite.
    """
    factor, damping = upper_factor(hessian, damp)
    cost = factor.diagonal().square() * (hessian.diagonal() > 0)
    counts = [len(weight) for weight in weights]
    columns = _Zeros(torch.cat(list(weights)), factor, cost, counts, sparsity, pattern)
    columns.solve(0, len(cost))
    return Pruned(list(columns.wanted.t().contiguous().split(counts)), damping)


class _Zeros(Columns):
    """`wanted[k]` becomes zero where the mask of column k is set, and stays where it is not."""

    def __init__(
        self,
        weight: Tensor,
        factor: Tensor,
        cost: Tensor,
        counts: list[int],
        sparsity: float,
        pattern: Pattern | None,
    ):
        super().__init__(weight, factor, block_size(len(cost)) if pattern is None else pattern[1])
        self.cost, self.counts, self.sparsity, self.pattern = cost, counts, sparsity, pattern
        self.mask = torch.zeros_like(self.weight, dtype=torch.bool)

    def _begin(self, begin: int, end: int) -> None:
        scores = self.current(begin, end).square_().mul_(self.cost[begin:end, None])
        if self.pattern is not None:
            self.mask[begin:end] = lowest_of_patterns(scores.t(), self.pattern).t()
            return
        masks = [choose(part, self.sparsity, None, by_row=False) for part in scores.split(self.counts, dim=1)]
        self.mask[begin:end] = torch.cat(masks, dim=1)

    def _settle(self, j: int) -> None:
        self.wanted[j].masked_fill_(self.mask[j], 0)
        torch.sub(self.weight[j], self.wanted[j], out=self.difference[j])
