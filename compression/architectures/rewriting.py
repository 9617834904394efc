"""What edits are made of: places and sites by number, and linear layers with other weights in the place of those that
are there; no tensor is written into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block, Decoder, Place, Site
from compression.errors import LayerError
from compression.layers.dense import Dense, dense_linear
from compression.layers.linear import Linear

Change = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]  # of a weight and a bias


def put(owner: Any, path: str, change: Change, *, produces: bool = False) -> None:
    """Put a dense layer in the place of one: `change` takes its weight and bias in fp64 and gives the new ones.

    A quantizer of its outputs stays, unless it is these that change (`produces`). A router keeps its module.
    """
    model = owner.module if isinstance(owner, Block) else owner
    layer, leaving = model.get_submodule(path), None
    if not isinstance(layer, nn.Linear | Linear):
        weight, bias = change(
            layer.weight.double(), None if (b := getattr(layer, "bias", None)) is None else b.double()
        )
        if bias is not None and getattr(layer, "bias", None) is None:
            raise LayerError(f"{path} has no bias to take what an edit would add to its outputs")
        layer.hidden_dim = weight.shape[1]
        layer.weight = parameter(weight.to(layer.weight.dtype).contiguous())
        layer.bias = None if bias is None else parameter(bias.to(layer.weight.dtype))
        return
    if isinstance(layer, Linear):
        leaving = layer.output_part
        if layer.input_part is not None or (leaving is not None and produces):
            raise LayerError(f"{path}: what it reads or puts out is quantized, which an edit of its weight would "
                             "upset; put the step that quantizes it last")  # fmt: skip
        if any(part.simulated or part.kind in ("codes", "rounded", "ggml") for part in layer.weight_part.summands):
            raise LayerError(f"{path} is packed; make it dense before it is edited")
        layer = layer.to_linear()
    bias = None if layer.bias is None else layer.bias.double()
    weight, bias = change(layer.weight.double(), bias)
    dtype = layer.weight.dtype
    dense = dense_linear(weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype))
    model.set_submodule(
        path, dense if leaving is None else Linear(Dense(dense.weight), dense.bias, output_part=leaving)
    )


def turned_heads(matrix: Tensor, queries: int) -> tuple[Change, Change]:
    """What becomes of the layer that makes heads of values, each turned by its own of `matrix` (heads, size, size), and
    of one that reads them, whose `queries` heads share those of values in groups."""
    heads, size, _ = matrix.shape

    def produce(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turn = matrix.to(weight.device, weight.dtype).mT
        turned = (turn @ weight.unflatten(0, (heads, size))).flatten(0, 1)
        return turned, None if bias is None else (turn @ bias.view(heads, size, 1)).flatten()

    def read(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        every = matrix.to(weight.device, weight.dtype).repeat_interleave(queries // heads, 0)
        return torch.einsum("rhi,hij->rhj", weight.unflatten(1, (queries, size)), every).flatten(1), bias

    return produce, read


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


def place_of(decoder: Decoder, number: int) -> Place:
    places = decoder.places()
    if type(number) is not int or not 0 <= number < len(places):
        raise LayerError(f"place={number!r:.80} of the residual stream must be 0 to {len(places) - 1}")
    return places[number]


def site_of(block: Block, number: int) -> Site:
    sites = block.sites
    if type(number) is not int or not 0 <= number < len(sites):
        raise LayerError(f"{block.name}: site={number!r:.80} must be 0 to {len(sites) - 1}")
    return sites[number]


def channel_values(site: Site, values: Tensor, name: str) -> Tensor:
    channels = len(site.producer.weight)
    if values.shape != (channels,):
        raise LayerError(f"{site.names[0]}: {name} must be ({channels},), one for each channel of what it reads, not "
                         f"{tuple(values.shape)}")  # fmt: skip
    return values.double()


def plain(value: Any) -> Any:
    """A field of an edit as JSON: of tensors the shape, of edits what their own `to_json` gives."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "whole": not value.is_floating_point()}
    if hasattr(value, "to_json"):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value
