"""The decoder blocks of a model and the linear layers in them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from compression._linear import PackedLinear


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its path in the model, e.g. model.layers.3."""

    name: str
    module: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear | PackedLinear]]:
        """Full name and layer of every linear in the block, in the order of the module."""
        for path, module in list(self.module.named_modules()):
            if isinstance(module, nn.Linear | PackedLinear):
                yield f"{self.name}.{path}", module

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put `layer` in the place of the one of that full name."""
        self.module.set_submodule(name.removeprefix(f"{self.name}."), layer)


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The blocks in the order in which the hidden state passes through them."""
    return [Block(f"model.layers.{i}", module) for i, module in enumerate(model.model.layers)]  # type: ignore[union-attr, arg-type]


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer of a model by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
