"""The matrix products that read what is stored, and which of them a layer gets on a device.

A kernel says what it accepts (`Accepts`): kinds of weight, grids, bits, and the parts at inputs and outputs that it
computes itself. Whatever a layer holds that a kernel does not name, the kernel is refused for.

A kernel keeps the codes in a layout of its own: `pack` makes it from the canonical codes and `unpack` gives exactly
those back, so that a layer holds its codes once, in the layout that it computes with. Kernels are tried in the order of
`KERNELS`; the first that takes a layer is used, for up to `max_rows` rows of input. Beyond that, and where none takes
it, the weight is made dense and multiplied ("dequantize", "densify").
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression import devices as _devices
from compression.errors import BackendError, install_command
from compression.numeric import packing
from compression.numeric.grids import DOUBLE_QUANT_BLOCK, AffineGrid, Int8RowGrid, NF4Grid, Params, dynamic_levels

SEMI_STRUCTURED = "semi_structured"
INT8_CUDA_ROWS = 8  # of a batch that decodes; where dequantizing wins is not measured yet, a prefill has far more
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a kernel has to know of a layer before it sees the tensors.

    Attributes:
        weight: the kind of the part that it multiplies by.
        facts: what that part says of itself, such as its `grid` or `pattern`.
        device: with its index on CUDA ("cuda:1"): the devices of a machine may differ.
        dtype: in which the product is taken.
        backend: "auto", or the name of the library whose kernel was asked for.
        inputs, outputs: the parts there, in order, each as it is described.
    """

    weight: str
    in_features: int
    out_features: int
    device: str
    dtype: torch.dtype
    backend: str = "auto"
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
    outputs: tuple[Mapping[str, Any], ...] = ()

    @property
    def grid(self) -> Any:
        """Of codes; None for other kinds."""
        return self.facts.get("grid")

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def words(self) -> str:
        """What the weight is stored as."""
        return getattr(self.grid, "kind", self.weight)

    @property
    def group(self) -> int:
        return self.in_features if self.grid.group_size == -1 else self.grid.group_size


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """What a layer may hold for a kernel to take it.

    Attributes:
        words: what the kernel is for, said where a layer is anything else.
        weight: kinds of the weight.
        grids, bits: of codes; None for any.
        inputs, outputs: kinds of the parts there that the kernel computes itself: these, in this order, and no others.
        dtypes: in which products are taken.
        devices: types of device.
    """

    words: str
    weight: tuple[str, ...] = ("codes",)
    grids: tuple[type, ...] | None = None
    bits: tuple[int, ...] | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = _NARROW
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refusal(self, spec: LayerSpec) -> str | None:
        """Why a layer is not of this kind, or None."""
        fits = (
            spec.weight in self.weight
            and (self.grids is None or isinstance(spec.grid, self.grids))
            and (self.bits is None or spec.grid.bits in self.bits)
        )
        if not fits or spec.device_type not in self.devices:
            return self.words
        for place, wanted, held in (("input", self.inputs, spec.inputs), ("output", self.outputs, spec.outputs)):
            kinds = tuple(each["kind"] for each in held)
            if kinds != wanted:
                found = "nothing" if not kinds else " and ".join(kinds)
                return (
                    f"{self.words}, with {' and '.join(wanted) or 'nothing'} at the {place} of the layer, not {found}"
                )
        if spec.dtype not in self.dtypes:
            *some, last = [_DTYPE_WORDS[dtype] for dtype in self.dtypes]
            return f"{', '.join(some) + ' or ' if some else ''}{last} only, not {spec.dtype}"
        return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to multiply by what is stored.

    Attributes:
        accepts: what it takes.
        refuses: why a layer that it accepts cannot have it all the same, by shapes or what is installed; or None.
        pack: canonical packed codes (rows, bytes), stored parameters, spec -> the kernel's layout.
        unpack: layout, spec -> exactly those codes.
        bind: layout, stored parameters, spec -> the product as a function of x (..., in_features) in the spec's dtype,
            to (..., out_features), without bias; what can be prepared is prepared once.
            Of a part that is not made of codes, the layout is the dense weight and there is nothing to pack.
        fuses_bias: whether it adds the bias itself; it is then among the parameters, if there is one.
        max_rows: rows of input, as a function of the spec, up to which the kernel is the faster way.
        rowwise: whether some rows of the layout are the layout of these rows of codes.
        graph_safe: whether a CUDA graph can hold it: not if it waits for the device to decide what to do next.

    A product may keep tensors of its own, made by `bind`; it names them in an attribute `held`.
    """

    name: str
    library: str
    accepts: Accepts
    refuses: Callable[[LayerSpec], str | None]
    bind: Callable[[Tensor, Params, LayerSpec], Product]
    max_rows: Callable[[LayerSpec], float]
    pack: Callable[[Tensor, Params, LayerSpec], Tensor] | None = None
    unpack: Callable[[Tensor, LayerSpec], Tensor] | None = None
    graph_safe: bool = True
    rowwise: bool = False
    fuses_bias: bool = False

    def refusal(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot have it, or None."""
        return self.accepts.refusal(spec) or self.refuses(spec)


def choose(spec: LayerSpec) -> tuple[Kernel | None, dict[str, str]]:
    """The kernel of a layer, or None for dequantize-and-multiply, and why the others were refused.

    Raises:
        BackendError: the layer names a backend, and that has no kernel for it here.
    """
    refused = {}
    for kernel in KERNELS:
        wanted = spec.backend in ("auto", kernel.library)
        reason = kernel.refusal(spec) if wanted else f"backend={spec.backend} was asked for"
        if reason is None:
            return kernel, refused
        refused[kernel.name] = reason
    if spec.backend not in ("auto", "torch"):
        reasons = "; ".join(f"{k.name}: {refused[k.name]}" for k in KERNELS if k.library == spec.backend)
        raise BackendError(f"backend={spec.backend!r} cannot take a {spec.words} layer of {spec.out_features} x "
                           f"{spec.in_features} in {spec.dtype} on {spec.device}: {reasons}; backend=auto "
                           "takes the fastest there is")  # fmt: skip
    return None, refused


def serves(library: str, kind: str) -> bool:
    """Whether a library has kernels for weights of a kind, wherever they run."""
    return library == "auto" or any(each.library == library and kind in each.accepts.weight for each in KERNELS)


def warm_up(device: str) -> None:
    """Compile what is compiled at first use, so that it falls on no clock."""
    if torch.device(device).type == "cpu":
        from compression.layers.kernels import lut4

        lut4.available()


def canonical(codes: Tensor, spec: LayerSpec) -> Tensor:
    """Canonical packed codes -> uint8 codes (out_features, in_features)."""
    return packing.unpack(codes, spec.grid.bits, spec.in_features)


@functools.cache
def has_bf16_cpu() -> bool:
    """Whether this processor multiplies bf16 in hardware; without, products of many rows are faster in fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def product_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """In which type a product with a dense weight is taken: `wanted`, or fp32 where 16 bits are slower."""
    if device.type == "cpu" and wanted in (torch.bfloat16, torch.float16) and not has_bf16_cpu():
        return torch.float32
    return wanted


def _affine_zeros(params: Params, spec: LayerSpec, middle: int) -> tuple[Tensor, Tensor]:
    """fp32 (rows, groups) scales, and the offsets s * (middle - z) that a kernel around `middle` has to add."""
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    assert zeros is not None
    return scales, scales * (middle - zeros)


def _missing_op(op: str, spec: LayerSpec) -> str | None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", spec.device_type.upper())
    return None if has else f"this torch has no {op} on {spec.device}"


# --- the project's own kernel for tables of up to 4 bits on CPU -------------------------------------------------------


def _lut4_refuses(spec: LayerSpec) -> str | None:
    from compression.layers.kernels import lut4

    if not lut4.available():
        return lut4.reason()
    if not lut4.supports(spec.out_features, spec.in_features, spec.group):
        return f"{spec.out_features} x {spec.in_features} in groups of {spec.group} does not tile"
    return None


def _lut4_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    from compression.layers.kernels import lut4

    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    zeros = None if zeros is None else zeros.contiguous()
    table = torch.arange(16, dtype=torch.float32)  # levels that no code of fewer bits names go on as whole numbers do
    table[: 2**spec.grid.bits] = spec.grid.table()
    return lut4.bind(layout, table, scales.contiguous(), zeros, spec.group)


def _lut4_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """Codes of 2 and 3 bits take 4 each in memory: what is stored is canonical all the same."""
    from compression.layers.kernels import lut4

    rows = max(1, 2**16 // spec.in_features)  # at a time: 3 bits are taken apart in words of 8 bytes to a code
    return torch.cat([lut4.pack(canonical(part, spec)) for part in codes.split(rows)])


def _lut4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    from compression.layers.kernels import lut4

    return packing.pack(lut4.unpack(layout, spec.in_features), spec.grid.bits)


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
        return _missing_op("_weight_int4pack_mm", spec)
    if spec.out_features % 16:
        return f"outputs must be a multiple of 16, not {spec.out_features}"
    return _missing_op("_weight_int4pack_mm_for_cpu", spec)


def _int4_residue(params: Params, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """What bf16 leaves of the offsets, as further groups of 4-bit weights: one input, the sum of x, to each group of x.

    Returns:
        Codes uint8 (rows, further columns), around 8, and bf16 (rows, further groups) scales; no columns where bf16
        holds every offset.
    """
    _, offsets = _affine_zeros(params, spec, middle=8)
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
    scales, offsets = _affine_zeros(params, spec, middle=8)
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
    return _missing_op("_weight_int8pack_mm", spec)


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


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def _bitsandbytes_missing() -> str | None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
    return None


def _bnb4_refuses(spec: LayerSpec) -> str | None:
    if spec.device_type == "cpu" and spec.backend == "auto":
        return "on CPU only when asked for by backend=bitsandbytes"
    return _bitsandbytes_missing()


def _bnb4_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """bitsandbytes holds the first of two codes in the high half of a byte."""
    return _bnb4_unpack(codes, spec)


def _bnb4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return (layout << 4 | layout >> 4).view(spec.out_features, -1)


def _bnb4_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    import bitsandbytes
    import bitsandbytes.functional as F

    grid, shape = spec.grid, torch.Size((spec.out_features, spec.in_features))
    common = {"shape": shape, "blocksize": grid.group_size, "quant_type": "nf4", "dtype": spec.dtype,
              "code": grid.table(layout.device)}  # fmt: skip
    if "absmax" in params:
        state = F.QuantState(absmax=params["absmax"], **common)
    else:
        levels = dynamic_levels(str(layout.device))
        outer = F.QuantState(
            absmax=params["absmax_scales"], code=levels, blocksize=DOUBLE_QUANT_BLOCK, dtype=torch.float32
        )
        state = F.QuantState(absmax=params["absmax_codes"], offset=params["absmax_offset"], state2=outer, **common)
    flat = layout.view(-1, 1)
    return lambda x: bitsandbytes.matmul_4bit(x, flat, quant_state=state)


def _bnb8_refuses(spec: LayerSpec) -> str | None:
    return _bitsandbytes_missing()


def _bnb8_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    return (codes ^ 0x80).view(torch.int8)


def _bnb8_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return layout.view(torch.uint8) ^ 0x80


def _bnb8_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    import bitsandbytes

    state, threshold = bitsandbytes.MatmulLtState(), spec.inputs[0]["threshold"]
    state.CB, state.SCB, state.threshold = layout, params["absmax"], threshold
    state.has_fp16_weights = state.is_training = False

    def product(x: Tensor) -> Tensor:
        # bitsandbytes quantizes activations from fp16, whatever their dtype: the cast is made here, not warned of there
        return bitsandbytes.matmul(x.to(torch.float16), layout, state=state, threshold=threshold).to(x.dtype)

    return product


# --- GPTQModel --------------------------------------------------------------------------------------------------------


def _gptqmodel_kernel(spec: LayerSpec) -> type:
    """The class of GPTQModel that its own selection takes for the layer.

    Raises:
        ImportError: it is not installed, or does not import.
        ValueError: none of its kernels takes the layer here.
    """
    from gptqmodel.models._const import DEVICE
    from gptqmodel.utils.importer import select_quant_linear

    common = {"bits": spec.grid.bits, "group_size": spec.grid.group_size, "desc_act": False,
              "sym": spec.grid.symmetric, "pack_dtype": torch.int32, "dtype": spec.dtype}  # fmt: skip
    found = select_quant_linear(device=DEVICE(spec.device_type), **common)
    ok, why = found.validate(in_features=spec.in_features, out_features=spec.out_features, **common)
    if not ok:
        raise ValueError(str(why))
    return found


def _gptqmodel_refuses(spec: LayerSpec) -> str | None:
    if spec.backend != "gptqmodel":
        return "only when asked for by backend=gptqmodel"
    if spec.grid.float_zeros:
        return "affine weights with whole zero points only"
    if spec.in_features * spec.grid.bits % 32 or spec.out_features * spec.grid.bits % 32:
        return f"{spec.out_features} x {spec.in_features} in {spec.grid.bits} bits do not fill whole 32-bit words"
    try:
        _gptqmodel_kernel(spec)
    except ImportError as error:
        return f"gptqmodel cannot be imported ({error}); {install_command('gptqmodel')}"
    except (ValueError, NotImplementedError) as error:
        return f"none of its kernels takes it: {error}"
    return None


def _gptqmodel_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    return packing.to_words(codes).t().contiguous()


def _gptqmodel_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return packing.to_bytes(layout.t())


def _gptqmodel_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    scales, zeros = spec.grid.expand(params, spec.out_features, spec.in_features)
    kind = _gptqmodel_kernel(spec)
    layer = kind(
        bits=spec.grid.bits, group_size=spec.grid.group_size, desc_act=False, sym=spec.grid.symmetric, bias=False,
        in_features=spec.in_features, out_features=spec.out_features, pack_dtype=torch.int32, register_buffers=True,
    ).eval()  # fmt: skip
    qzeros = packing.to_words(packing.pack(zeros.to(torch.uint8).t().contiguous(), spec.grid.bits))
    layer.qweight = layout if spec.device_type == "cpu" else layout.clone()  # CUDA kernels may reorder it in place
    layer.qzeros = (qzeros if kind.REQUIRES_FORMAT_V2 else packing.shift_zeros(qzeros, spec.grid.bits, -1)).contiguous()
    layer.scales = scales.t().to(spec.dtype).contiguous()
    layer.g_idx = (torch.arange(spec.in_features, device=layout.device) // spec.group).int()
    layer.qzero_format(format=2 if kind.REQUIRES_FORMAT_V2 else 1)
    layer.post_init()

    def product(x: Tensor) -> Tensor:
        with _devices.on(x.device):  # Triton launches on the current device
            return layer(x)

    try:
        with torch.no_grad():  # some take their own layout at the first product
            product(torch.zeros(1, spec.in_features, dtype=spec.dtype, device=layout.device))
    except RuntimeError as error:  # a kernel that says it takes a layer, and does not
        raise BackendError(f"{kind.__name__} of gptqmodel fails on {spec.out_features} x {spec.in_features} in groups "
                           f"of {spec.group}: {error}; backend=auto takes the fastest there is") from error  # fmt: skip
    product.held = tuple(t for t in layer.buffers() if t is not layout)  # type: ignore[attr-defined]
    return product


# --- 2:4, of core torch on CUDA ---------------------------------------------------------------------------------------


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


def _int8_rows(spec: LayerSpec) -> float:
    """On CUDA the kernel takes any number of rows and reads the weight anew for each, without tensor cores."""
    return INT8_CUDA_ROWS if spec.device_type == "cuda" else float("inf")


def _unlimited(spec: LayerSpec) -> float:
    return float("inf")


_LUT4 = Kernel(
    name="lut4", library="native", refuses=_lut4_refuses,
    accepts=Accepts(words="weights of at most 4 bits on CPU only", bits=(1, 2, 3, 4), devices=("cpu",)),
    pack=_lut4_pack, unpack=_lut4_unpack,
    bind=_lut4_bind,
    max_rows=lambda spec: 256,  # beyond, unpacking once and an fp32 product is faster
)  # fmt: skip
_INT4 = Kernel(
    name="int4", library="torch", refuses=_int4_refuses,
    accepts=Accepts(words="4-bit affine weights only", grids=(AffineGrid,), bits=(4,), dtypes=(torch.bfloat16,)),
    pack=_int4_pack, unpack=_int4_unpack,
    bind=_int4_bind, max_rows=lambda spec: spec.in_features,
)  # fmt: skip
_INT8 = Kernel(
    name="int8", library="torch", refuses=_int8_refuses,
    accepts=Accepts(words="8-bit affine weights only", grids=(AffineGrid,), bits=(8,), dtypes=(torch.bfloat16,)),
    pack=_int8_pack, unpack=_int8_unpack,
    bind=_int8_bind, max_rows=_int8_rows, rowwise=True,
)  # fmt: skip
_BNB4 = Kernel(
    name="bitsandbytes-nf4", library="bitsandbytes", refuses=_bnb4_refuses,
    accepts=Accepts(words="NF4 weights only", grids=(NF4Grid,)),
    pack=_bnb4_pack, unpack=_bnb4_unpack,
    bind=_bnb4_bind, max_rows=_unlimited,
)  # fmt: skip
_BNB8 = Kernel(
    name="bitsandbytes-int8", library="bitsandbytes", refuses=_bnb8_refuses,
    accepts=Accepts(words="LLM.int8() only", grids=(Int8RowGrid,), inputs=("outlier_columns",)),
    pack=_bnb8_pack, unpack=_bnb8_unpack,
    bind=_bnb8_bind, max_rows=_unlimited, graph_safe=False,
)  # fmt: skip

_GPTQMODEL = Kernel(
    name="gptqmodel", library="gptqmodel", refuses=_gptqmodel_refuses,
    accepts=Accepts(
        words="affine weights with whole zero points only", grids=(AffineGrid,),
        dtypes=(torch.float16, torch.bfloat16),
    ), pack=_gptqmodel_pack, unpack=_gptqmodel_unpack,
    bind=_gptqmodel_bind, max_rows=_unlimited,
)  # fmt: skip

_SEMI_STRUCTURED = Kernel(
    name=SEMI_STRUCTURED, library="torch", refuses=_semi_structured_refuses, bind=_semi_structured_bind,
    accepts=Accepts(
        words="they multiply 2:4 in 16 bits", weight=("sparse",), devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
    ),
    max_rows=_unlimited, fuses_bias=True,
)  # fmt: skip

KERNELS: tuple[Kernel, ...] = (_LUT4, _INT4, _INT8, _BNB4, _BNB8, _GPTQMODEL, _SEMI_STRUCTURED)
BACKENDS = ("auto", *dict.fromkeys(kernel.library for kernel in KERNELS))  # that a layer can ask for
