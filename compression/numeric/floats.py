"""Small floating-point types as grids: FP8 (E4M3, E5M2) and FP4 (E2M1), under scales of several kinds.

    element   sign, exponent and mantissa bits   largest   codes
    e4m3      1, 4, 3                            448       the byte; 0x7f and 0xff are NaN, and no code
    e5m2      1, 5, 2                            57,344    the byte; from 0x7c and 0xfc on infinite and NaN, and no code
    e2m1      1, 2, 1                            6         sign * 8 + place in 0, 0.5, 1, 1.5, 2, 3, 4, 6

    scale     stored as                                                    with e2m1 known as
    float     the dtype of the weight
    e4m3      E4M3, under one fp32 divisor for the whole weight            NVFP4, in groups of 16
    e8m0      an exponent of two in 8 bits, 127 standing for 1             MXFP4, in groups of 32

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0 (E2M1, E8M0, shared
exponent floor(log2 absmax) less that of the largest element); NVFP4 as in compressed-tensors 0.17
(`nvfp4_quantized.py`).
"""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric.checks import check_one_of, check_size
from compression.numeric.grouping import Kind, Params, _grouped, _groups, _round_up, groups_of

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_NO_CODE = {"e4m3": 0x7F, "e5m2": 0x7C}  # without the sign: from here on bytes are no numbers
SCALES = ("float", "e4m3", "e8m0")
_MIDDLE = 127  # the exponent that stands for a scale of 1
_SMALLEST_E4M3 = 2.0**-9
_EXPONENT = {"e4m3": 8, "e5m2": 15, "e2m1": 2}  # floor(log2) of the largest element


@dataclass(frozen=True, kw_only=True)
class FloatGrid:
    """W = s * T[q], T the values of a small floating-point type.

    Attributes:
        element: "e4m3", "e5m2" or "e2m1".
        group_size: inputs that share a scale; -1 for all of a row.
        scale: how scales are stored: "float", "e4m3" or "e8m0"; see the module.
    """

    kind: ClassVar[str] = "float"
    element: str
    group_size: int
    scale: str = "float"

    def __post_init__(self) -> None:
        check_one_of("element", self.element, tuple(BITS))
        check_one_of("scale", self.scale, SCALES)
        if self.group_size != -1:
            check_size("group_size", self.group_size)

    @property
    def bits(self) -> int:
        return BITS[self.element]

    @property
    def words(self) -> str:
        scales = {"float": "", "e4m3": ", scales in E4M3", "e8m0": ", scales powers of two"}[self.scale]
        return f"FP{self.bits} ({self.element.upper()}) {_groups(self.group_size)}{scales}"

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """By code; NaN and infinite for the bytes of FP8 that stand for it."""
        if self.element == "e2m1":
            levels = torch.tensor(E2M1_LEVELS, device=device)
            return torch.cat([levels, -levels])
        return fp8_values(torch.arange(256, dtype=torch.uint8, device=device), self.element)

    def fit(self, weight: Tensor, divisor: Tensor | None = None) -> Params:
        """Scales of a weight (rows, cols); under a given `divisor`, fp32 (), where scales are stored in E4M3."""
        largest = _grouped(weight, self.group_size).abs().amax(-1)
        top = LARGEST[self.element]
        if self.scale == "float":
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            scales = _round_up(largest.double() / top, dtype)
            if not torch.isfinite(scales).all():
                raise LayerError(f"the range of a group exceeds {dtype}: scale {float(scales.max())} is not finite")
            return {"scales": torch.where(scales == 0, torch.ones_like(scales), scales)}
        if self.scale == "e8m0":
            shared = largest.double().clamp(min=2.0**-_MIDDLE).log2().floor() - _EXPONENT[self.element] + _MIDDLE
            return {"scales": shared.clamp(0, 2 * _MIDDLE).to(torch.uint8)}
        if divisor is None:
            divisor = self.divisor_for(largest.amax())
        local = (divisor * largest / top).clamp(_SMALLEST_E4M3, LARGEST["e4m3"])
        return {"scales": fp8_bytes(local), "divisor": divisor}

    def divisor_for(self, largest: Tensor) -> Tensor:
        """The divisor under which the scale of a group with the largest value of all, fp32 (), is the largest E4M3."""
        top = LARGEST["e4m3"] * LARGEST[self.element]
        divisor = torch.where(largest > 0, top / largest, torch.ones_like(largest))
        return divisor.clamp(max=torch.finfo(torch.float32).max)  # of subnormal weights

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        scales, _ = self.expand(params, *weight.shape)
        values = _grouped(weight, self.group_size) / scales[..., None]
        codes = e2m1_codes(values) if self.element == "e2m1" else fp8_bytes(values, self.element)
        return codes.view(weight.shape)

    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, None]:
        if self.scale == "float":
            return params["scales"].float(), None
        if self.scale == "e8m0":
            return e8m0_values(params["scales"]), None
        return fp8_values(params["scales"]) / params["divisor"], None

    def take(self, params: Params, places: Tensor, size: int) -> "tuple[FloatGrid, Params]":
        return replace(self, group_size=size), params | {"scales": params["scales"].flatten()[places]}

    def buffers(self, rows: int, cols: int, dtype: Kind) -> dict[str, tuple[tuple[int, ...], Kind]]:
        shape = (rows, groups_of(cols, self.group_size))
        if self.scale == "float":
            return {"scales": (shape, dtype)}
        scales = {"scales": (shape, torch.uint8)}
        return scales if self.scale == "e8m0" else scales | {"divisor": ((), torch.float32)}

    def check(self, packed: Tensor, params: Params, cols: int) -> None:
        if packed.is_meta:
            return
        if self.element in _NO_CODE and ((packed & 0x7F) >= _NO_CODE[self.element]).any():
            first = _NO_CODE[self.element]
            raise LayerError(f"codes hold what is no number in {self.element.upper()} ({first:#x} or {first | 128:#x})")
        scales, _ = self.expand(params, packed.shape[0], cols)
        if not torch.isfinite(scales).all() or (self.scale != "float" and not (scales > 0).all()):
            raise LayerError(f"scales of kind {self.scale} must be finite and above 0")


def fp8_values(codes: Tensor, element: str = "e4m3") -> Tensor:
    """fp32 values of bytes.

    >>> fp8_values(torch.tensor([0x00, 0x01, 0x38, 0x7E, 0xB8], dtype=torch.uint8)).tolist()
    [0.0, 0.001953125, 1.0, 448.0, -1.0]
    """
    return codes.view(FP8[element]).float()


def e8m0_values(codes: Tensor) -> Tensor:
    """fp32 powers of two of bytes; infinite for 255, which stands for NaN.

    >>> e8m0_values(torch.tensor([0, 126, 127, 254, 255], dtype=torch.uint8)).log2().tolist()
    [-127.0, -1.0, 0.0, 127.0, inf]
    """
    exponents = codes.int()  # those of fp32, whose lowest is a subnormal number
    return torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)


def fp8_bytes(values: Tensor, element: str = "e4m3") -> Tensor:
    """uint8 codes of the nearest values, ties to even; beyond the largest, the largest.

    >>> fp8_bytes(torch.tensor([1.0, 1000.0, -1000.0])).tolist()
    [56, 126, 254]
    """
    top = LARGEST[element]  # torch's cast makes NaN, or infinity, of what lies beyond
    return values.float().clamp(-top, top).to(FP8[element]).view(torch.uint8)


def e2m1_codes(values: Tensor) -> Tensor:
    """uint8 codes of the nearest values, ties to the even mantissa; beyond the largest, the largest.

    >>> e2m1_codes(torch.tensor([0.25, 0.75, 2.5, 5.0, -9.0])).tolist()
    [0, 2, 4, 6, 15]
    """
    size = values.float().abs()
    places = torch.zeros_like(size, dtype=torch.uint8)
    for place, (low, high) in enumerate(itertools.pairwise(E2M1_LEVELS)):
        middle = (low + high) / 2
        places += (size > middle) if place % 2 == 0 else (size >= middle)  # a tie goes to the even place
    return places | (torch.signbit(values).to(torch.uint8) << 3)
