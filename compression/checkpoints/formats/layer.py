"""One linear layer between a checkpoint format and `Codes`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compression.architectures import fused
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.parts import InputPart
from compression.numeric import grouping, packing
from compression.numeric.grids import AffineGrid

PACKED = ".weight_part."  # in the names of tensors, between that of a stored layer and what it stores
INPUT = ".input_part."  # likewise, of what stands at its input
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # that scales are stored in


@dataclass(frozen=True)
class StoredTensor:
    """What a format stores under a name.

    Attributes:
        shapes: any of these; None for one that other tensors decide.
        dtypes: any of these.
        optional: whether the layer can be read without it.
    """

    shapes: tuple[tuple[int, ...], ...] | None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    optional: bool = False


def layer_of(name: str) -> str | None:
    """The stored layer that a tensor of the model belongs to, None for others."""
    inside = next((mark for mark in (PACKED, INPUT) if mark in name), None)
    return None if inside is None else name.partition(inside)[0]


class LayerStore:
    """How a layer of `rows` outputs and `cols` inputs lies in a checkpoint.

    Attributes:
        words: of its setting, for messages.
        required: whether the checkpoint says that this layer is stored so; else it may also be stored as it was.
        mark: the tensor that only a layer that is stored so has; None where any of them tells.
        grid: the number format, where it is that of every layer.
        telling: the tensors, small ones, whose values say what kind of weight the others are.
    """

    words: str
    required = False
    mark: str | None = None
    grid: Any
    telling: tuple[str, ...] = ()

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        """What is stored, by the names behind that of the layer."""
        raise NotImplementedError

    def refusal(self, rows: int, cols: int) -> str | None:
        """Why a layer of this shape cannot be stored so, or None."""
        return None

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        """The weight that tensors, checked against `tensors()`, stand for.

        Raises:
            ValueError: they contradict each other; or LayerError.
        """
        raise NotImplementedError

    def outline(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[Any, bool]:
        """The grid of what `read` gives, and whether its columns are in another order; only those in `telling` have
        values. Raises as `read`."""
        return self.grid, self.order(tensors, cols) is not None

    def order(self, tensors: dict[str, Tensor], cols: int) -> Tensor | None:
        """The order of the inputs in which groups are contiguous, int64 (cols,); None where they lie so. Raises as
        `read`."""
        return None

    def rounded(self, part: Codes) -> str | None:
        """What of a weight the format would round, or None."""
        return None

    def write(self, part: Codes) -> dict[str, Tensor]:
        """The inverse of `read`."""
        raise NotImplementedError

    def input_part(self) -> InputPart | None:
        """What stands at the input, without values."""
        return None

    def read_input(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of that by name. Raises as `read`."""
        return {}

    def write_input(self, part: InputPart | None) -> dict[str, Tensor]:
        """The inverse."""
        return {}


class AffineStore(LayerStore):
    """What the formats of evenly spaced levels share: whole zero points, and scales that they store in fp16."""

    def __init__(self, bits: int, group_size: int, *, symmetric: bool):
        self.grid = AffineGrid(bits=bits, group_size=group_size, symmetric=symmetric)
        self.bits = bits
        self.words = f"{bits} bits in groups of {group_size}"

    def groups(self, cols: int) -> int:
        return grouping.groups_of(cols, self.grid.group_size)

    def refusal(self, rows: int, cols: int) -> str | None:
        try:
            grouping.check_group(cols, self.grid.group_size)
        except LayerError as error:
            return str(error)
        return self.unfit(rows, cols)

    def rounded(self, part: Codes) -> str | None:
        half = part.scales.half()
        if torch.equal(half.float(), part.scales.float()):
            return None
        return f"its scales ({part.scales.dtype}), which are stored in fp16; compress a checkpoint of fp16 or bf16"

    def unfit(self, rows: int, cols: int) -> str | None:
        """Why codes of this shape do not fill the words of the format, or None."""
        return None

    def part(
        self, codes: Tensor, scales: Tensor, zeros: Tensor, cols: int, dtype: torch.dtype, order: Tensor | None
    ) -> Codes:
        """Of packed codes, scales (rows, groups) and zero points, uint8 (rows, groups).

        Raises:
            ValueError: scales are not finite, or zero points not the middle where the grid is symmetric.
        """
        if not torch.isfinite(scales).all():
            raise ValueError("scales holds NaN or infinite values")
        middle, named = 2 ** (self.bits - 1), {"codes": codes, "scales": scales}
        if not self.grid.symmetric:
            named["zero_points"] = packing.pack(zeros, self.bits)
        elif not (zeros == middle).all():
            raise ValueError(f"sym is true, but there are zero points other than {middle}: programs that trust sym "
                             "read other weights than those that read the zero points")  # fmt: skip
        return Codes.from_packed(named, self.grid, cols, dtype=dtype, permutation=order)

    def zeros(self, part: Codes) -> Tensor:
        """uint8 (rows, groups).

        Raises:
            LayerError: they are no whole numbers.
        """
        _, zeros = part.grid.expand(part.parameters_of_grid(), *part.shape)
        whole = zeros.to(torch.uint8)  # type: ignore[union-attr]
        if not torch.equal(whole.to(zeros.dtype), zeros):  # type: ignore[union-attr, arg-type]
            raise LayerError("the format stores whole zero points, and would round those of this layer")
        return whole


def split(part: Codes, sizes: Sequence[int], *, by_head: bool) -> list[Codes]:
    """The parts of a fused layer, see `architectures.fused.split`; parameters of the whole weight go to each."""
    rows = part.shape[0]
    named = {"codes": part.canonical(), **part.parameters_of_grid()}
    if odd := [name for name, each in named.items() if each.ndim and len(each) != rows]:
        raise LayerError(f"it holds several layers in one, whose {odd[0]} cannot be told apart by rows")
    pieces = {name: fused.split(each, sizes, by_head=by_head) if each.ndim else [each] * len(sizes)
              for name, each in named.items()}  # fmt: skip
    return [
        Codes.from_packed({name: pieces[name][i] for name in named}, part.grid, part.shape[1], dtype=part.dtype,
                          permutation=part.permutation)
        for i in range(len(sizes))
    ]  # fmt: skip


def join(name: str, parts: Sequence[Codes], sizes: Sequence[int], *, by_head: bool) -> Codes:
    """The inverse of `split`.

    Raises:
        LayerError: the parts have their columns in different orders, or different parameters of the whole weight.
    """
    first = parts[0]
    check_order(name, [part.permutation for part in parts])
    check_shared(name, parts)
    named = [{"codes": part.canonical(), **part.parameters_of_grid()} for part in parts]
    joined = {
        key: fused.join([own[key] for own in named], sizes, by_head=by_head) if each.ndim else each
        for key, each in named[0].items()
    }
    return Codes.from_packed(joined, first.grid, first.shape[1], dtype=first.dtype, permutation=first.permutation)


def check_shared(name: str, parts: Sequence[Codes]) -> None:
    """Raise LayerError if the parts of a fused layer have different numbers where it has one."""
    for key, each in parts[0].parameters_of_grid().items():
        if not each.ndim and not all(torch.equal(part.parameters_of_grid()[key], each) for part in parts):
            raise LayerError(f"{name}: its parts have a {key} each, and are one layer there with one {key}")


def check_inputs(name: str, parts: Sequence[InputPart | None]) -> None:
    """Raise LayerError if the inputs of the parts of a fused layer are rounded under different numbers."""
    first, *others = [{} if part is None else part.tensors() for part in parts]
    for each in others:
        if first.keys() != each.keys() or not all(
            first[key].is_meta or torch.equal(first[key], each[key]) for key in first
        ):
            raise LayerError(f"{name}: the inputs of its parts have scales of their own, and are one there")


def check_order(name: str, permutations: Sequence[Tensor | None]) -> None:
    """Raise LayerError if the parts of a fused layer have their columns in different orders."""
    first, *others = permutations
    for each in others:
        if (first is None) != (each is None) or not (first is None or each is None or torch.equal(first, each)):
            raise LayerError(f"{name}: its parts have their columns in different orders, and are one layer there; give "
                             "them the same settings")  # fmt: skip


def order_of(g_idx: Tensor, cols: int, groups: int) -> Tensor | None:
    """The order of the inputs in which groups are contiguous, int64 (cols,); None if they are already.

    Raises:
        ValueError: the groups are not all of one size.
    """
    if torch.equal(g_idx.long(), torch.arange(cols, device=g_idx.device) // (cols // groups)):
        return None
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= groups:  # before a table of as many groups is made
        raise ValueError(f"g_idx names groups from {lowest} to {highest}; there are 0 to {groups - 1}")
    if not (torch.bincount(g_idx, minlength=groups) == cols // groups).all():
        raise ValueError(f"g_idx does not divide {cols} inputs into {groups} groups of {cols // groups}")
    return g_idx.argsort(stable=True)
