"""Zero points that are sought by the weights alone, as HQQ does."""

import torch
from torch import Tensor

from compression.numeric.grids import AffineGrid
from compression.numeric.rounding import Rounded

BLOCK = 2**18  # weights whose zero points are sought at once: what that takes stays in the processor's cache
NO_ERROR = -1e6  # for its logarithm: any power of it is 0, 1 or infinite


def half_quadratic(
    weight: Tensor,
    grid: AffineGrid,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """Zero points that lower sum |W - Q|^norm, norm < 1, so that few large errors count less than many small ones.

    Half-quadratic splitting, with e an estimate of the error that is sparse, and z the zero point of a group:

        e <- shrink(W - Q)      shrink(x) = sign(x) max(0, |x| - |x|^(norm - 1) / beta)
        z <- mean of (q - (W - e) / s) over the group,      beta <- kappa beta

    Args:
        weight: fp32 (rows, cols).
        grid: with `float_zeros`.
        dtype: of stored scales and zero points, by default that of the weight.

    It starts where the smallest weight (or 0) is the lowest level. A group keeps the best zero point that it had, as it
    is stored; that of rounding to nearest, a whole number, is among them, so that no group ends above it.
    """
    dtype = dtype or weight.dtype
    scales, zeros = grid.expand(grid.fit(weight, dtype), *weight.shape)
    grouped, rows = weight.view(*scales.shape, -1), max(1, BLOCK // weight.shape[1])
    best = []
    for w, s, z in zip(*(t.split(rows) for t in (grouped, scales, zeros)), strict=True):
        best.append(_zero_points(w, s, z, 2**grid.bits - 1, norm, beta, kappa, iterations, dtype))
    params = grid.store(scales, torch.cat(best), dtype)
    return Rounded(grid.encode(weight, params), params)


def _zero_points(
    w: Tensor, scales: Tensor, zeros: Tensor, top: int, norm: float, beta: float, kappa: float, iterations: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The best zero points (rows, groups) of weights (rows, groups, size), of `zeros` and those that the steps make.

    W - e = Q + shrunk, with shrunk = sign(W - Q) min(|W - Q|, |W - Q|^(norm - 1) / beta), so that the second step is

        z <- z - mean of shrunk / s
    """
    s = scales[..., None]
    unit = w / s
    best, least = zeros, torch.full_like(zeros, torch.inf)
    for step in range(iterations + 2):
        z = zeros[..., None]
        error = w - (unit + z).round_().clamp_(0, top).sub_(z).mul_(s)
        size = error.abs()
        log = size.log().clamp_(min=NO_ERROR)  # powers by exp and log: pow is several times as slow
        threshold = (log * (norm - 1)).exp_().div_(beta)
        loss = log.mul_(norm).exp_().sum(-1)
        better = loss < least
        best, least = torch.where(better, zeros, best), torch.where(better, loss, least)
        if step == 0:
            zeros = (-w.amin(-1).clamp_(max=0) / scales).to(dtype).float()
            continue
        shrunk = torch.minimum(size, threshold).copysign_(error)
        zeros = (zeros - shrunk.mean(-1) / scales).to(dtype).float()
        beta *= kappa
    return best
