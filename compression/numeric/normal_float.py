"""NormalFloat of 4 bits, with the scales of its blocks rounded to 8 bits (QLoRA, arXiv 2305.14314)."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric.checks import check_one_of
from compression.numeric.grouping import Kind, Params, _grouped, _groups, groups_of

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
DOUBLE_QUANT_BLOCK = 256
SMALLEST_ABSMAX = 1e-38  # as in bitsandbytes; the inverse of a smaller one would overflow


@dataclass(frozen=True, kw_only=True)
class NF4Grid:
    """4-bit NormalFloat: W = absmax * T[q], T the 16 quantiles of a normal distribution that QLoRA fixes.

    Groups of 64 share their absmax. With `double_quant` the absmax values, less their mean, are themselves stored in
    8 bits in blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight; without, 4.5.
    The codes are those nearest under the exact absmax, as bitsandbytes has it, not under the stored one.
    """

    kind: ClassVar[str] = "nf4"
    bits: int = 4
    group_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        check_one_of("bits", self.bits, (4,))
        check_one_of("double_quant", self.double_quant, (False, True))

    @property
    def words(self) -> str:
        return f"NF4 {_groups(self.group_size)}, scales in {'8 bits' if self.double_quant else 'fp32'}"

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        return _table(NF4_LEVELS, str(device))

    def fit(self, weight: Tensor) -> Params:
        return self.store(_grouped(weight, self.group_size).abs().amax(-1).flatten())

    def store(self, absmax: Tensor) -> Params:
        """What is stored of the absmax of all groups (groups,), fp32."""
        if not self.double_quant:
            return {"absmax": absmax}
        offset = absmax.mean()
        if not torch.isfinite(offset):
            raise LayerError(f"the sum of the groups' absmax exceeds fp32: the largest is {float(absmax.max())}")
        blocks = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % DOUBLE_QUANT_BLOCK))
        blocks = blocks.view(-1, DOUBLE_QUANT_BLOCK)
        scales = blocks.abs().amax(-1)
        unit = blocks * (1 / scales.clamp(min=SMALLEST_ABSMAX))[:, None]
        codes = _nearest(unit, dynamic_levels(str(absmax.device)))
        return {
            "absmax_codes": codes.flatten()[: absmax.numel()].clone(),
            "absmax_scales": scales,
            "absmax_offset": offset,
        }

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        w = _grouped(weight, self.group_size)
        absmax = w.abs().amax(-1, keepdim=True)
        unit = w * (1 / absmax.clamp(min=SMALLEST_ABSMAX))
        return _nearest(unit, self.table(weight.device)).view(weight.shape)

    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, None]:
        if not self.double_quant:
            return params["absmax"].view(rows, -1), None
        codes = params["absmax_codes"]
        scales = params["absmax_scales"].repeat_interleave(DOUBLE_QUANT_BLOCK)[: codes.numel()]
        absmax = dynamic_levels(str(codes.device))[codes.int()] * scales + params["absmax_offset"]
        return absmax.view(rows, -1), None

    def take(self, params: Params, places: Tensor, size: int) -> "tuple[NF4Grid, Params]":
        """Where a block of the double quantization would have to mix several old ones, absmax is stored in fp32."""
        grid, flat = replace(self, group_size=size), places.flatten()
        if not self.double_quant:
            return grid, {"absmax": params["absmax"][flat]}
        blocks = flat // DOUBLE_QUANT_BLOCK
        first = blocks[::DOUBLE_QUANT_BLOCK]
        if torch.equal(blocks, first.repeat_interleave(DOUBLE_QUANT_BLOCK)[: len(blocks)]):
            codes, scales = params["absmax_codes"][flat], params["absmax_scales"][first]
            return grid, params | {"absmax_codes": codes, "absmax_scales": scales}
        absmax, _ = self.expand(params, 1, -1)
        return replace(grid, double_quant=False), {"absmax": absmax.flatten()[flat]}

    def buffers(self, rows: int, cols: int, dtype: Kind) -> dict[str, tuple[tuple[int, ...], Kind]]:
        count = rows * groups_of(cols, self.group_size)
        if not self.double_quant:
            return {"absmax": ((count,), torch.float32)}
        return {
            "absmax_codes": ((count,), torch.uint8),
            "absmax_scales": ((-(-count // DOUBLE_QUANT_BLOCK),), torch.float32),
            "absmax_offset": ((), torch.float32),
        }

    def check(self, packed: Tensor, params: Params, cols: int) -> None:
        """All codes stand for a level."""


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """uint8 index of the nearest of the sorted levels; a tie goes to the lower one."""
    boundaries = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(x, boundaries, out_int32=True).to(torch.uint8)


@functools.lru_cache(maxsize=8)
def _table(levels: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def dynamic_levels(device: str = "cpu") -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type, fp32, ascending.

    Seven decades 10**-6 .. 10**0; decade e holds 2**e means of neighbouring points of an even split of 0.1 .. 1, of
    both signs; with 0 and 1.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    levels = sorted([-x for x in positive] + positive + [0.0, 1.0])
    return torch.tensor(levels, dtype=torch.float32, device=device)
