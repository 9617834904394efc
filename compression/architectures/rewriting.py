"""Linear layers with other weights in the place of those that are there; no tensor is written into."""

from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block
from compression.errors import LayerError
from compression.layers.dense import Dense, dense_linear
from compression.layers.linear import Linear


def put(owner: Any, path: str, change: Any, *, produces: bool = False) -> None:
    """Put a dense layer in the place of one: `change` takes its weight and bias in fp64 and gives the new ones.

    A quantizer of its outputs stays, unless it is these that change (`produces`).
    """
    model = owner.module if isinstance(owner, Block) else owner
    layer, leaving = model.get_submodule(path), None
    if isinstance(layer, Linear):
        leaving = layer.output_part
        if layer.input_part is not None or (leaving is not None and produces):
            raise LayerError(f"{path}: what it reads or puts out is quantized, which an edit of its weight would "
                             "upset; put the step that quantizes it last")  # fmt: skip
        if any(part.simulated or part.kind in ("codes", "rounded") for part in layer.weight_part.summands):
            raise LayerError(f"{path} is packed; make it dense before it is edited")
        layer = layer.to_linear()
    bias = None if layer.bias is None else layer.bias.double()
    weight, bias = change(layer.weight.double(), bias)
    dtype = layer.weight.dtype
    dense = dense_linear(weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype))
    model.set_submodule(
        path, dense if leaving is None else Linear(Dense(dense.weight), dense.bias, output_part=leaving)
    )


def added(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def by_head(order: Tensor, size: int) -> Tensor:
    """Places of channels from those within each head, (heads, head size)."""
    if order.ndim != 2 or order.shape[1] != size:
        raise LayerError(f"an order of the channels of heads must be (heads, {size}), not {tuple(order.shape)}")
    return (order + torch.arange(len(order), device=order.device)[:, None] * size).flatten()


def is_order(order: Tensor) -> bool:
    return order.is_meta or torch.equal(order.sort().values, torch.arange(len(order), device=order.device))
