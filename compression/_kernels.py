"""The matrix products that read packed codes, and which of them a layer gets on a device.

A kernel keeps the codes in a layout of its own: `pack` makes it from the canonical codes and `unpack` gives exactly
those back, so that a layer holds its codes once, in the layout that it computes with. Kernels are tried in the order of
`KERNELS`; the first that takes a layer is used, for up to `max_rows` rows of input. Beyond that, and where none takes
it, the weight is dequantized and multiplied (`DEQUANTIZE`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compression import _packing
from compression._errors import BackendError
from compression._grids import DOUBLE_QUANT_BLOCK, AffineGrid, Grid, Int8RowGrid, NF4Grid, Params, dynamic_levels

DEQUANTIZE = "dequantize"


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a kernel has to know of a layer before it sees the codes.

    Attributes:
        dtype: in which the product is taken.
        backend: "auto", or the name of the library whose kernel was asked for.
        threshold: outlier threshold of LLM.int8(), or None where activations stay as they are.
    """

    grid: Grid
    in_features: int
    out_features: int
    device: str
    dtype: torch.dtype
    backend: str = "auto"
    threshold: float | None = None

    @property
    def group(self) -> int:
        return self.in_features if self.grid.group_size == -1 else self.grid.group_size


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to multiply by packed codes.

    Attributes:
        refuses: why a layer cannot have it, or None.
        pack: canonical packed codes (rows, bytes), spec -> the kernel's layout.
        unpack: the exact inverse.
        prepare: stored parameters, spec -> whatever `matmul` needs beside the layout.
        matmul: x (..., in_features), layout, prepared, spec -> (..., out_features), without bias.
        max_rows: rows of input, as a function of the spec, up to which the kernel is the faster way.
    """

    name: str
    library: str
    refuses: Callable[[LayerSpec], str | None]
    pack: Callable[[Tensor, LayerSpec], Tensor]
    unpack: Callable[[Tensor, LayerSpec], Tensor]
    prepare: Callable[[Params, LayerSpec], Any]
    matmul: Callable[[Tensor, Tensor, Any, LayerSpec], Tensor]
    max_rows: Callable[[LayerSpec], float]


def choose(spec: LayerSpec) -> tuple[Kernel | None, dict[str, str]]:
    """The kernel of a layer, or None for dequantize-and-multiply, and why the others were refused.

    Raises:
        BackendError: the layer names a backend, and that has no kernel for it here.
    """
    refused = {}
    for kernel in KERNELS:
        wanted = spec.backend in ("auto", kernel.library)
        reason = kernel.refuses(spec) if wanted else f"backend={spec.backend} was asked for"
        if reason is None:
            return kernel, refused
        refused[kernel.name] = reason
    if spec.backend not in ("auto", "torch"):
        reasons = "; ".join(f"{k.name}: {refused[k.name]}" for k in KERNELS if k.library == spec.backend)
        raise BackendError(f"backend={spec.backend!r} cannot take a {spec.grid.kind} layer of {spec.out_features} x "
                           f"{spec.in_features} in {spec.dtype} on {spec.device}: {reasons}; backend=auto "
                           "takes the fastest there is")  # fmt: skip
    return None, refused


def canonical(codes: Tensor, spec: LayerSpec) -> Tensor:
    """Canonical packed codes -> uint8 codes (out_features, in_features)."""
    return _packing.unpack(codes, spec.grid.bits, spec.in_features)


@functools.cache
def has_bf16_cpu() -> bool:
    """Whether this processor multiplies bf16 in hardware; without, products of many rows are faster in fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _affine_zeros(params: Params, spec: LayerSpec, middle: int) -> tuple[Tensor, Tensor]:
    """fp32 (rows, groups) scales, and the offsets s * (middle - z) that a kernel around `middle` has to add."""
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    assert zeros is not None
    return scales, scales * (middle - zeros)


def _missing_op(op: str, spec: LayerSpec) -> str | None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", spec.device.upper())
    return None if has else f"this torch has no {op} on {spec.device}"


# --- the project's own kernel for 4-bit tables on CPU -----------------------------------------------------------------


def _lut4_refuses(spec: LayerSpec) -> str | None:
    if spec.device != "cpu" or spec.grid.bits != 4 or spec.threshold is not None:
        return "4-bit weights on CPU only"
    from compression import _native

    if not _native.available():
        return _native.reason()
    if not _native.supports(spec.out_features, spec.in_features, spec.group):
        return f"{spec.out_features} x {spec.in_features} in groups of {spec.group} does not tile"
    return None


def _lut4_prepare(params: Params, spec: LayerSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    return spec.grid.table(), scales.contiguous(), None if zeros is None else zeros.contiguous()


def _lut4_pack(codes: Tensor, spec: LayerSpec) -> Tensor:
    from compression import _native

    return _native.pack(canonical(codes, spec))


def _lut4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    from compression import _native

    return _packing.pack(_native.unpack(layout, spec.in_features), 4)


def _lut4_matmul(x: Tensor, layout: Tensor, prepared: Any, spec: LayerSpec) -> Tensor:
    from compression import _native

    table, scales, zeros = prepared
    return _native.matmul(x, layout, table, scales, zeros, spec.group, spec.out_features)


# --- int4 and int8 of core torch --------------------------------------------------------------------------------------


def _int4_refuses(spec: LayerSpec) -> str | None:
    if not isinstance(spec.grid, AffineGrid) or spec.grid.bits != 4:
        return "4-bit affine weights only"
    if spec.group not in (32, 64, 128, 256):
        return f"groups of 32, 64, 128 or 256 only, not {spec.group}"
    if spec.dtype != torch.bfloat16:
        return f"bf16 only, not {spec.dtype}"
    if spec.device == "cuda":
        if torch.cuda.get_device_capability() < (8, 0):
            return f"compute capability 8.0 or newer, not {torch.cuda.get_device_capability()}"
        if spec.out_features % 8 or spec.in_features % 128:
            return "outputs must be a multiple of 8 and inputs of 128"
        return _missing_op("_weight_int4pack_mm", spec)
    if spec.device != "cpu":
        return f"no kernel on {spec.device}"
    if spec.out_features % 16:
        return f"outputs must be a multiple of 16, not {spec.out_features}"
    return _missing_op("_weight_int4pack_mm_for_cpu", spec)


def _int4_pack(codes: Tensor, spec: LayerSpec) -> Tensor:
    q = canonical(codes, spec)
    if spec.device == "cuda":
        return torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)


def _int4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    """The product with the identity, under scales of one, is q - 8: small integers, exact in bf16."""
    unit = torch.zeros(spec.in_features // spec.group, spec.out_features, 2, dtype=torch.bfloat16, device=layout.device)
    unit[..., 0] = 1
    eye = torch.eye(spec.in_features, dtype=torch.bfloat16, device=layout.device)
    q = torch.cat([_int4_matmul(rows, layout, unit, spec) for rows in eye.split(1024)])
    return _packing.pack((q.t() + 8).to(torch.uint8).contiguous(), 4)


def _int4_prepare(params: Params, spec: LayerSpec) -> Tensor:
    scales, offsets = _affine_zeros(params, spec, middle=8)
    return torch.stack([scales.t(), offsets.t()], -1).to(torch.bfloat16).contiguous()


def _int4_matmul(x: Tensor, layout: Tensor, prepared: Tensor, spec: LayerSpec) -> Tensor:
    flat = x.reshape(-1, spec.in_features).contiguous()
    op = torch.ops.aten._weight_int4pack_mm if spec.device == "cuda" else torch.ops.aten._weight_int4pack_mm_for_cpu
    return op(flat, layout, spec.group, prepared).view(*x.shape[:-1], spec.out_features)


def _int8_refuses(spec: LayerSpec) -> str | None:
    if not isinstance(spec.grid, AffineGrid) or spec.grid.bits != 8:
        return "8-bit affine weights only"
    if spec.group != spec.in_features:
        return "one scale per output channel only (group_size=-1)"
    if spec.dtype != torch.bfloat16:
        return f"bf16 only, not {spec.dtype}"
    return _missing_op("_weight_int8pack_mm", spec)


def _int8_layout(codes: Tensor, spec: LayerSpec) -> Tensor:
    return (codes ^ 0x80).view(torch.int8)


def _int8_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return layout.view(torch.uint8) ^ 0x80


def _int8_prepare(params: Params, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    scales, offsets = _affine_zeros(params, spec, middle=128)
    return scales[:, 0].to(spec.dtype), offsets[:, 0].to(spec.dtype) if offsets.any() else None


def _int8_matmul(x: Tensor, layout: Tensor, prepared: Any, spec: LayerSpec) -> Tensor:
    scales, offsets = prepared
    y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, spec.in_features).contiguous(), layout, scales)
    y = y.view(*x.shape[:-1], spec.out_features)
    return y if offsets is None else y + x.sum(-1, keepdim=True) * offsets


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def _bitsandbytes_missing() -> str | None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
    return None


def _bnb4_refuses(spec: LayerSpec) -> str | None:
    if not isinstance(spec.grid, NF4Grid):
        return "NF4 weights only"
    if spec.device == "cpu" and spec.backend == "auto":
        return "on CPU only when asked for by backend=bitsandbytes"
    return _bitsandbytes_missing()


def _bnb4_swap(codes: Tensor, spec: LayerSpec) -> Tensor:
    """bitsandbytes holds the first of two codes in the high half of a byte; its own inverse."""
    return (codes << 4 | codes >> 4).view(spec.out_features, -1)


def _bnb4_prepare(params: Params, spec: LayerSpec) -> Any:
    import bitsandbytes.functional as F

    grid, shape = spec.grid, torch.Size((spec.out_features, spec.in_features))
    table = grid.table(next(iter(params.values())).device)
    common = {"shape": shape, "code": table, "blocksize": grid.group_size, "quant_type": "nf4", "dtype": spec.dtype}
    if "absmax" in params:
        return F.QuantState(absmax=params["absmax"], **common)
    levels = dynamic_levels(str(params["absmax_codes"].device))
    outer = F.QuantState(
        absmax=params["absmax_scales"], code=levels, blocksize=DOUBLE_QUANT_BLOCK, dtype=torch.float32
    )
    return F.QuantState(absmax=params["absmax_codes"], offset=params["absmax_offset"], state2=outer, **common)


def _bnb4_matmul(x: Tensor, layout: Tensor, prepared: Any, spec: LayerSpec) -> Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, layout.view(-1, 1), quant_state=prepared)


def _bnb8_refuses(spec: LayerSpec) -> str | None:
    if not isinstance(spec.grid, Int8RowGrid) or spec.threshold is None:
        return "LLM.int8() only"
    return _bitsandbytes_missing()


def _bnb8_matmul(x: Tensor, layout: Tensor, prepared: Tensor, spec: LayerSpec) -> Tensor:
    import bitsandbytes

    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights, state.is_training = (
        layout, prepared, spec.threshold, False, False)  # fmt: skip
    # bitsandbytes quantizes activations from fp16, whatever their dtype: the cast is made here, not warned of there
    return bitsandbytes.matmul(x.to(torch.float16), layout, state=state, threshold=spec.threshold).to(x.dtype)


def _unlimited(spec: LayerSpec) -> float:
    return float("inf")


_LUT4 = Kernel(
    name="lut4", library="native", refuses=_lut4_refuses, pack=_lut4_pack, unpack=_lut4_unpack,
    prepare=_lut4_prepare, matmul=_lut4_matmul, max_rows=lambda spec: 256,  # beyond, unpacking once and an fp32 product is faster
)  # fmt: skip
_INT4 = Kernel(
    name="int4", library="torch", refuses=_int4_refuses, pack=_int4_pack, unpack=_int4_unpack,
    prepare=_int4_prepare, matmul=_int4_matmul, max_rows=lambda spec: spec.in_features,
)  # fmt: skip
_INT8 = Kernel(
    name="int8", library="torch", refuses=_int8_refuses, pack=_int8_layout, unpack=_int8_unpack,
    prepare=_int8_prepare, matmul=_int8_matmul, max_rows=_unlimited,
)  # fmt: skip
_BNB4 = Kernel(
    name="bitsandbytes-nf4", library="bitsandbytes", refuses=_bnb4_refuses, pack=_bnb4_swap, unpack=_bnb4_swap,
    prepare=_bnb4_prepare, matmul=_bnb4_matmul, max_rows=_unlimited,
)  # fmt: skip
_BNB8 = Kernel(
    name="bitsandbytes-int8", library="bitsandbytes", refuses=_bnb8_refuses, pack=_int8_layout, unpack=_int8_unpack,
    prepare=lambda params, spec: params["absmax"], matmul=_bnb8_matmul, max_rows=_unlimited,
)  # fmt: skip

KERNELS: tuple[Kernel, ...] = (_LUT4, _INT4, _INT8, _BNB4, _BNB8)
