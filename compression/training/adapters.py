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
from compression.layers.foreign import part_around
from compression.layers.linear import Linear
from compression.layers.low_rank import LowRank
from compression.training.settings import LoraSettings


def attach(model: nn.Module, settings: LoraSettings, *, keep_zeros: bool = True) -> dict[str, Linear]:
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
    adapters, adapted = {}, {}
    for _, name, layer in found:
        check_free(name, layer)
        seed = hashlib.sha256(f"{settings.seed} {name}".encode()).digest()[:7]
        adapters[name] = LowRank.drawn(
            layer.out_features, layer.in_features, settings.rank, settings.alpha / settings.rank,
            torch.Generator().manual_seed(int.from_bytes(seed)), dropout=settings.dropout,
            mask=_mask(layer) if keep_zeros else None, device=_device(layer),
        )  # fmt: skip
    _own(model)
    for block, name, layer in found:
        own = layer if isinstance(layer, Linear) else Linear(part_around(layer), layer.bias)
        adapted[name] = own.with_weight(*own.weight_part.summands, adapters[name]).train(layer.training)
        block.replace(name, adapted[name])
        adapters[name].requires_grad_(True)
    return adapted


def adapter_of(layer: nn.Module) -> LowRank | None:
    """The adapter of a layer: the low-rank part beside others, the last one."""
    parts = layer.weight_part.summands if isinstance(layer, Linear) else ()
    return parts[-1] if len(parts) > 1 and isinstance(parts[-1], LowRank) else None


def check_free(name: str, layer: nn.Module) -> None:
    """Raise LayerError if a layer has an adapter already."""
    if adapter_of(layer) is not None:
        raise LayerError(f"{name}: this layer already has an adapter; use recover once, or pass merge=all")


def detach(model: nn.Module) -> None:
    """Take every adapter out: the layers are again what they were."""
    for name, layer in adapted_layers(model).items():
        model.set_submodule(name, without_adapter(layer).simplest())


def without_adapter(layer: Linear) -> Linear:
    """The layer of all parts but the adapter."""
    return layer.with_weight(*layer.weight_part.summands[:-1])


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
            adapter = layer.weight_part.summands[-1]
            change = float(adapter.value().detach().norm())
            lost[name] = float((_floats(merged) - _floats(layer)).norm()) / change if change else 0.0
            model.set_submodule(name, merged.simplest())
        elif layer.dtype.is_floating_point:  # that of bitsandbytes is the one of its codes
            layer.weight_part.summands[-1].to(layer.dtype)
    return lost


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """Every layer with an adapter, by its full name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Linear) and adapter_of(module) is not None}  # fmt: skip


def _merged(layer: Linear, packed: bool) -> Linear | None:
    """A layer like the one before with the sum as its weight; None for one that has to keep its adapter."""
    own = without_adapter(layer)
    if own.exact:
        return own.with_weight(own.weight_part.again(layer.weight_part.value().detach()))
    if own.weight_part.takes_others and packed:
        weight = _floats(layer).masked_fill(_floats(own) == 0, 0)
        return own.with_weight(own.weight_part.again(weight))
    return None


def _floats(layer: Linear) -> Tensor:
    """The weight (rows, cols) in fp32."""
    return layer.weight_part.value(torch.float32).detach()


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
    if not (layer.exact if isinstance(layer, Linear) else type(layer) is nn.Linear):
        return None
    kept = layer.weight != 0
    return None if bool(kept.all()) else kept


def _device(layer: nn.Module) -> torch.device:
    return next(iter((*layer.parameters(), *layer.buffers()))).device
