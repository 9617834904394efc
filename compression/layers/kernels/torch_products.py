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
