"""One decoder block under a calibrated method: what is measured of its inputs, then scaling, and rounding or pruning,
stack by stack.

All layers of a block are changed for the inputs that they have while the block itself is still uncompressed; the blocks
before it are compressed by then. Stacks are done from the last to the first: what a linear is divided by, because those
that read its outputs are scaled, is then known when it is rounded.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block, Site, as_linear
from compression.architectures.rewriting import put
from compression.calibration.capture import Inputs, Stack, stacks_of
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.numeric.channel_scales import SEARCH_ROWS, Producer
from compression.numeric.grouping import decode, quantize
from compression.recipes.registry import spell


@dataclass
class Layer:
    """A linear before it is changed.

    Attributes:
        method: the `CalibratedMethod` with its settings, None if it stays as it is.
        detail: for the report.
        columns: what its weight's columns are multiplied by, (cols,), or None.
        rows: what its outputs are divided by, (rows,), or None.
        bias: divided already.
        quantized: whether its outputs are quantized behind it, for which they keep their scales.
    """

    name: str
    linear: nn.Linear
    method: Any | None
    bias: Tensor | None
    detail: str = LEFT_ALONE
    columns: Tensor | None = None
    rows: Tensor | None = None
    quantized: bool = False

    def path(self, block: Block) -> str:
        """In the block."""
        return self.name.removeprefix(f"{block.name}.")

    def weight(self) -> Tensor:
        return self.linear.weight.detach().float()

    def some_rows(self, most: int) -> Tensor:
        """At most so many rows of the weight, evenly spread."""
        weight = self.linear.weight.detach()
        return weight[:: -(-len(weight) // most)].float()

    def scaled(self) -> Tensor:
        """The weight that is rounded."""
        weight = self.weight() if self.columns is None else self.weight() * self.columns
        return weight if self.rows is None else weight / self.rows[:, None]

    def unscaled(self, weight: Tensor) -> Tensor:
        """The inverse, for a rounded one."""
        weight = weight if self.columns is None else weight / self.columns
        return weight if self.rows is None else weight * self.rows[:, None]


@dataclass
class SameInput:
    """Layers that see the same tokens, and what an observer saw of these."""

    layers: list[Layer]
    observer: Any

    @cached_property
    def seen(self) -> Any:
        """The value of the observer, made once."""
        return self.observer.value()


def compress(block: Block, inputs: Inputs, context: Any) -> None:
    """Replace every linear of the block; one report entry for each, in the order of the module.

    Raises:
        LayerError: a weight or an input is not finite, or layers that read the same input are to be scaled in different
            ways; the message names them.
    """
    layers = {}
    for name, stored in block.linears():
        linear = as_linear(stored)
        quantized = getattr(stored, "output_part", None) is not None
        layers[name] = Layer(name, linear, context.step.for_layer(name), linear.bias, quantized=quantized)
    for name, layer in layers.items():
        if layer.method is not None and not torch.isfinite(layer.linear.weight).all():
            raise LayerError(
                f"{name}: the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too "
                "narrow a dtype"
            )
    sites, device = block.sites, inputs.hidden[0].device
    for site in sites:
        _transform([layers[name] for name in site.names])
    observers = {stack: context.step.method.observer(block.layer(stack.readers[0]).in_features, device)
                 for stack in stacks_of(block)}  # fmt: skip
    routed = inputs.observe(block, lambda stack, x: observers[stack].add(x))
    for site in reversed(sites):
        stacks = [
            SameInput([layers[block.full(path)] for path in readers], observers.pop(Stack(site.row, readers)))
            for readers in site.row.stacks
        ]
        try:
            note = _scale(site, stacks, layers.get(block.full(site.row.producer or "")))
            while stacks:  # what an observer holds of an expert goes with it
                stack = stacks.pop(0)
                for method in dict.fromkeys(layer.method for layer in stack.layers):
                    if method is not None:
                        same = [layer for layer in stack.layers if layer.method == method]
                        method.compress_stack(block, same, stack.seen, note + routed.words(same[0].path(block)))
        except LayerError as error:
            raise LayerError(f"{', '.join(site.names[:3])}: {error}") from error
    for name, layer in layers.items():
        context.report.append(LayerReport(name, "kept" if layer.method is None else "replaced", layer.detail))
    divided = LayerReport("norms", "replaced", "divided by the scales of the layers that read them")
    if any(layer.columns is not None for layer in layers.values()) and divided not in context.report:
        context.report.append(divided)


def _transform(readers: list[Layer]) -> Any:
    """How layers that read the same input are scaled, or None.

    Raises:
        LayerError: in different ways.
    """
    found = {layer.method.transform(): layer.name for layer in readers if layer.method is not None}
    if len(found) > 1:
        ways = " and ".join(f"{name} is set to {transform}" for transform, name in found.items())
        raise LayerError(f"layers that read the same input are scaled together, but {ways}; give both the same")
    return next(iter(found), None)


def _scale(site: Site, stacks: list[SameInput], before: Layer | None) -> str:
    """Find the scales of a site and divide its producer, a norm or the linear `before`, by them; words for the report.

    There are none where a reader, or the linear before, stays as it is: its weight is stored densely, and the scales
    would round it. A router is stored densely too, and takes them all the same: it would not know its inputs else.
    """
    readers = [layer for stack in stacks for layer in stack.layers]
    transform = _transform(readers)
    if transform is None:
        return ""
    if site.row.fixed is not None:
        return f", not scaled because {site.row.fixed}"
    for layer in [*readers, *([before] if before else [])]:
        if layer.method is None:
            return f", not scaled because {layer.name} stays as it is"
    if before and before.quantized:
        return f", not scaled because what {before.name} puts out is quantized"
    norm = None if before else site.producer
    stored, offset = (before.bias, 0.0) if before else (norm.weight, site.block.row.norm_offset)
    device = readers[0].linear.weight.device
    producer = Producer(site.channels.to(device), stored, offset)
    weights = [
        (layer.some_rows(SEARCH_ROWS), layer.method.grid(), stack.seen) for stack in stacks for layer in stack.layers
    ]
    ratio, scales = transform.search(weights, producer, readers[0].linear.weight.dtype)
    for layer in readers:
        layer.columns = scales[producer.channels]
    for path in site.row.routers:
        put(site.block, path, lambda weight, bias: (weight * scales[producer.channels], bias))
    if before:
        before.rows, before.bias = scales, producer.divided(scales)
    else:
        norm.weight = nn.Parameter(producer.divided(scales), requires_grad=False)
        if getattr(norm, "bias", None) is not None:
            norm.bias = nn.Parameter((norm.bias.double() / scales).to(norm.bias.dtype), requires_grad=False)
    return f", scales of ratio {ratio:g}"


def round_to_grid(block: Block, method: Any, layers: list[Layer], hessian: Tensor, note: str) -> None:
    """Round layers that read the same input as one matrix, and put them into the block."""
    grid, begin, columns = method.grid(), 0, layers[0].columns
    dtype = layers[0].linear.weight.dtype
    scaled = hessian if columns is None else hessian / columns / columns[:, None]
    rounded = method.round(torch.cat([layer.scaled() for layer in layers]), scaled, dtype)
    for layer in layers:
        weight = layer.weight()
        own = rounded.rows(slice(begin, begin + len(weight)))
        begin += len(weight)
        codes = Codes.from_codes(own.codes, own.params, grid, dtype=dtype, permutation=own.permutation)
        packed = Linear(codes, layer.bias, backend=method.backend)
        block.replace(layer.name, packed)
        answers = layer.unscaled(own.decode(grid)), decode(grid, *quantize(grid, weight))
        error, nearest = (method.output_error(weight, answer, hessian) for answer in answers)
        layer.detail = (
            f"{spell(method)}, {grid.words}, kernel {packed.kernel_name()}{note}, "
            f"output error {error:.3g} (nearest: {nearest:.3g})"
        )
        if rounded.damping > method.damp:
            layer.detail += f", damping raised to {rounded.damping:g}"


def prune(block: Block, method: Any, layers: list[Layer], seen: Any, note: str) -> None:
    """Prune layers that read the same input, and put them into the block."""
    pruned = method.prune([layer.weight() for layer in layers], seen)
    for layer, weight in zip(layers, pruned.weights, strict=True):
        sparse = method.layer(weight.to(layer.linear.weight.dtype), layer.bias)
        block.replace(layer.name, sparse)
        before = layer.weight()
        answers = sparse.weight.float(), before.masked_fill(method.magnitude_mask(before), 0)
        error, magnitude = (method.output_error(before, answer, seen) for answer in answers)
        layer.detail = f"{method.facts(sparse)}{note}, output error {error:.3g} (magnitude: {magnitude:.3g})"
        if pruned.damping > method.damp:
            layer.detail += f", damping raised to {pruned.damping:g}"
