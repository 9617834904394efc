"""Weights in groups along their rows: sizes, checks, and the functions that every grid shares."""

from typing import Protocol

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric.checks import check_size

Params = dict[str, Tensor]
Kind = torch.dtype | None  # None for any that weights are computed with


class Grid(Protocol):
    """What `layers.codes.Codes` needs of a number format."""

    bits: int
    group_size: int

    @property
    def words(self) -> str: ...
    def fit(self, weight: Tensor) -> Params: ...
    def encode(self, weight: Tensor, params: Params) -> Tensor: ...
    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, Tensor | None]: ...
    def take(self, params: Params, places: Tensor, size: int) -> "tuple[Grid, Params]": ...
    def table(self, device: torch.device | str = "cpu") -> Tensor: ...
    def check(self, packed: Tensor, params: Params, cols: int) -> None: ...


def _groups(group_size: int) -> str:
    return "in one group per channel" if group_size == -1 else f"in groups of {group_size}"


def groups_of(cols: int, group_size: int) -> int:
    """Number of groups in a row of `cols` inputs."""
    return 1 if group_size == -1 else cols // group_size


def check_group(cols: int, group_size: int, layer: str = "the layer", allowed: tuple[int, ...] | None = None) -> None:
    """Raise LayerError, naming the divisors at hand, if groups of `group_size` do not tile `cols` inputs.

    `allowed` are the sizes that the method takes; None for -1 and everything from 8.
    """
    if group_size != -1:
        check_size("group_size", group_size)
    if group_size != -1 and cols % group_size:
        divisors = [d for d in range(8, cols + 1) if cols % d == 0 and (allowed is None or d in allowed)]
        near = sorted(sorted(divisors, key=lambda d: abs(d - group_size))[:4])
        raise LayerError(
            f"group_size={group_size} does not divide the {cols} inputs of {layer}; divisors near it: "
            f"{', '.join(map(str, near)) or 'none'}"
            + ("; group_size=-1 makes one group per output channel" if allowed is None else "")
        )


def quantize(grid: Grid, weight: Tensor) -> tuple[Tensor, Params]:
    """Codes (rows, cols) and stored parameters of a weight, by rounding to nearest."""
    params = grid.fit(weight)
    return grid.encode(weight, params), params


def decode(grid: Grid, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
    """W (rows, cols) = s * (T[q] - z), computed in fp32."""
    rows, cols = codes.shape
    scales, zeros = grid.expand(params, rows, cols)
    levels = grid.table(codes.device)[codes.int()].view(rows, scales.shape[1], -1)
    if zeros is not None:
        levels.sub_(zeros[..., None])
    return levels.mul_(scales[..., None]).view(rows, cols).to(dtype)


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive values in `dtype`, never smaller than they were: a clipped edge would break the half-step bound."""
    y = x.to(dtype)
    return torch.where(y.double() < x.double(), torch.nextafter(y, torch.full_like(y, torch.inf)), y)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """fp32 (rows, groups, group_size)."""
    rows, cols = weight.shape
    check_group(cols, group_size)
    return weight.detach().float().view(rows, groups_of(cols, group_size), -1)
