"""The tensors of a whole checkpoint of a published format, from a model with packed layers."""

from collections.abc import Mapping

from torch import Tensor, nn

from compression.architectures import decoder
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints.formats.layer import LayerStore, join


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


def together(model: nn.Module, found: dict) -> list:
    """Layers with what belongs to each, fused ones as one."""
    whole = dict(found)
    for name, module in model.named_modules():
        if isinstance(module, Fused) and f"{name}.{module.names[0]}" in whole:
            parts = [whole.pop(f"{name}.{each}") for each in module.names]
            joined = join(name, [part for part, _ in parts], module.sizes, by_head=module.by_head)
            whole[name] = (joined, parts[0][1])
    return list(whole.items())
