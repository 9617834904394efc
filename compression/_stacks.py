"""One decoder block under a calibrated method: the moments of its inputs, then a transform, then rounding.

All layers of a block are rounded for the inputs that they have while the block itself is still uncompressed; the blocks
before it are compressed by then.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression._artefact import LayerReport
from compression._blocks import STACKS, Block, Inputs, Stack
from compression._errors import LayerError
from compression._grids import decode, quantize
from compression._linear import PackedLinear
from compression._registry import CalibratedMethod, spell
from compression._rounding import Moments, relative_error


@dataclass
class Layers:
    """A stack of linears in a block that is being compressed.

    Attributes:
        linears: full name -> layer, those that the recipe leaves alone included.
        weights: full name -> fp32 weight (rows, cols), transformed.
        hessian: 2/n sum x x^T of the (transformed) inputs, (cols, cols).
        magnitude: mean |x|, (cols,).
    """

    stack: Stack
    linears: dict[str, nn.Linear]
    weights: dict[str, Tensor]
    hessian: Tensor
    magnitude: Tensor


def compress(method: CalibratedMethod, block: Block, inputs: Inputs, context: Any) -> None:
    """Replace every linear of the block; one report entry for each, in the order of the module.

    Raises:
        LayerError: a weight or an input is not finite; the message names the layer.
    """
    linears = dict(block.linears())
    settings = {name: context.step.for_layer(name) for name in linears}
    for name, linear in linears.items():
        if settings[name] is not None and not torch.isfinite(linear.weight).all():
            raise LayerError(f"{name}: the weight holds NaN or infinite values; compress a sound checkpoint")
    moments = {
        stack: Moments(linears[f"{block.name}.{stack.readers[0]}"].in_features, inputs.hidden[0].device)
        for stack in STACKS
    }
    inputs.observe(block, lambda stack, x: moments[stack].add(x))
    stacks = []
    for stack, moment in moments.items():
        members = {name: linears[name] for name in (f"{block.name}.{reader}" for reader in stack.readers)}
        weights = {name: linear.weight.detach().float() for name, linear in members.items()}
        stacks.append(Layers(stack, members, weights, moment.hessian(), moment.magnitude()))
    method.transform(block, stacks, context)
    details = {name: "the recipe leaves this layer alone" for name in linears if settings[name] is None}
    for layers in stacks:
        for same in dict.fromkeys(settings[name] for name in layers.linears):
            if same is not None:
                names = [name for name in layers.linears if settings[name] == same]
                details |= _round(same, names, layers, block)
    for name in linears:
        outcome = "kept" if settings[name] is None else "replaced"
        context.report.append(LayerReport(name, outcome, details[name]))


def _round(method: CalibratedMethod, names: list[str], layers: Layers, block: Block) -> dict[str, str]:
    """Round some layers of a stack as one matrix and put them into the block; a line for the report of each."""
    grid, dtype = method.grid(), layers.linears[names[0]].weight.dtype
    try:
        rounded = method.round(torch.cat([layers.weights[name] for name in names]), layers.hessian, dtype)
    except LayerError as error:
        raise LayerError(f"{', '.join(names)}: {error}") from error
    details, begin = {}, 0
    for name in names:
        weight, bias = layers.weights[name], layers.linears[name].bias
        own = rounded.rows(slice(begin, begin + len(weight)))
        begin += len(weight)
        layer = PackedLinear.from_codes(
            own.codes, own.params, bias, grid, dtype=dtype, permutation=own.permutation, backend=method.backend
        )
        block.replace(name, layer)
        error = relative_error(weight, own.decode(grid), layers.hessian)
        nearest = relative_error(weight, decode(grid, *quantize(grid, weight)), layers.hessian)
        details[name] = (
            f"{spell(method)}, kernel {layer.kernel_name()}, output error {error:.3g} (nearest: {nearest:.3g})"
        )
        if rounded.damping > getattr(method, "damp", 0):
            details[name] += f", damping raised to {rounded.damping:g}"
    return details
