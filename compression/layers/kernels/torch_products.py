"""Products with a weight that is made anew for each of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def frozen_product(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x W^T with a gradient for x, none for W (rows, cols), which is made anew by dtype on the way back and not kept.

    Otherwise autograd would hold the dense weights of all layers of a model from its forward to its backward.
    """
    return _FrozenProduct.apply(x, weight)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        context.weight = weight
        return x @ weight(x.dtype).t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.weight(gradient.dtype), None


def multiply(x: Tensor, weight: Tensor, threshold: float | None) -> Tensor:
    """x W^T; with a threshold as LLM.int8() has it."""
    return x @ weight.t() if threshold is None else llm_int8_multiply(x, weight, threshold)


def llm_int8_multiply(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Mixed decomposition of LLM.int8(), arXiv 2208.07339, eq. 8.

    Columns of x that hold a value of at least `threshold` anywhere are multiplied as they are; the rest of x is rounded
    to 8 bits with one absmax per row: that of the values below the threshold, those in outlier columns included, as
    bitsandbytes has it. `weight` is the dequantized 8-bit weight, so its rounding is in it already.
    """
    flat = x.reshape(-1, x.shape[-1])
    large = flat.abs() >= threshold
    outlier = large.any(0)
    absmax = flat.masked_fill(large, 0).abs().amax(-1, keepdim=True).float()
    absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    rest = flat.masked_fill(outlier, 0)
    rounded = ((rest * (127 / absmax)).round() * (absmax / 127)).to(x.dtype)
    if rounded.requires_grad:  # rounding has no slope: the gradient passes as if there were none
        rounded = rest + (rounded - rest).detach()
    return (torch.where(outlier, flat, rounded) @ weight.t()).view(*x.shape[:-1], -1)
