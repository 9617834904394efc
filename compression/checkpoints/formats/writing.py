"""The tensors of a whole checkpoint of a published format, from a model with packed layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints.formats.layer import LayerStore, join
from compression.errors import LayerError
from compression.layers.codes import Codes


def tensors_of(model: nn.Module, stores: Mapping[str, LayerStore]) -> dict[str, Tensor]:
    """All tensors under their published names: stored layers as their stores have them, fused ones together.

    Args:
        stores: for each stored layer of the model, by its name there.

    Raises:
        LayerError: the parts of a fused layer are not one layer.
    """
    row, layers = architecture_of(model), decoder.stored_layers(model)
    inside = tuple(f"{name}.weight_part." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    state = layouts.together(state, row, model.config)
    for name, (part, store) in together(model, {name: (layers[name].weight_part, stores[name]) for name in layers}):
        theirs = layouts.their_name(name, row)
        state |= {f"{theirs}.{key}": tensor for key, tensor in store.write(part).items()}
    return state


def check_outside(format: str, model: nn.Module) -> None:
    """Raise LayerError for packed embeddings, and experts that are one tensor: readers of published formats know
    neither."""
    row = architecture_of(model)
    if embeddings.is_packed(model):
        raise LayerError(f"format {format} cannot hold {row.embeddings}: its readers take embeddings in 16 bits; leave "
                         "embeddings=8 out")  # fmt: skip
    if row.stacked_experts:
        raise LayerError(f"format {format} cannot hold the experts of {row.name}, which its readers know as one tensor "
                         "of all of them")  # fmt: skip


def together(model: nn.Module, found: Mapping[str, tuple[Codes, LayerStore]]) -> list[tuple[str, Any]]:
    """Layers with what belongs to each, fused ones as one."""
    whole = dict(found)
    for name, module in model.named_modules():
        if isinstance(module, Fused) and f"{name}.{module.names[0]}" in whole:
            parts = [whole.pop(f"{name}.{each}") for each in module.names]
            joined = join(name, [part for part, _ in parts], module.sizes, by_head=module.by_head)
            whole[name] = (joined, parts[0][1])
    return list(whole.items())


def dense_layers(model: nn.Module) -> list[str]:
    """Published names of all that multiplies by a dense matrix: linear layers, and routers, which other programs take
    for such."""
    row, stored = architecture_of(model), decoder.stored_layers(model)
    fused = {f"{name}.{each}": name for name, module in model.named_modules() if isinstance(module, Fused)
             for each in module.names}  # fmt: skip
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        inside = any(name.startswith(f"{each}.") for each in stored)
        if weight is not None and weight.ndim == 2 and not inside and not isinstance(module, nn.Embedding):
            found.append(layouts.their_name(fused.get(name, name), row))
    return list(dict.fromkeys(found))
