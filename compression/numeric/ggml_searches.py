"""The searches for the scales of ggml's super-blocks.

    scale_and_minimum     min over s, m <= 0 of sum w (s q + m - x)^2: 21 roundings are tried, each followed by the
                          least squares of s and m (make_qkx2_quants of ggml-quants.c); w = |x| + root mean square
    scale_around_zero     min over s of sum x^2 (s q - x)^2: 19 roundings are tried, each followed by the least squares
                          of s (make_qx_quants)

Sums are taken one weight after the other in fp32, as the scalar code of ggml takes them: another order gives other
bytes. The loops run over the weights of a group; all groups, and the roundings, are in the tensors.
"""

import torch
from torch import Tensor

AT_ONCE = 4096  # groups, so that a tensor of all their roundings stays in the cache
NO_WEIGHT = 1e-15  # groups whose weights are all smaller are zero


def scale_and_minimum(groups: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """For groups fp32 (n, size): scales (n,), what is subtracted (n,), and codes 0 .. `steps` as fp32 (n, size)."""
    found = [_scale_and_minimum(each.t().contiguous(), steps) for each in groups.split(AT_ONCE)]
    scale, least, codes = (torch.cat(each, -1) for each in zip(*found, strict=True))
    return scale, least, codes.t().contiguous()


def scale_around_zero(groups: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """For groups fp32 (n, size): scales (n,), and codes 0 .. 2 `middle` - 1 as fp32 (n, size)."""
    found = [_scale_around_zero(each.t().contiguous(), middle) for each in groups.split(AT_ONCE)]
    scale, codes = (torch.cat(each, -1) for each in zip(*found, strict=True))
    return scale, codes.t().contiguous()


def _scale_and_minimum(x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (size, n). A minimum that is found is where the next roundings begin."""
    spread = (_sum(x * x) / len(x)).double().sqrt().float()  # torch's root of fp32 can be off by one place
    weights = spread + x.abs()
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    flat = high == low
    sum_w, sum_x = _sum(weights), _sum(weights * x)
    inverse = high.new_tensor(steps) / (high - low)  # a number over a tensor is a product with its inverse
    scale, codes = 1 / inverse, _rounded(x, low, inverse, steps)
    best = _error(x, weights, scale, low, codes)
    for step in torch.arange(21, dtype=torch.float32, device=x.device):
        tried = _rounded(x, low, (-1 + 0.1 * step + steps) / (high - low), steps)
        weighted = weights * tried
        total, squares, products = _sum(weighted), _sum(weighted * tried), _sum(weighted * x)
        determinant = sum_w * squares - total * total
        fitted = (sum_w * products - sum_x * total) / determinant
        least = (squares * sum_x - total * products) / determinant
        fitted, least = torch.where(least > 0, products / squares, fitted), least.clamp(max=0)
        error = _error(x, weights, fitted, least, tried)
        better = (determinant > 0) & (error < best)
        best, scale, low = (torch.where(better, *pair) for pair in ((error, best), (fitted, scale), (least, low)))
        codes = torch.where(better, tried, codes)
    return torch.where(flat, 0.0, scale), -low, torch.where(flat, 0.0, codes)


def _error(x: Tensor, weights: Tensor, scale: Tensor, low: Tensor, codes: Tensor) -> Tensor:
    difference = scale * codes + low - x
    return _sum(weights * (difference * difference))


def _rounded(x: Tensor, low: Tensor, inverse: Tensor, steps: int) -> Tensor:
    return (inverse * (x - low)).round_().clamp_(0, steps)


def _scale_around_zero(x: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """x (size, n)."""
    largest = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    none = largest.abs() < NO_WEIGHT
    largest = torch.where(none, torch.ones_like(largest), largest)
    order = [0, *range(-9, 0), *range(1, 10)]
    tried = middle + torch.tensor(order, dtype=torch.float32, device=x.device) * 0.1  # in fp32
    inverses = -tried[:, None] / largest
    products, squares = torch.zeros_like(inverses), torch.zeros_like(inverses)
    for each in x:
        codes, w = _signed(each, inverses, middle), each * each
        products, squares = products + w * each * codes, squares + w * codes * codes
    scale = torch.where(squares[0] != 0, products[0] / squares[0], 0.0)
    best, chosen = scale * products[0], inverses[0]
    for inverse, product, square in zip(inverses[1:], products[1:], squares[1:], strict=True):
        better = (square > 0) & (product * product > best * square)
        scale = torch.where(better, product / square, scale)
        best = torch.where(better, scale * product, best)
        chosen = torch.where(better, inverse, chosen)
    codes = _signed(x, chosen, middle) + middle
    return torch.where(none, 0.0, scale), torch.where(none, 0.0, codes)


def _signed(x: Tensor, inverse: Tensor, middle: int) -> Tensor:
    return (inverse * x).round_().clamp_(-middle, middle - 1)


def _sum(terms: Tensor) -> Tensor:
    """Over the first dimension, one after the other."""
    found = terms[0]
    for each in terms[1:]:
        found = found + each
    return found
