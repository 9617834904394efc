"""SparseLinear: a linear layer of whose weight only what is not zero is stored.

The state dict holds what is stored and nothing else, for a weight (rows, cols) with `itemsize` bytes to a number:

    bitmask    `mask` uint8 (rows, ceil(cols / 8)), one bit to a weight; `values` (kept,), row by row
               rows * ceil(cols / 8) + kept * itemsize bytes; of a bf16 weight, half of it zero: 0.5625
    n:m        of every m neighbours n `values` (rows, cols n/m), zeros among them where more went; `indices`, their
               places among the m, packed in ceil(log2 m) bits, uint8 (rows, ceil(cols n/m ceil(log2 m) / 8))
               a bf16 weight in 2:4: 0.5 + 0.0625; in 4:8: 0.5 + 0.09375, more than its bitmask would take

The weight is made anew for every product and not kept. On CUDA, 2:4 in bf16 or fp16 is multiplied by the kernels behind
`torch.sparse.to_sparse_semi_structured`, from a copy in their layout that is made at the first forward and not saved.
"""

import warnings
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
    check_places,
    check_shape,
    check_size,
    ones_in,
)
from compression.layers.kernels.choose import product_dtype
from compression.layers.kernels.torch_products import frozen_product
from compression.numeric import packing

DENSIFY = "densify"
SEMI_STRUCTURED = "semi_structured"


class SparseLinear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features, out_features: cols and rows of W.
        bias: whether there is one.
        dtype: of the values.
        kept: how many values a bitmask keeps; without meaning for a pattern.
        pattern: (n, m), or None for a bitmask.

    Raises:
        LayerError: a value is not allowed, or m does not divide the inputs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        kept: int = 0,
        pattern: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_one_of("dtype", dtype, FLOATS)
        if pattern is None:
            check_size("kept", kept, least=0, most=in_features * out_features)
        else:
            _check_pattern(pattern, in_features)
        self.in_features, self.out_features, self.pattern, self.kept = in_features, out_features, pattern, kept
        if pattern is None:
            places, width, shape = "mask", packing.packed_width(in_features, 1), (kept,)
        else:
            n, m = pattern
            shape = (out_features, in_features // m * n)
            places, width = "indices", packing.packed_width(shape[1], _index_bits(m))
        self._places = places
        self.register_buffer("values", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer(places, torch.empty(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._semi_structured: Any = None
        self._way: tuple[torch.device, str] | None = None  # how it multiplies there, found at the first forward

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, pattern: tuple[int, int] | None = None) -> Self:
        """Store a weight (rows, cols) bit for bit: every value but +0 is kept.

        Raises:
            LayerError: more than n of m neighbours are not zero.
        """
        weight = weight.detach()
        rows, cols = weight.shape
        kept = (weight != 0) | weight.signbit()  # -0 is another bit pattern than 0
        layer = cls(cols, rows, bias=bias is not None, dtype=weight.dtype, pattern=pattern, device="meta")
        if pattern is None:
            layer.values, layer.mask = weight[kept], packing.pack(kept.to(torch.uint8), 1)
            layer.kept = layer.values.numel()
        else:
            n, m = pattern
            groups = kept.view(rows, -1, m)
            if int(groups.sum(-1).max()) > n:
                raise LayerError(f"{int(groups.sum(-1).max())} of {m} neighbouring weights are not zero; store=nm with "
                                 f"{n}:{m} holds {n}")  # fmt: skip
            first = groups.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :n]
            places = first.sort(-1).values
            layer.values = weight.view(rows, -1, m).gather(-1, places).flatten(1)
            layer.indices = packing.pack(places.to(torch.uint8).flatten(1), _index_bits(m))
        if bias is not None:
            layer.bias = bias.detach()
        layer.check()
        return layer

    def check(self) -> None:
        """Raise LayerError unless the tensors are what the layer is described as: `compression.layers.checks`."""
        rows, cols, own = self.out_features, self.in_features, {torch.uint8}
        if self.pattern is None:
            values = check_shape(self, "values", (self.kept,), FLOATS)
            mask = check_shape(self, "mask", (rows, packing.packed_width(cols, 1)), own)
            check_padding("mask", mask, cols, 1)
            if not mask.is_meta and (ones := ones_in(mask)) != self.kept:
                raise LayerError(f"mask has {ones} bits set for the {self.kept} values that are kept")
        else:
            n, m = self.pattern
            count, bits = cols // m * n, _index_bits(m)
            values = check_shape(self, "values", (rows, count), FLOATS)
            indices = check_shape(self, "indices", (rows, packing.packed_width(count, bits)), own)
            check_padding("indices", indices, count, bits)
            check_places(indices, count, bits, self.pattern)
        check_finite("values", values)
        if self.bias is not None:
            check_finite("bias", check_shape(self, "bias", (rows,), FLOATS))

    @property
    def weight(self) -> Tensor:
        """W (out_features, in_features), made anew at every reading."""
        rows, cols = self.out_features, self.in_features
        if self.pattern is None:
            mask = packing.unpack(self.mask, 1, cols).bool()
            return self.values.new_zeros(rows, cols).masked_scatter_(mask, self.values)
        n, m = self.pattern
        places = packing.unpack(self.indices, _index_bits(m), self.values.shape[1]).long().view(rows, -1, n)
        weight = self.values.new_zeros(rows, cols // m, m)
        return weight.scatter_(-1, places, self.values.view(rows, -1, n)).view(rows, cols)

    def forward(self, x: Tensor) -> Tensor:
        if self._way is None or self._way[0] != x.device:
            self._way = x.device, self.kernel_name(x.device)
        if self._way[1] == SEMI_STRUCTURED and not (x.requires_grad and torch.is_grad_enabled()):
            if self._semi_structured is None:
                self._semi_structured = _semi_structured(self.weight)
            return nn.functional.linear(x.to(self.dtype), self._semi_structured, self.bias).to(x.dtype)
        dtype = product_dtype(x.dtype, x.device)
        bias = None if self.bias is None else self.bias.to(dtype)
        if x.requires_grad and torch.is_grad_enabled():
            y = frozen_product(x.to(dtype), lambda kind: self.weight.to(kind))
            return (y if bias is None else y + bias).to(x.dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    def to_linear(self) -> nn.Linear:
        """A dense layer with the same weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes in the state dict: values, their places and bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def kernel_name(self, device: torch.device | str | None = None) -> str:
        """How the layer multiplies on the device (default: where it is)."""
        device = torch.device(device or self.values.device)
        return DENSIFY if self._refusal(device) else SEMI_STRUCTURED

    def _refusal(self, device: torch.device) -> str | None:
        """Why torch's semi-structured kernels do not take the layer on a device, or None."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return "they are for CUDA"
        if self.pattern != (2, 4) or self.dtype not in (torch.bfloat16, torch.float16):
            return "they multiply 2:4 in 16 bits"
        if not torch.backends.cusparselt.is_available():
            return "this torch is built without cuSPARSELt"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "they need compute capability 8.0"
        if self.out_features % 32 or self.in_features % 64:
            return "they need outputs in multiples of 32 and inputs in multiples of 64"
        return None

    def extra_repr(self) -> str:
        stored = "bitmask" if self.pattern is None else "{}:{}".format(*self.pattern)
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={stored}"

    # --- the copy for a kernel is of the values as they are -----------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._semi_structured = self._way = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._semi_structured = self._way = None
        check_incoming(self, state_dict, prefix, ("values",))
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_loaded(self, state_dict, prefix)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_semi_structured": None, "_way": None}


def _semi_structured(weight: Tensor) -> Tensor:
    """The copy for the kernels; torch warns at the first one that its interface may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        return torch.sparse.to_sparse_semi_structured(weight)


def _check_pattern(pattern: tuple[int, int], cols: int) -> None:
    n, m = pattern
    check_size("m of the pattern", m, least=2, most=256)
    check_size("n of the pattern", n, least=1, most=m - 1)
    if cols % m:
        raise LayerError(f"pattern {n}:{m} does not divide the {cols} inputs of the layer")


def _index_bits(m: int) -> int:
    return (m - 1).bit_length()
