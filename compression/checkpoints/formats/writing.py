"""The tensors of a whole checkpoint of a published format, from a model with packed layers."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.caches import replaying
from compression.checkpoints.formats.layer import LayerStore, check_inputs, check_order, check_shared, join, layer_of
from compression.errors import LayerError


class Writer:
    """Writes a model, which may be without weights, piece by piece: stored layers as their stores have them.

    Attributes:
        stores: for each stored layer of the model, by its name there.
    """

    def __init__(self, format: str, model: nn.Module, stores: Mapping[str, LayerStore]):
        self.format, self.stores, self.config = format, stores, model.config
        self.row, self.layers = architecture_of(model), decoder.stored_layers(model)
        self.fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}

    def tensors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a piece under their published names, fused layers together; `state` names its tensors in the model.

        Raises:
            LayerError: a store would round what a layer has, or the parts of a fused layer are not one layer.
        """
        owners = {name: layer_of(name) for name in state}
        held = dict.fromkeys(owner for owner in owners.values() if owner is not None)
        self.check(held)
        dense = {name: tensor for name, tensor in state.items() if owners[name] is None}
        found = layouts.together(dense, self.row, self.config)
        parts = {name: (self.layers[name].weight_part, self.stores[name]) for name in held}
        for name, fused in self.fused.items():
            if f"{name}.{fused.names[0]}" in parts:
                own = [parts.pop(f"{name}.{each}") for each in fused.names]
                joined = join(name, [part for part, _ in own], fused.sizes, by_head=fused.by_head)
                parts[name] = (joined, own[0][1])
        entering = {name: self.layers[name].input_part for name in held}
        for name, (part, store) in parts.items():
            theirs, fused = layouts.their_name(name, self.row), self.fused.get(name)
            first = entering[name if fused is None else f"{name}.{fused.names[0]}"]
            written = store.write(part) | store.write_input(first)
            found |= {f"{theirs}.{key}": tensor for key, tensor in written.items()}
        return found

    def check(self, names: Collection[str]) -> None:
        """Raise LayerError if that would change one of these stored layers; nothing is converted."""
        for name in names:
            if what := self.stores[name].rounded(self.layers[name].weight_part):
                raise LayerError(f"format {self.format} would round {what}: {name}")
        for name, fused in self.fused.items():
            if f"{name}.{fused.names[0]}" in names:
                parts = [self.layers[f"{name}.{each}"].weight_part for each in fused.names]
                check_order(name, [part.permutation for part in parts])
                check_shared(name, parts)
                check_inputs(name, [self.layers[f"{name}.{each}"].input_part for each in fused.names])


def check_outside(format: str, model: nn.Module) -> None:
    """Raise LayerError for packed embeddings, and experts that are one tensor: readers of published formats know
    neither, nor how a cache is stored."""
    check_cache(format, model)
    row = architecture_of(model)
    if embeddings.is_packed(model):
        raise LayerError(f"format {format} cannot hold {row.embeddings}: its readers take embeddings in 16 bits; leave "
                         "embeddings=8 out")  # fmt: skip
    if row.stacked_experts:
        raise LayerError(f"format {format} cannot hold the experts of {row.name}, which its readers know as one tensor "
                         "of all of them")  # fmt: skip


def check_cache(format: str, model: nn.Module) -> None:
    """Raise LayerError if the model has a cache policy: no published format says how keys and values are stored."""
    if replaying.policy_of(model) is not None:
        raise LayerError(f"format {format} has no place for how the cache stores keys and values; leave that step out, "
                         "or write format own")  # fmt: skip


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
