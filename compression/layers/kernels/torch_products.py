"""Products of torch: with a weight made anew for each of them, and the kernels that read 4 and 8 bits, and 2:4."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compression.layers.kernels.kernel import Accepts, Kernel, LayerSpec, Product, canonical, unlimited
from compression.numeric import packing
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import Params

INT8_CUDA_ROWS = 8  # of a batch that decodes; where dequantizing wins is not measured yet, a prefill has far more


@functools.cache
def has_bf16_cpu() -> bool:
    """Whether this processor multiplies bf16 in hardware; without, products of many rows are faster in fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def product_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """In which type a product with a dense weight is taken: `wanted`, or fp32 where 16 bits are slower."""
    if device.type == "cpu" and wanted in (torch.bfloat16, torch.float16) and not has_bf16_cpu():
        return torch.float32
    return wanted


def frozen_product(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x W^T with a gradient for x, none for W (rows, cols), which is made anew by dtype on the way back and not kept.

    Otherwise autograd would hold the dense weights of all layers of a model from its forward to its backward.
    """
    return _FrozenProduct.apply(x, weight)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        context.weight = weight
        return x @ weight(x.dtype).t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.weight(gradient.dtype), None


def affine_zeros(params: Params, spec: LayerSpec, middle: int) -> tuple[Tensor, Tensor]:
    """fp32 (rows, groups) scales, and the offsets s * (middle - z) that a kernel around `middle` has to add."""
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    assert zeros is not None
    return scales, scales * (middle - zeros)


def missing_op(op: str, spec: LayerSpec) -> str | None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", spec.device_type.upper())
    return None if has else f"this torch has no {op} on {spec.device}"


# --- int4 and int8 of core torch --------------------------------------------------------------------------------------
#
# Both round what they add up to bf16, so an offset that is added afterwards, or in bf16, costs the precision of the
# larger of two numbers that cancel. Offsets are therefore columns: of the codes, with sums of x as their inputs, summed
# up in fp32 with all others and rounded once.


def _int4_refuses(spec: LayerSpec) -> str | None:
    if spec.group not in (32, 64, 128, 256):
        return f"groups of 32, 64, 128 or 256 only, not {spec.group}"
    if spec.device_type == "cuda":
        capability = torch.cuda.get_device_capability(spec.device)
        if capability < (8, 0):
            return f"compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
        if spec.out_features % 8 or spec.in_features % 128:
            return "outputs must be a multiple of 8 and inputs of 128"
        return missing_op("_weight_int4pack_mm", spec)
    if spec.out_features % 16:
        return f"outputs must be a multiple of 16, not {spec.out_features}"
    return missing_op("_weight_int4pack_mm_for_cpu", spec)


def _int4_residue(params: Params, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """What bf16 leaves of the offsets, as further groups of 4-bit weights: one input, the sum of x, to each group of x.

    Returns:
        Codes uint8 (rows, further columns), around 8, and bf16 (rows, further groups) scales; no columns where bf16
        holds every offset.
    """
    _, offsets = affine_zeros(params, spec, middle=8)
    residue = offsets - offsets.bfloat16().float()
    tile = max(spec.group, 128)  # CUDA takes multiples of 128 columns
    columns = -(-residue.shape[1] // tile) * tile if residue.any() else 0
    grouped = torch.nn.functional.pad(residue, (0, columns - residue.shape[1] if columns else -residue.shape[1]))
    grouped = grouped.view(spec.out_features, columns // spec.group, spec.group)
    scales = (grouped.abs().amax(-1) / 7).bfloat16() if columns else grouped.new_zeros(spec.out_features, 0).bfloat16()
    unit = torch.where(scales == 0, 1, scales).float()
    codes = (grouped / unit[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).view(spec.out_features, columns), scales


def _int4_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    q = torch.cat([canonical(codes, spec), _int4_residue(params, spec)[0]], 1)
    if spec.device_type == "cuda":
        return torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)


def _int4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    """The product with the identity, under scales of one, is q - 8: small integers, exact in bf16."""
    cols = layout.numel() * layout.element_size() * 2 // spec.out_features
    unit = torch.zeros(cols // spec.group, spec.out_features, 2, dtype=torch.bfloat16, device=layout.device)
    unit[..., 0] = 1
    eye = torch.eye(spec.in_features, cols, dtype=torch.bfloat16, device=layout.device)
    op = _int4_op(spec)
    q = torch.cat([op(rows, layout, spec.group, unit) for rows in eye.split(1024)])
    return packing.pack((q.t() + 8).to(torch.uint8).contiguous(), 4)


def _int4_op(spec: LayerSpec) -> Callable[..., Tensor]:
    aten = torch.ops.aten
    return aten._weight_int4pack_mm if spec.device_type == "cuda" else aten._weight_int4pack_mm_for_cpu


def _int4_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    scales, offsets = affine_zeros(params, spec, middle=8)
    codes, further = _int4_residue(params, spec)
    pairs = torch.stack([scales.t(), offsets.t()], -1).to(torch.bfloat16)
    pairs = torch.cat([pairs, torch.stack([further.t(), torch.zeros_like(further.t())], -1)]).contiguous()
    op, room = _int4_op(spec), codes.shape[1] - scales.shape[1]

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, spec.in_features).contiguous()
        if room >= 0:
            sums = flat.view(len(flat), -1, spec.group).sum(-1)
            flat = torch.cat([flat, torch.nn.functional.pad(sums, (0, room))], 1)
        return op(flat, layout, spec.group, pairs).view(*x.shape[:-1], spec.out_features)

    product.held = pairs  # type: ignore[attr-defined]
    return product


_SUM_COLUMNS = 16  # of an int8 layout: three bf16 parts of the sum of x for each digit of the offset, and a spare one
_DIGITS = tuple(128.0**power for power in (2, 1, 0, -1, -2))  # signed digits of 128 - zero, which may be a real number


def _int8_refuses(spec: LayerSpec) -> str | None:
    if spec.group != spec.in_features:
        return "one scale per output channel only (group_size=-1)"
    return missing_op("_weight_int8pack_mm", spec)


def _int8_columns(spec: LayerSpec) -> int:
    """Zeros up to a multiple of 16, beyond whose last whole one the operator of the CPU reads past the end of a row."""
    return -(-spec.in_features // 16) * 16


def _int8_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """q - 128, and for offsets the digits of 128 - z, each three times."""
    signed = torch.nn.functional.pad((codes ^ 0x80).view(torch.int8), (0, _int8_columns(spec) - spec.in_features))
    if spec.grid.symmetric:  # type: ignore[attr-defined]
        return signed
    _, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    rest, columns = 128 - zeros[:, :1].double(), []  # type: ignore[index]
    for unit in _DIGITS:
        digit = (rest / unit).round().clamp(-128, 127)
        rest = rest - digit * unit
        columns += [digit] * 3
    return torch.cat([signed, *(digit.to(torch.int8) for digit in columns), torch.zeros_like(signed[:, :1])], 1)


def _int8_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return layout[:, : spec.in_features].contiguous().view(torch.uint8) ^ 0x80


def _int8_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    """y = s (x (q - 128)^T + sum(x) (128 - z)), all of it one product of codes."""
    scales, _ = spec.grid.expand(params, spec.out_features, spec.in_features)
    column, room = scales[:, 0].to(spec.dtype), _int8_columns(spec) - spec.in_features
    units = torch.zeros(3, _SUM_COLUMNS, dtype=spec.dtype, device=layout.device)
    for place, unit in enumerate(_DIGITS):
        units[:, 3 * place : 3 * place + 3] = unit * torch.eye(3)

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, spec.in_features)
        parts = [flat, flat.new_zeros(len(flat), room)] if room else [flat]
        if layout.shape[1] > spec.in_features + room:
            parts.append(_split(flat.sum(-1, dtype=torch.float32)) @ units)
        wide = torch.cat(parts, 1) if len(parts) > 1 else flat.contiguous()
        return torch.ops.aten._weight_int8pack_mm(wide, layout, column).view(*x.shape[:-1], spec.out_features)

    product.held = (column, units)  # type: ignore[attr-defined]
    return product


def _split(sums: Tensor) -> Tensor:
    """fp32 (n,) as three bf16 numbers each that add up to it, (n, 3)."""
    high = sums.bfloat16()
    rest = sums - high
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle).bfloat16()], -1)


def _int8_rows(spec: LayerSpec) -> float:
    """On CUDA the kernel takes any number of rows and reads the weight anew for each, without tensor cores."""
    return INT8_CUDA_ROWS if spec.device_type == "cuda" else float("inf")


# --- 2:4 on CUDA -----------------------------------------------------------------------------------------------------


def _semi_structured_refuses(spec: LayerSpec) -> str | None:
    if not torch.cuda.is_available():
        return "they are for CUDA"
    if spec.facts["pattern"] != (2, 4) or spec.facts["stored"] != spec.dtype:
        return "they multiply 2:4 in 16 bits"
    if not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt"
    if torch.cuda.get_device_capability(spec.device) < (8, 0):
        return "they need compute capability 8.0"
    if spec.out_features % 32 or spec.in_features % 64:
        return "they need outputs in multiples of 32 and inputs in multiples of 64"
    return None


def _semi_structured_bind(weight: Tensor, params: Params, spec: LayerSpec) -> Product:
    """From a copy in the layout of the kernels; torch warns at the first one that its interface may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        copied, bias = torch.sparse.to_sparse_semi_structured(weight), params.get("bias")

    def product(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, copied, bias)

    product.held = copied  # type: ignore[attr-defined]
    return product


INT4 = Kernel(
    name="int4", library="torch", refuses=_int4_refuses,
    accepts=Accepts(words="4-bit affine weights only", grids=(AffineGrid,), bits=(4,), dtypes=(torch.bfloat16,)),
    pack=_int4_pack, unpack=_int4_unpack,
    bind=_int4_bind, max_rows=lambda spec: spec.in_features,
)  # fmt: skip
INT8 = Kernel(
    name="int8", library="torch", refuses=_int8_refuses,
    accepts=Accepts(words="8-bit affine weights only", grids=(AffineGrid,), bits=(8,), dtypes=(torch.bfloat16,)),
    pack=_int8_pack, unpack=_int8_unpack,
    bind=_int8_bind, max_rows=_int8_rows, rowwise=True,
)  # fmt: skip
SEMI_STRUCTURED = Kernel(
    name="semi_structured", library="torch", refuses=_semi_structured_refuses, bind=_semi_structured_bind,
    accepts=Accepts(
        words="they multiply 2:4 in 16 bits", weight=("sparse",), devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
    ),
    max_rows=unlimited, fuses_bias=True,
)  # fmt: skip
