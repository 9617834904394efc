"""Codes: a weight on the levels of a grid, stored as packed codes and the parameters of the grid.

The state dict holds what is stored and nothing else, in one canonical layout: `codes` (packed by `_packing`, uint8) and
the parameters of the grid by name. In memory the codes are held once, in the layout of the kernel that the layer
computes with; saving, moving and dequantizing put the canonical layout back.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.files.strict_json import exact_fields
from compression.layers.kernels.kernel import Kernel, LayerSpec, Product
from compression.layers.kernels.torch_products import frozen_product
from compression.layers.linear import Linear
from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric import grids, grouping, packing
from compression.numeric.checks import (
    FLOATS,
    check_finite,
    check_one_of,
    check_padding,
    check_permutation,
    check_shape,
    check_size,
)
from compression.numeric.grids import GRIDS
from compression.numeric.grouping import Grid
from compression.numeric.groups import sizes_that_tile


@part("codes", place="weight")
class Codes(WeightPart):
    """W = s * (T[q] - z), by the table T, scales s and zero points z of a grid.

    Args:
        grid: the number format.
        rows, cols: of W.
        dtype: of the weight that was replaced: scales have it, and products are taken in it.
        permuted: whether the columns are stored in another order (activation order of GPTQ): `permutation`, int32
            (cols,), names for each stored column the input that it multiplies.

    Raises:
        LayerError: groups do not tile the inputs, or a value is not allowed.
    """

    takes_others = True

    def __init__(self, grid: Grid, rows: int, cols: int, *, dtype: torch.dtype, permuted: bool = False):
        super().__init__()
        check_size("in_features", cols)
        check_size("out_features", rows)
        grouping.check_group(cols, grid.group_size)
        check_one_of("dtype", dtype, FLOATS)
        self.grid, self._shape, self._dtype = grid, (rows, cols), dtype
        width = packing.packed_width(cols, grid.bits)
        self.register_buffer("codes", torch.empty(rows, width, dtype=torch.uint8, device="meta"))
        self._parameter_names = tuple(grid.buffers(rows, cols, dtype))
        for name, (shape, kind) in grid.buffers(rows, cols, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device="meta"))
        order = torch.empty(cols, dtype=torch.int32, device="meta") if permuted else None
        self.register_buffer("permutation", order)

    @classmethod
    def from_weight(cls, weight: Tensor, grid: Grid) -> "Codes":
        """Round a weight (rows, cols) to the nearest levels of the grid.

        Raises:
            LayerError: a weight is not finite, or the grid cannot take its shape or range.
        """
        check_sound("weight", weight)
        codes, params = grouping.quantize(grid, weight)
        return cls.from_codes(codes, params, grid, dtype=weight.dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        params: grids.Params,
        grid: Grid,
        *,
        dtype: torch.dtype,
        permutation: Tensor | None = None,
    ) -> "Codes":
        """Of given codes, uint8 (rows, cols), and stored parameters.

        With a `permutation` (cols,), column j of the codes multiplies input `permutation[j]`.
        """
        packed = {"codes": packing.pack(codes, grid.bits), **params}
        return cls.from_packed(packed, grid, codes.shape[1], dtype=dtype, permutation=permutation)

    @classmethod
    def from_packed(
        cls, tensors: grids.Params, grid: Grid, cols: int, *, dtype: torch.dtype, permutation: Tensor | None = None
    ) -> "Codes":
        """Of what is stored by name: `codes` as `packing` has them, and the parameters of the grid."""
        made = cls._of(grid, len(tensors["codes"]), cols, dtype=dtype, permuted=permutation is not None)
        if permutation is not None:
            check_permutation(permutation, cols)  # before int32 can make another number of one
            made.permutation = permutation.int()
        for name, value in tensors.items():
            setattr(made, name, value)
        made.check()
        return made

    @classmethod
    def _of(cls, grid: Grid, rows: int, cols: int, *, dtype: torch.dtype, permuted: bool) -> "Codes":
        return Codes(grid, rows, cols, dtype=dtype, permuted=permuted)

    @classmethod
    def empty(cls, rows: int, cols: int, *, grid: Any, dtype: Any, permuted: Any) -> Self:
        check_one_of("permuted", permuted, (False, True))
        return cls(grid_of(grid), rows, cols, dtype=dtype_named(dtype), permuted=permuted)

    @property
    def settings(self) -> dict[str, Any]:
        grid = {"kind": self.grid.kind, **dataclasses.asdict(self.grid)}  # type: ignore[attr-defined, call-overload]
        return {"grid": grid, "dtype": name_of(self.dtype), "permuted": self.permutation is not None}

    @property
    def words(self) -> str:
        return self.grid.words

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def facts(self) -> dict[str, Any]:
        return {"grid": self.grid}

    def check(self) -> None:
        (rows, cols), codes = self.shape, {torch.uint8}
        self.unbind()
        packed = check_shape(self, "codes", (rows, packing.packed_width(cols, self.grid.bits)), codes)
        check_padding("codes", packed, cols, self.grid.bits)
        for name, (shape, kind) in self.grid.buffers(rows, cols, None).items():
            check_finite(name, check_shape(self, name, shape, FLOATS if kind is None else {kind}))
        self.grid.check(packed, self.parameters_of_grid(), cols)
        if self.permutation is not None:
            check_permutation(check_shape(self, "permutation", (cols,), {torch.int32}), cols)

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        codes = packing.unpack(self.canonical(), self.grid.bits, self.shape[1])
        weight = grouping.decode(self.grid, codes, self.parameters_of_grid(), dtype or self.dtype)
        return weight if self.permutation is None else weight[:, self.permutation.argsort()]

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y = frozen_product(x, self.value)
        else:
            y = x @ self.value(x.dtype).t()
        return y if bias is None else y + bias.to(x.dtype)

    def lookup(self, places: Tensor) -> Tensor:
        """Its rows alone are decoded."""
        flat, cols = places.reshape(-1), self.shape[1]
        if self.bound is None or self.bound.kernel is None:
            codes = self.codes[flat]
        elif self.bound.kernel.rowwise:
            codes = self.bound.kernel.unpack(self.codes[flat], self.bound.spec)
        else:
            codes = self.canonical()[flat]
        groups = grouping.groups_of(cols, self.grid.group_size)
        grid, params = self.grid.take(
            self.parameters_of_grid(), flat[:, None] * groups + torch.arange(groups, device=flat.device),
            self.grid.group_size,
        )  # fmt: skip
        weight = grouping.decode(grid, packing.unpack(codes, self.grid.bits, cols), params, self.dtype)
        if self.permutation is not None:
            weight = weight[:, self.permutation.argsort()]
        return weight.view(*places.shape, cols)

    def rows(self, kept: Tensor) -> "Codes":
        """The same bits."""
        groups = grouping.groups_of(self.shape[1], self.grid.group_size)
        places = kept[:, None] * groups + torch.arange(groups)
        grid, params = self.grid.take(self.parameters_of_grid(), places, self.grid.group_size)
        codes = packing.unpack(self.canonical()[kept], self.grid.bits, self.shape[1])
        return self._with(codes, grid, params, self.permutation)

    def columns(self, kept: Tensor) -> "Codes":
        """For inputs int64 (kept,), ascending, on the CPU.

        Where the inputs that are left, in the order that they are stored in, fall into groups of equal size (a divisor
        of the group size, 32 or more) that shared a scale before, those are the groups, and the weights the same bits.
        Else the weight is rounded to nearest, on the grid that it is on.

        Raises:
            LayerError: groups of 32 or more do not tile the inputs that are left.
        """
        rows, cols = self.shape
        place = torch.full((cols,), -1)
        place[kept] = torch.arange(len(kept))
        order = None if self.permutation is None else place[self.permutation.cpu().long()]
        stored = kept if order is None else torch.nonzero(order >= 0).flatten()
        permutation = None if order is None else order[stored].to(self.codes.device)
        codes = packing.unpack(self.canonical(), self.grid.bits, cols)
        groups = grouping.groups_of(cols, self.grid.group_size)
        for size in sizes_that_tile(self.grid.group_size, len(stored)):
            source = stored.view(-1, len(stored) if size == -1 else size) // (cols // groups)
            if size == -1 or (source == source[:, :1]).all():
                places = torch.arange(rows)[:, None] * groups + source[:, 0]
                grid, params = self.grid.take(self.parameters_of_grid(), places, size)
                return self._with(codes[:, stored], grid, params, permutation)
        weight = grouping.decode(self.grid, codes, self.parameters_of_grid(), self.dtype)[:, stored]
        size = sizes_that_tile(self.grid.group_size, len(stored))[0]
        grid = dataclasses.replace(self.grid, group_size=size)  # type: ignore[type-var]
        codes, params = grouping.quantize(grid, weight)
        return self._with(codes, grid, params, permutation)

    def again(self, weight: Tensor) -> "Codes":
        """Rounded to nearest, scales fitted anew, in the same order of columns."""
        order = None if self.permutation is None else self.permutation.long()
        codes, params = grouping.quantize(self.grid, (weight if order is None else weight[:, order]).to(self.dtype))
        return self._with(codes, self.grid, params, self.permutation)

    def like(self, other: WeightPart) -> "Codes | None":
        """On the grid of NF4, whose cut may leave its scales in fp32: with them stored in 8 bits; codes stay."""
        wanted, own = (getattr(each.facts.get("grid"), "double_quant", False) for each in (other, self))
        if own or not wanted:
            return None
        grid = dataclasses.replace(self.grid, double_quant=True)  # type: ignore[call-arg, type-var]
        codes = packing.unpack(self.canonical(), self.grid.bits, self.shape[1])
        params = grid.store(self.parameters_of_grid()["absmax"])  # type: ignore[attr-defined]
        return self._with(codes, grid, params, self.permutation)

    def changed(self, before: WeightPart) -> str:
        was, words = before.facts.get("grid", self.grid), ""
        if was.group_size != self.grid.group_size:
            words += f", groups of {self.grid.group_size} instead of {was.group_size}"
        if getattr(was, "double_quant", False) != getattr(self.grid, "double_quant", False):
            words += ", scales in fp32 because their blocks of 256 were cut"
        return words

    def _with(self, codes: Tensor, grid: Grid, params: grids.Params, permutation: Tensor | None) -> "Codes":
        return type(self).from_codes(codes, params, grid, dtype=self.dtype, permutation=permutation)

    def parameters_of_grid(self) -> grids.Params:
        """What is stored beside the codes, by name."""
        return {name: getattr(self, name) for name in self._parameter_names}

    @property
    def bytes(self) -> int:
        tensors = [*self.parameters_of_grid().values(), *(() if self.permutation is None else (self.permutation,))]
        rows, cols = self.shape
        return rows * packing.packed_width(cols, self.grid.bits) + sum(t.numel() * t.element_size() for t in tensors)

    # --- how the codes are held ---------------------------------------------------------------------------------------

    def canonical(self) -> Tensor:
        """The packed codes as they are stored."""
        held = self.bound is not None and self.bound.kernel is not None
        return self.bound.kernel.unpack(self.codes, self.bound.spec) if held else self.codes

    def unbind(self) -> None:
        if self.bound is not None:
            self.codes = self.canonical()
            self.bound = None

    def hold(self, kernel: Kernel, spec: LayerSpec, beside: grids.Params) -> Product:
        """Hold the codes in the layout of a kernel from now on; the product by it."""
        assert kernel.pack is not None
        self.codes = kernel.pack(self.codes, self.parameters_of_grid(), spec)
        product = kernel.bind(self.codes, self.parameters_of_grid() | beside, spec)
        return product if self.permutation is None else _Permuted(product, self.permutation)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.unbind()
        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.canonical()


class _Permuted:
    """A product with columns in another order."""

    def __init__(self, product: Product, order: Tensor):
        self.held, self._order = product, order

    def __call__(self, x: Tensor) -> Tensor:
        return self.held(x.index_select(-1, self._order))


def packed_linear(weight: Tensor, bias: Tensor | None, grid: Grid, **options: Any) -> Linear:
    """A layer with its weight (rows, cols) rounded to the nearest levels of a grid; `options` are those of `Linear`.

    Raises:
        LayerError: a number is not finite, or the grid cannot take the shape or range of the weight.
    """
    check_sound("weight", weight)
    if bias is not None:
        check_sound("bias", bias)
    return Linear(Codes.from_weight(weight, grid), bias, **options)


def check_sound(name: str, tensor: Tensor) -> None:
    """Raise LayerError if a weight or bias of the base is NaN or infinite."""
    if not torch.isfinite(tensor).all():
        raise LayerError(
            f"the {name} has NaN or infinite values: the checkpoint is damaged, or was saved in too narrow a dtype"
        )


def grid_of(description: Any) -> Grid:
    """The grid that a description names. Raises LayerError or ValueError if there is none such."""
    kind = GRIDS.get(str(description.get("kind"))) if isinstance(description, dict) else None
    if kind is None:
        raise LayerError(f"grid={description!r:.80} must be a table whose kind is one of {', '.join(GRIDS)}")
    fields = exact_fields(description, {"kind", *(field.name for field in dataclasses.fields(kind))})
    return kind(**{name: value for name, value in fields.items() if name != "kind"})
