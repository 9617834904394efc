"""Blocks whose residual stream changes its basis beside each half (SliceGPT, arXiv 2401.15024, figure 4)."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from compression.architectures.decoder import Block

RESIDUAL = "{}_residual"


class ResidualMap(nn.Module):
    """x -> x R for the residual stream beside a half of a block; R is stored as a linear layer's weight, R^T."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class TurnedBlock(nn.Module):
    """A block whose residual stream changes its basis beside each half: x R + writer(between(readers(norm(x)))).

    It holds the modules of the block that it stands for, under their names.

    Args:
        scale: of what the halves add to the stream.
    """

    def __init__(self, block: "Block", scale: float = 1.0):
        super().__init__()
        self.halves, self.scale = block.halves, scale
        for name, child in block.module.named_children():
            self.add_module(name, child)
        for half in self.halves:
            setattr(self, RESIDUAL.format(half.name), None)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        for half in self.halves:
            module, residual = self.get_submodule(half.module), getattr(self, RESIDUAL.format(half.name))
            x = self.get_submodule(half.norm or "")(hidden_states)
            x = module(hidden_states=x, **arguments) if half.name == "attention" else module(x)
            x = x[0] if isinstance(x, tuple) else x
            x = x if self.scale == 1 else x * self.scale
            hidden_states = (hidden_states if residual is None else residual(hidden_states)) + x
        return hidden_states

    def turn(self, half: int, weight: Tensor) -> None:
        """Multiply the residual stream beside a half by R, given as R^T (width after it, width before it)."""
        setattr(self, RESIDUAL.format(self.halves[half].name), ResidualMap(weight))
