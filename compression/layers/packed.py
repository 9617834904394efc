"""PackedLinear: a linear layer whose weight is stored as packed codes.

The state dict holds what is stored and nothing else, in one canonical layout: `codes` (packed by `_packing`, uint8),
the parameters of the grid by name, and the bias. In memory the codes are held once, in the layout of the kernel that
the layer computes with; saving, moving and dequantizing put the canonical layout back.
"""

import dataclasses
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.checks import (
    FLOATS,
    check_finite,
    check_incoming,
    check_loaded,
    check_one_of,
    check_padding,
    check_permutation,
    check_shape,
    check_size,
)
from compression.layers.kernels import choose
from compression.layers.kernels.choose import DEQUANTIZE, Kernel, LayerSpec
from compression.layers.kernels.torch_products import frozen_product, multiply
from compression.numeric import grids, packing
from compression.numeric.grids import Grid

SMALLEST_GROUP = 32  # that cutting columns may make: the least that kernels take


class PackedLinear(nn.Module):
    """y = x W^T + b with W = s * (T[q] - z).

    Args:
        grid: the number format.
        in_features, out_features: cols and rows of W.
        bias: whether there is one.
        dtype: of the weight that was replaced: outputs and scales have it.
        compute_dtype: in which the product is taken; `dtype` if None.
        backend: "auto", or a library whose kernel to insist on: "native", "torch", "bitsandbytes",
            "gptqmodel".
        threshold: with a number, LLM.int8(): columns of x with an absolute value of at least that are multiplied
            in high precision, the others in 8-bit integers with one scale per row of x.
        permuted: whether the columns of W are stored in another order (activation order of GPTQ): `permutation`,
            int32 (in_features,), names for each stored column the input that it multiplies.

    Raises:
        LayerError: groups do not tile the inputs, or a value is not allowed.
    """

    def __init__(
        self,
        grid: Grid,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        threshold: float | None = None,
        permuted: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        grids.check_group(in_features, grid.group_size)
        check_one_of("dtype", dtype, FLOATS)
        check_one_of("compute_dtype", compute_dtype, (None, *FLOATS))
        check_one_of("backend", backend, choose.BACKENDS)
        if threshold is not None and not (type(threshold) in (int, float) and 0 < threshold < math.inf):
            raise LayerError(f"threshold={threshold!r:.80} must be above 0 and finite, or None")
        self.grid, self.in_features, self.out_features = grid, in_features, out_features
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.backend, self.threshold = backend, threshold
        width = packing.packed_width(in_features, grid.bits)
        self.register_buffer("codes", torch.empty(out_features, width, dtype=torch.uint8, device=device))
        self._parameter_names = tuple(grid.buffers(out_features, in_features, dtype))
        for name, (shape, kind) in grid.buffers(out_features, in_features, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        order = torch.empty(in_features, dtype=torch.int32, device=device) if permuted else None
        self.register_buffer("permutation", order)
        self._product: choose.Product | None = None  # chosen at the first forward
        self._bound: Kernel | None = None
        self._held: Any = None
        self._spec: LayerSpec | None = None
        self._dtype = dtype
        self._most: float = 0  # elements of x up to which the kernel is taken

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, grid: Grid, **options: Any) -> Self:
        """Round a weight (rows, cols) to the nearest levels of the grid.

        Raises:
            LayerError: a weight is not finite, or the grid cannot take its shape or range.
        """
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise LayerError(
                    f"the {name} has NaN or infinite values: the checkpoint is damaged, or was saved in too narrow "
                    "a dtype"
                )
        codes, params = grids.quantize(grid, weight)
        return cls.from_codes(codes, params, bias, grid, dtype=weight.dtype, **options)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        params: grids.Params,
        bias: Tensor | None,
        grid: Grid,
        *,
        dtype: torch.dtype,
        permutation: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """A layer of given codes, uint8 (rows, cols), and stored parameters.

        With a `permutation` (cols,), column j of the codes multiplies input `permutation[j]`.
        """
        rows, cols = codes.shape
        options["permuted"] = permutation is not None
        layer = cls(grid, cols, rows, bias=bias is not None, dtype=dtype, device="meta", **options)
        if permutation is not None:
            check_permutation(permutation, cols)  # before int32 can make another number of one
            layer.permutation = permutation.int()
        layer.codes = packing.pack(codes, grid.bits)
        for name, value in params.items():
            setattr(layer, name, value)
        if bias is not None:
            layer.bias = bias.detach()
        layer.check()
        return layer

    def check(self) -> None:
        """Raise LayerError unless the tensors are what the layer is described as: `compression.layers.checks`."""
        rows, cols, codes = self.out_features, self.in_features, {torch.uint8}
        self._unbind()
        packed = check_shape(self, "codes", (rows, packing.packed_width(cols, self.grid.bits)), codes)
        check_padding("codes", packed, cols, self.grid.bits)
        for name, (shape, kind) in self.grid.buffers(rows, cols, None).items():
            check_finite(name, check_shape(self, name, shape, FLOATS if kind is None else {kind}))
        self.grid.check(packed, self.stored_parameters(), cols)
        if self.bias is not None:
            check_finite("bias", check_shape(self, "bias", (rows,), FLOATS))
        if self.permutation is not None:
            check_permutation(check_shape(self, "permutation", (cols,), {torch.int32}), cols)

    def forward(self, x: Tensor) -> Tensor:
        product = self._product or self._choose(x.device)
        if x.numel() > self._most or (x.requires_grad and torch.is_grad_enabled()):
            return self._multiply_dense(x)
        x_stored = x if self.permutation is None else x.index_select(-1, self.permutation)
        y = product(x_stored if x.dtype == self._dtype else x_stored.to(self._dtype))
        if self.bias is not None:
            y = y + self.bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The slow, obvious product in fp32: the oracle of every kernel. Same shape and dtype as `forward`."""
        y = multiply(x.float(), self.dequantize(torch.float32), self.threshold)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out_features, in_features) as the codes have it, in `dtype` (default: that of the layer)."""
        codes = packing.unpack(self._canonical_codes(), self.grid.bits, self.in_features)
        weight = grids.decode(self.grid, codes, self.stored_parameters(), dtype or self.dtype)
        return weight if self.permutation is None else weight[:, self.permutation.argsort()]

    def rows(self, places: Tensor) -> Tensor:
        """W[places] for int64 (...), (..., in_features) in the dtype of the layer: its rows alone are decoded."""
        flat = places.reshape(-1)
        if self._bound is None:
            codes = self.codes[flat]
        elif self._bound.rowwise:
            codes = self._bound.unpack(self.codes[flat], self._spec)  # type: ignore[arg-type]
        else:
            codes = self._canonical_codes()[flat]
        groups = grids.groups_of(self.in_features, self.grid.group_size)
        grid, params = self.grid.take(
            self.stored_parameters(), flat[:, None] * groups + torch.arange(groups, device=flat.device),
            self.grid.group_size,
        )  # fmt: skip
        weight = grids.decode(grid, packing.unpack(codes, self.grid.bits, self.in_features), params, self.dtype)
        if self.permutation is not None:
            weight = weight[:, self.permutation.argsort()]
        return weight.view(*places.shape, self.in_features)

    def to_linear(self) -> nn.Linear:
        """A dense layer with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    def take_rows(self, rows: Tensor) -> "PackedLinear":
        """The layer with these outputs alone, int64 (kept,) on the CPU; their weights are the same bits."""
        groups = grids.groups_of(self.in_features, self.grid.group_size)
        places = rows[:, None] * groups + torch.arange(groups)
        params = self.grid.take(self.stored_parameters(), places, self.grid.group_size)
        codes = packing.unpack(self._canonical_codes()[rows], self.grid.bits, self.in_features)
        return self._with(codes, *params, None if self.bias is None else self.bias[rows], self.permutation)

    def with_double_quant(self) -> "PackedLinear":
        """The layer, on the grid of NF4 with its scales in fp32, with them stored in 8 bits; codes stay."""
        grid = dataclasses.replace(self.grid, double_quant=True)  # type: ignore[call-arg, type-var]
        codes = packing.unpack(self._canonical_codes(), self.grid.bits, self.in_features)
        params = grid.store(self.stored_parameters()["absmax"])  # type: ignore[attr-defined]
        return self._with(codes, grid, params, self.bias, self.permutation)

    def take_columns(self, columns: Tensor) -> tuple["PackedLinear", float]:
        """The layer with these inputs alone, int64 (kept,) ascending on the CPU, and how far its weight is from theirs.

        Where the inputs that are left, in the order that they are stored in, fall into groups of equal size (a divisor
        of the group size, 32 or more) that shared a scale before, those are the groups, and the weights the same bits:
        0.0. Else the weight is rounded to nearest, on the grid that it is on, and |W' - W| / |W| (Frobenius) is given.

        Raises:
            LayerError: groups of 32 or more do not tile the inputs that are left.
        """
        place = torch.full((self.in_features,), -1)
        place[columns] = torch.arange(len(columns))
        order = None if self.permutation is None else place[self.permutation.cpu().long()]
        stored = columns if order is None else torch.nonzero(order >= 0).flatten()
        permutation = None if order is None else order[stored].to(self.codes.device)
        codes = packing.unpack(self._canonical_codes(), self.grid.bits, self.in_features)
        groups = grids.groups_of(self.in_features, self.grid.group_size)
        for size in _sizes(self.grid.group_size, len(stored)):
            source = stored.view(-1, len(stored) if size == -1 else size) // (self.in_features // groups)
            if size == -1 or (source == source[:, :1]).all():
                places = torch.arange(self.out_features)[:, None] * groups + source[:, 0]
                grid, params = self.grid.take(self.stored_parameters(), places, size)
                return self._with(codes[:, stored], grid, params, self.bias, permutation), 0.0
        weight = grids.decode(self.grid, codes, self.stored_parameters(), self.dtype)[:, stored]
        grid = dataclasses.replace(self.grid, group_size=_sizes(self.grid.group_size, len(stored))[0])
        codes, params = grids.quantize(grid, weight)
        error = (grids.decode(grid, codes, params) - weight.float()).norm() / weight.float().norm()
        return self._with(codes, grid, params, self.bias, permutation), float(error.nan_to_num())

    def _with(
        self, codes: Tensor, grid: Grid, params: grids.Params, bias: Tensor | None, permutation: Tensor | None
    ) -> "PackedLinear":
        return PackedLinear.from_codes(
            codes, params, bias, grid, dtype=self.dtype, permutation=permutation, compute_dtype=self.compute_dtype,
            backend=self.backend, threshold=self.threshold,
        )  # fmt: skip

    def stored_parameters(self) -> grids.Params:
        """What is stored beside the codes, by name."""
        return {name: getattr(self, name) for name in self._parameter_names}

    @property
    def stored_bytes(self) -> int:
        """Bytes in the state dict: codes, stored parameters and bias."""
        tensors = [*self.stored_parameters().values(), *(t for t in (self.bias, self.permutation) if t is not None)]
        codes = self.out_features * packing.packed_width(self.in_features, self.grid.bits)
        return codes + sum(t.numel() * t.element_size() for t in tensors)

    def kernel_name(self, device: torch.device | str | None = None) -> str:
        """The kernel that small batches get on the device (default: where the layer is)."""
        kernel, _ = choose.choose(self._spec_on(torch.device(device or self.codes.device)))
        return DEQUANTIZE if kernel is None else kernel.name

    def graph_refusal(self, device: torch.device | str | None = None) -> str | None:
        """Why a CUDA graph cannot hold the product, or None."""
        kernel, _ = choose.choose(self._spec_on(torch.device(device or self.codes.device)))
        if kernel is None or kernel.graph_safe:
            return None
        return f"the kernel {kernel.name} waits for the device within a step, which no CUDA graph can hold"

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"

    # --- how the codes are held ---------------------------------------------------------------------------------------

    def _spec_on(self, device: torch.device) -> LayerSpec:
        return LayerSpec(
            grid=self.grid, in_features=self.in_features, out_features=self.out_features, device=str(device),
            dtype=self.compute_dtype or self.dtype, backend=self.backend, threshold=self.threshold,
        )  # fmt: skip

    def _choose(self, device: torch.device) -> choose.Product:
        """Take the kernel for the device, and hold the codes in its layout from now on."""
        self._spec = self._spec_on(device)
        self._dtype = self._spec.dtype
        self._bound, _ = choose.choose(self._spec)
        if self._bound is None:
            self._product, self._most = self._multiply_dense, -1  # no x is small enough for a kernel
        else:
            self.codes = self._bound.pack(self.codes, self.stored_parameters(), self._spec)
            self._product = self._bound.bind(self.codes, self.stored_parameters(), self._spec)
            self._held = getattr(self._product, "held", None)  # where what is in memory is counted, it is found
            self._most = self._bound.max_rows(self._spec) * self.in_features
        return self._product

    def _canonical_codes(self) -> Tensor:
        return self.codes if self._bound is None else self._bound.unpack(self.codes, self._spec)  # type: ignore[arg-type]

    def _unbind(self) -> None:
        self.codes = self._canonical_codes()
        self._product, self._bound, self._spec, self._held = None, None, None, None

    def _multiply_dense(self, x: Tensor) -> Tensor:
        dtype = choose.product_dtype(self.compute_dtype or x.dtype, x.device)
        if self.threshold is None and x.requires_grad and torch.is_grad_enabled():
            y = frozen_product(x.to(dtype), self.dequantize)
        else:
            y = multiply(x.to(dtype), self.dequantize(dtype), self.threshold)
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._unbind()
        kept = {name: getattr(self, name) for name in ("codes", *self._parameter_names)}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)
        for name, before in kept.items():  # a change of dtype is for weights, not for codes and their scales
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self._canonical_codes()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._unbind()
        check_incoming(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_loaded(self, state_dict, prefix)

    def __getstate__(self) -> dict[str, Any]:
        self._unbind()
        return self.__dict__.copy()


def _sizes(group_size: int, cols: int) -> list[int]:
    """Sizes into which groups can be cut so that they tile `cols` inputs, the largest first.

    Raises:
        LayerError: there are none.
    """
    if group_size == -1:
        return [-1]
    common = math.gcd(group_size, cols)
    found = [size for size in range(common, SMALLEST_GROUP - 1, -1) if common % size == 0]
    if not found:
        raise LayerError(
            f"its groups of {group_size} cannot be cut to tile the {cols} inputs that are left: the two have no common "
            f"divisor of {SMALLEST_GROUP} or more; remove before quantizing, or in other numbers"
        )
    return found
