"""Low-rank adapters on a decoder: put in place, trained by `_training.train`, merged into the weights or taken out.

What `attach` leaves asks for gradients in the adapters alone, so `train` trains these. Layers may be dense, packed,
sparse, or those of bitsandbytes. With `keep_zeros`, as after pruning, the product is held at zero where a
floating-point weight is zero, in training as in merging.
"""

import hashlib

import torch
from torch import Tensor, nn

from compression.architectures import decoder
from compression.errors import LayerError
from compression.layers.low_rank import LoraLinear
from compression.layers.packed import PackedLinear
from compression.layers.sparse import SparseLinear
from compression.numeric import grids
from compression.training.settings import LoraSettings


def attach(model: nn.Module, settings: LoraSettings, *, keep_zeros: bool = True) -> dict[str, LoraLinear]:
    """Put adapters on the linear layers of all blocks that the settings name; they compute what they did before.

    The adapters are fp32 and ask for gradients, everything else does not. Other parameters become objects of the
    model's own around the same numbers, so that a model that it shared them with is left as it was.

    Returns:
        The adapted layers by their full name.

    Raises:
        LayerError: a layer has an adapter already; nothing is changed.
    """
    found = [(block, name, layer) for block in decoder.decoder_blocks(model) for name, layer in block.linears()
             if name.rsplit(".", 1)[-1] in settings.targets]  # fmt: skip
    adapted = {}
    for _, name, layer in found:
        try:
            mask = _mask(layer) if keep_zeros else None
            adapted[name] = LoraLinear(
                layer, settings.rank, settings.alpha / settings.rank, dropout=settings.dropout, mask=mask,
                device=_device(layer),
            )  # fmt: skip
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from error
        seed = hashlib.sha256(f"{settings.seed} {name}".encode()).digest()[:7]
        adapted[name].reset(torch.Generator().manual_seed(int.from_bytes(seed)))
    _own(model)
    for block, name, _ in found:
        block.replace(name, adapted[name])
        adapted[name].lora_a.requires_grad_(True)
        adapted[name].lora_b.requires_grad_(True)
    return adapted


def detach(model: nn.Module) -> None:
    """Take every adapter out: the layers are again what they were."""
    for name, layer in adapted_layers(model).items():
        model.set_submodule(name, layer.base)


def merge(model: nn.Module, *, packed: bool = False) -> dict[str, float]:
    """Add adapters to the weights that they belong to.

    Dense and sparse layers take them in: the sum in fp32, rounded once to the dtype of the weight, in the store that it
    had. Others keep theirs beside them, stored in the dtype of the layer; `packed` has packed ones rounded again, to
    nearest on the grid that they are on (fitted anew), which loses part of what was learnt.

    Returns:
        For each adapted layer by its full name |W' - (W + s B A)| / |s B A| (Frobenius): rounding beside what was
        learnt, 1 where it is as large; 0.0 for one that is kept beside.
    """
    lost = {}
    for name, layer in adapted_layers(model).items():
        lost[name], merged = 0.0, _merged(layer, packed)
        if merged is not None:
            change = float(layer.product().detach().norm())
            lost[name] = float((_floats(merged) - _sum(layer)).norm()) / change if change else 0.0
            model.set_submodule(name, merged)
        elif layer.dtype.is_floating_point:  # that of bitsandbytes is the one of its codes
            layer.lora_a.data, layer.lora_b.data = (t.data.to(layer.dtype) for t in (layer.lora_a, layer.lora_b))
    return lost


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every layer with an adapter, by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _merged(layer: LoraLinear, packed: bool) -> nn.Module | None:
    """A layer like the base with the sum as its weight; None for one that has to keep its own."""
    base = layer.base
    if type(base) is nn.Linear:  # not those of bitsandbytes, which inherit from it
        return layer.to_linear()
    if isinstance(base, SparseLinear):
        linear = layer.to_linear()
        return SparseLinear.from_weight(linear.weight, linear.bias, base.pattern)
    if isinstance(base, PackedLinear) and packed:
        return _repacked(base, _sum(layer).masked_fill(_floats(base) == 0, 0))
    return None


def _repacked(base: PackedLinear, weight: Tensor) -> PackedLinear:
    order = None if base.permutation is None else base.permutation.long()
    codes, params = grids.quantize(base.grid, (weight if order is None else weight[:, order]).to(base.dtype))
    return PackedLinear.from_codes(
        codes, params, base.bias, base.grid, dtype=base.dtype, permutation=base.permutation,
        compute_dtype=base.compute_dtype, backend=base.backend, threshold=base.threshold,
    )  # fmt: skip


def _floats(layer: nn.Module) -> Tensor:
    """The weight (rows, cols) in fp32."""
    return layer.dequantize(torch.float32) if isinstance(layer, PackedLinear) else layer.weight.detach().float()  # type: ignore[union-attr, operator]


def _sum(layer: LoraLinear) -> Tensor:
    """W + s B A (rows, cols) in fp32."""
    return _floats(layer.base) + layer.product().detach().float()


def _own(model: nn.Module) -> None:
    """Frozen parameters of the model's own, those that it ties still tied."""
    owned: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter) is nn.Parameter:  # bitsandbytes has kinds of its own
                made = owned.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
                module._parameters[name] = made


def _mask(layer: nn.Module) -> Tensor | None:
    """Where a dense or sparse weight is not zero; None where it is so everywhere, and for packed layers."""
    if type(layer) is not nn.Linear and not isinstance(layer, SparseLinear):
        return None
    kept = layer.weight != 0
    return None if bool(kept.all()) else kept


def _device(layer: nn.Module) -> torch.device:
    return next(iter((*layer.parameters(), *layer.buffers()))).device
