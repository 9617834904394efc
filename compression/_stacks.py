"""One decoder block under a calibrated method: the Hessians of its inputs, then rounding, stack by stack.

All layers of a block are rounded for the inputs that they have while the block itself is still uncompressed; the blocks
before it are compressed by then.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compression._artefact import LayerReport
from compression._blocks import STACKS, Block, Inputs
from compression._errors import LayerError
from compression._grids import decode, quantize
from compression._linear import PackedLinear
from compression._registry import CalibratedMethod, spell
from compression._rounding import Hessian, relative_error


def compress(block: Block, inputs: Inputs, context: Any) -> None:
    """Replace every linear of the block; one report entry for each, in the order of the module.

    Raises:
        LayerError: a weight or an input is not finite; the message names the layer.
    """
    linears = dict(block.linears())
    settings = {name: context.step.for_layer(name) for name in linears}
    for name, linear in linears.items():
        if settings[name] is not None and not torch.isfinite(linear.weight).all():
            raise LayerError(f"{name}: the weight holds NaN or infinite values; compress a sound checkpoint")
    stacks = {stack: [f"{block.name}.{reader}" for reader in stack] for stack in STACKS}
    device = inputs.hidden[0].device
    hessians = {stack: Hessian(linears[names[0]].in_features, device) for stack, names in stacks.items()}
    inputs.observe(block, lambda stack, x: hessians[stack].add(x))
    details = {name: "the recipe leaves this layer alone" for name in linears}
    for stack, names in stacks.items():
        hessian = hessians.pop(stack).value()
        for method in dict.fromkeys(settings[name] for name in names):
            if method is not None:
                same = {name: linears[name] for name in names if settings[name] == method}
                details |= _round(method, same, hessian, block)
    for name in linears:
        outcome = "kept" if settings[name] is None else "replaced"
        context.report.append(LayerReport(name, outcome, details[name]))


def _round(method: CalibratedMethod, linears: dict[str, nn.Linear], hessian: Tensor, block: Block) -> dict[str, str]:
    """Round layers that read the same input as one matrix, put them into the block; a line for the report of each."""
    grid, details, begin = method.grid(), {}, 0
    weights = {name: linear.weight.detach().float() for name, linear in linears.items()}
    dtype = next(iter(linears.values())).weight.dtype
    try:
        rounded = method.round(torch.cat(list(weights.values())), hessian, dtype)
    except LayerError as error:
        raise LayerError(f"{', '.join(linears)}: {error}") from error
    for name, weight in weights.items():
        own = rounded.rows(slice(begin, begin + len(weight)))
        begin += len(weight)
        layer = PackedLinear.from_codes(
            own.codes, own.params, linears[name].bias, grid, dtype=dtype, permutation=own.permutation,
            backend=method.backend,
        )  # fmt: skip
        block.replace(name, layer)
        answers = own.decode(grid), decode(grid, *quantize(grid, weight))
        error, nearest = (relative_error(weight, answer, hessian) for answer in answers)
        details[name] = (
            f"{spell(method)}, kernel {layer.kernel_name()}, output error {error:.3g} (nearest: {nearest:.3g})"
        )
        if rounded.damping > method.damp:
            details[name] += f", damping raised to {rounded.damping:g}"
    return details
