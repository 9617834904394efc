"""One decoder block under a calibrated method: what is measured of its inputs, then scaling, and rounding or pruning,
stack by stack.

All layers of a block are changed for the inputs that they have while the block itself is still uncompressed; the blocks
before it are compressed by then. Stacks are done from the last to the first: what a linear is divided by, because those
that read its outputs are scaled, is then known when it is rounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures.decoder import Block, Site, as_linear
from compression.architectures.rewriting import put
from compression.calibration.capture import Inputs, Stack, stacks_of
from compression.calibration.routing import Routed
from compression.calibration.sums import Sums
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.layers.report import LEFT_ALONE, LayerReport
from compression.numeric.channel_scales import SEARCH_ROWS, Producer
from compression.numeric.grouping import decode, quantize
from compression.recipes.registry import spell
from compression.workers import Workers, dealt


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

    @property
    def cost(self) -> int:
        """Of fitting it to what reaches it, in proportion: every weight changes those of its row that come after."""
        return 0 if self.method is None else self.linear.weight.numel() * self.linear.in_features

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


class SameInput:
    """Layers that see the same tokens, and what is known of these on the process that works on the layers.

    Args:
        owner: the rank of that process.
        observer: what saw them; None on the others.
    """

    def __init__(self, layers: list[Layer], owner: int, observer: Any):
        self.layers, self.owner, self._observer = layers, owner, observer

    @cached_property
    def seen(self) -> Any:
        """The value of the observer, which is given up for it."""
        observer, self._observer = self._observer, None
        return observer.value()


def compress(block: Block, inputs: Inputs, context: Any) -> None:
    """Replace every linear of the block; one report entry for each, in the order of the module.

    Stacks are shared out over the processes by what they cost; where layers are scaled, all stacks of a site go to one.

    Raises:
        LayerError: a weight or an input is not finite, or layers that read the same input are to be scaled in different
            ways; the message names them.
    """
    layers, workers = {}, context.workers
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
    sites = block.sites[::-1]
    scaled = [_transform([layers[name] for name in site.names]) is not None for site in sites]
    observed = Sums(
        stacks_of(block),
        lambda stack: context.step.method.observer(block.layer(stack.readers[0]).in_features, inputs.device),
    )
    routed = inputs.observe(block, observed.see, observed.keep)
    stacks = _shared_out(layers, list(zip(sites, scaled, strict=True)), observed, workers)
    notes = _scale_all(sites, stacks, layers, workers)
    jobs = [partial(_compress_stack, block, site, stacks, stack, notes[site.number], routed)
            for site in sites for stack in _stacks(site)]  # fmt: skip
    owners = [stacks[stack].owner for site in sites for stack in _stacks(site)]
    for replaced in workers.run(owners, jobs):
        for name, layer, detail in replaced:
            layers[name].detail = detail
            if block.layer(layers[name].path(block)) is not layer:
                block.replace(name, layer)
    for name, layer in layers.items():
        context.report.append(LayerReport(name, "kept" if layer.method is None else "replaced", layer.detail))
    divided = LayerReport("norms", "replaced", "divided by the scales of the layers that read them")
    if any(layer.columns is not None for layer in layers.values()) and divided not in context.report:
        context.report.append(divided)


def _stacks(site: Site) -> list[Stack]:
    return [Stack(site.row, readers) for readers in site.row.stacks]


def _shared_out(
    layers: dict[str, Layer], sites: list[tuple[Site, bool]], observed: Sums, workers: Workers
) -> dict[Stack, SameInput]:
    """Every stack with its owner, who gets what was observed of it; stacks of a site that is scaled have the same."""
    units = [unit for site, scaled in sites
             for unit in ([_stacks(site)] if scaled else [[stack] for stack in _stacks(site)])]  # fmt: skip
    readers = {stack: [layers[site.block.full(path)] for path in stack.readers]
               for site, _ in sites for stack in _stacks(site)}  # fmt: skip
    owners = dealt([sum(layer.cost for stack in unit for layer in readers[stack]) for unit in units], workers.count)
    return {stack: SameInput(readers[stack], owner, observed.given_to(stack, owner, workers))
            for owner, unit in zip(owners, units, strict=True) for stack in unit}  # fmt: skip


def _compress_stack(
    block: Block, site: Site, stacks: dict[Stack, SameInput], stack: Stack, note: str, routed: Routed
) -> list[tuple[str, nn.Module, str]]:
    """Compress the layers of a stack: name, layer and words for the report of each that is replaced.

    What an observer holds goes with it.
    """
    same = stacks.pop(stack)
    taken = [layer for layer in same.layers if layer.method is not None]
    with _naming(site):
        for method in dict.fromkeys(layer.method for layer in taken):
            alike = [layer for layer in taken if layer.method == method]
            method.compress_stack(block, alike, same.seen, note + routed.words(alike[0].path(block)))  # type: ignore[union-attr]
    return [(layer.name, block.layer(layer.path(block)), layer.detail) for layer in taken]


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


def _scale_all(
    sites: list[Site], stacks: dict[Stack, SameInput], layers: dict[str, Layer], workers: Workers
) -> dict[int, str]:
    """Find the scales of sites and divide their producers; words for the report by the number of the site.

    The search for one site reads nothing that the division of another changes.
    """
    notes, found = {}, []
    for site in sites:
        before = layers.get(site.block.full(site.row.producer or ""))
        scaling = Scaling(site, [stacks[stack] for stack in _stacks(site)], before)
        if (why := scaling.refusal) is None:
            found.append(scaling)
        else:
            notes[site.number] = why
    owners = [scaling.stacks[0].owner for scaling in found]
    for scaling, (ratio, scales) in zip(found, workers.run(owners, [each.search for each in found]), strict=True):
        scaling.divide(scales)
        notes[scaling.site.number] = f", scales of ratio {ratio:g}"
    return notes


@dataclass
class Scaling:
    """How the readers of a site are scaled, and its producer, a norm or the linear `before`, divided."""

    site: Site
    stacks: list[SameInput]
    before: Layer | None

    @property
    def readers(self) -> list[Layer]:
        return [layer for stack in self.stacks for layer in stack.layers]

    @property
    def refusal(self) -> str | None:
        """Why the site is not scaled, in words for the report, which are none where nobody asked for it.

        There are no scales where a reader, or the linear before, stays as it is: its weight is stored densely, and the
        scales would round it. A router is stored densely too, and takes them all the same: it would not know its inputs
        else.
        """
        if _transform(self.readers) is None:
            return ""
        if self.site.row.fixed is not None:
            return f", not scaled because {self.site.row.fixed}"
        for layer in [*self.readers, *([self.before] if self.before else [])]:
            if layer.method is None:
                return f", not scaled because {layer.name} stays as it is"
        if self.before and self.before.quantized:
            return f", not scaled because what {self.before.name} puts out is quantized"
        return None

    @cached_property
    def producer(self) -> Producer:
        """As it is before it is divided."""
        norm = None if self.before else self.site.producer
        stored, offset = (self.before.bias, 0.0) if self.before else (norm.weight, self.site.block.row.norm_offset)
        return Producer(self.site.channels.to(self.readers[0].linear.weight.device), stored, offset)

    def search(self) -> tuple[float, Tensor]:
        """The ratio and the scales."""
        weights = [(layer.some_rows(SEARCH_ROWS), layer.method.grid(), stack.seen)  # type: ignore[union-attr]
                   for stack in self.stacks for layer in stack.layers]  # fmt: skip
        with _naming(self.site):
            return _transform(self.readers).search(weights, self.producer, self.readers[0].linear.weight.dtype)

    def divide(self, scales: Tensor) -> None:
        """Divide the producer by scales, and have the readers multiplied by them."""
        producer, columns = self.producer, scales[self.producer.channels]
        for layer in self.readers:
            layer.columns = columns
        for path in self.site.row.routers:
            put(self.site.block, path, lambda weight, bias: (weight * columns, bias))
        if self.before:
            self.before.rows, self.before.bias = scales, producer.divided(scales)
            return
        norm = self.site.producer
        norm.weight = nn.Parameter(producer.divided(scales), requires_grad=False)
        if getattr(norm, "bias", None) is not None:
            norm.bias = nn.Parameter((norm.bias.double() / scales).to(norm.bias.dtype), requires_grad=False)


@contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Errors of layers begin with the readers of their site."""
    try:
        yield
    except LayerError as error:
        raise LayerError(f"{', '.join(site.names[:3])}: {error}") from error


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
