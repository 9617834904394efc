"""Linear layers of transformers that hold several, opened apart: what is read, calibrated and cut are the parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compression.architectures.anatomy import FusedRow


class Fused(nn.Module):
    """The parts under their names; puts out what the fused layer did."""

    def __init__(self, layer: nn.Linear, names: Sequence[str], sizes: Sequence[int], *, by_head: bool):
        super().__init__()
        self.names, self.sizes, self.by_head = tuple(names), tuple(sizes), by_head
        heads = layer.out_features // sum(sizes) if by_head else 1
        for name, size in zip(names, sizes, strict=True):
            part = nn.Linear(layer.in_features, heads * size, bias=layer.bias is not None, device="meta")
            self.add_module(name, part.to(layer.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return join([self.get_submodule(name)(x) for name in self.names], self.sizes, -1, by_head=self.by_head)


def split(tensor: Tensor, sizes: Sequence[int], dim: int = 0, *, by_head: bool) -> list[Tensor]:
    """The parts of a dimension that holds them one behind the other, or so within each head.

    Raises:
        ValueError: the dimension is not that of these parts.
    """
    dim, whole = dim % tensor.ndim, tensor.shape[dim]
    if (whole % sum(sizes) if by_head else whole != sum(sizes)) or not whole:
        raise ValueError(f"{whole} outputs are not those of parts of {', '.join(map(str, sizes))}")
    if not by_head:
        return [part.contiguous() for part in tensor.split(list(sizes), dim)]
    heads = tensor.unflatten(dim, (-1, sum(sizes)))
    return [part.flatten(dim, dim + 1).contiguous() for part in heads.split(list(sizes), dim + 1)]


def join(parts: Sequence[Tensor], sizes: Sequence[int], dim: int = 0, *, by_head: bool) -> Tensor:
    """The inverse of `split`."""
    if not by_head:
        return torch.cat(list(parts), dim)
    dim = dim % parts[0].ndim
    heads = [part.unflatten(dim, (-1, size)) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(heads, dim + 1).flatten(dim, dim + 1)


def open_apart(block: nn.Module, row: FusedRow, config: object) -> None:
    """Put the parts, without weights, in the place of a fused layer of a block.

    Raises:
        ValueError: the layer is not one of these parts.
    """
    layer, sizes = block.get_submodule(row.path), row.sizes(config)
    split(torch.empty(layer.out_features, 0, device="meta"), sizes, by_head=row.by_head)
    block.set_submodule(row.path, Fused(layer, row.names, sizes, by_head=row.by_head))  # type: ignore[arg-type]
