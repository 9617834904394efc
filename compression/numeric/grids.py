"""Number formats: which values a stored code can stand for. NF4 is in `normal_float`, FP8 and FP4 in `floats`.

Every grid reads W = s * (T[q] - z): a table T of 2**bits levels, and per group of `group_size` inputs of a row a
scale s and, for asymmetric grids, an integer zero point z. A grid is a value; its functions are pure:

    params = grid.fit(W)             what is stored beside the codes, as named tensors, already rounded
    codes  = grid.encode(W, params)  uint8 (rows, cols), the nearest level
    W      = grid.decode(codes, params)
    scales, zeros = grid.expand(params, rows, cols)     fp32 (rows, groups), as the formula has them
    grid, params  = grid.take(params, places, size)     groups of `size` inputs with scales and zeros of this weight's

Shapes: W (rows, cols) floating point; groups = cols / group_size; group_size -1 is one group to a row; places (rows,
groups) of the weight that is made, int64: group j of row i of the weight taken from is number i * groups + j.
Sources: affine grids as in GPTQ, arXiv 2210.17323; NF4 and double quantization, QLoRA, arXiv 2305.14314, section 3 and
appendix E; the 8-bit type of the double quantization, arXiv 2110.02861 (dynamic tree quantization).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from compression.errors import LayerError, RecipeError
from compression.numeric import packing
from compression.numeric.checks import check_one_of, check_padding, check_size
from compression.numeric.floats import FloatGrid
from compression.numeric.grouping import Kind, Params, _grouped, _groups, _round_up, groups_of
from compression.numeric.normal_float import NF4Grid


@dataclass(frozen=True, kw_only=True)
class AffineGrid:
    """Evenly spaced levels: W = s * (q - z), q in 0 .. 2**bits - 1.

    Symmetric: z is the middle 2**(bits-1) and s = 2 max|W| / (2**bits - 1), as GPTQ has it: no weight moves by more
    than s/2. Asymmetric: the range min(W, 0) .. max(W, 0) is split evenly and zero is itself a level.
    Stored: scales in the dtype of the weight, rounded up so that nothing is clipped; zero points in `bits` bits, or,
    with `float_zeros`, as real numbers in the dtype of the scales.
    """

    kind: ClassVar[str] = "affine"
    bits: int
    group_size: int
    symmetric: bool
    float_zeros: bool = False

    def __post_init__(self) -> None:
        check_size("bits", self.bits, most=8)
        check_one_of("symmetric", self.symmetric, (False, True))
        check_one_of("float_zeros", self.float_zeros, (False, True))
        if self.symmetric and self.float_zeros:
            raise RecipeError("AffineGrid(symmetric=True, float_zeros=True): a symmetric grid has no zero points to "
                              "store; leave one of the two out")  # fmt: skip

    @property
    def words(self) -> str:
        zeros = "symmetric" if self.symmetric else "real zero points" if self.float_zeros else "asymmetric"
        return f"{self.bits} bits {_groups(self.group_size)}, {zeros}"

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.arange(2**self.bits, dtype=torch.float32, device=device)

    def fit(self, weight: Tensor, dtype: torch.dtype | None = None) -> Params:
        """Scales are stored in `dtype`, by default that of the weight."""
        w = _grouped(weight, self.group_size)
        steps = 2**self.bits - 1
        dtype = dtype or (weight.dtype if weight.dtype.is_floating_point else torch.float32)
        if self.symmetric:
            scales = 2 * w.abs().amax(-1).double() / steps
        else:
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            scales = (high.double() - low.double()) / steps
        scales = _round_up(scales, dtype)
        if not torch.isfinite(scales).all():
            raise LayerError(f"the range of a group exceeds {dtype}: scale {float(scales.max())} is not finite")
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        zeros = scales if self.symmetric else (-low / scales.float()).round().clamp_(0, steps)
        return self.store(scales, zeros, dtype)

    def store(self, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Params:
        """The inverse of `expand`: scales and zero points (rows, groups) as they are stored; symmetric grids have no
        zero points to store."""
        params = {"scales": scales.to(dtype)}
        if self.float_zeros:
            return params | {"zero_points": zeros.to(dtype)}
        return params if self.symmetric else params | {"zero_points": packing.pack(zeros.to(torch.uint8), self.bits)}

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        w = _grouped(weight, self.group_size)
        scales, zeros = self.expand(params, *weight.shape)
        q = (w / scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, 2**self.bits - 1)
        return q.to(torch.uint8).view(weight.shape)

    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        scales = params["scales"].float()
        if self.symmetric:
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        if self.float_zeros:
            return scales, params["zero_points"].float()
        return scales, packing.unpack(params["zero_points"], self.bits, scales.shape[1]).float()

    def take(self, params: Params, places: Tensor, size: int) -> "tuple[AffineGrid, Params]":
        taken = {"scales": params["scales"].flatten()[places]}
        if self.float_zeros:
            taken["zero_points"] = params["zero_points"].flatten()[places]
        elif not self.symmetric:
            zeros = packing.unpack(params["zero_points"], self.bits, params["scales"].shape[1])
            taken["zero_points"] = packing.pack(zeros.flatten()[places], self.bits)
        return replace(self, group_size=size), taken

    def buffers(self, rows: int, cols: int, dtype: Kind) -> dict[str, tuple[tuple[int, ...], Kind]]:
        """Shapes and dtypes of the stored parameters of a (rows, cols) weight; `dtype` is that of those in its own."""
        groups = groups_of(cols, self.group_size)
        shapes = {"scales": ((rows, groups), dtype)}
        if self.float_zeros:
            return shapes | {"zero_points": ((rows, groups), dtype)}
        if not self.symmetric:
            shapes["zero_points"] = ((rows, packing.packed_width(groups, self.bits)), torch.uint8)
        return shapes

    def check(self, packed: Tensor, params: Params, cols: int) -> None:
        if not (self.symmetric or self.float_zeros):
            check_padding("zero_points", params["zero_points"], params["scales"].shape[1], self.bits)


@dataclass(frozen=True, kw_only=True)
class Int8RowGrid:
    """Signed 8-bit integers with one fp32 absmax to a row: W = absmax / 127 * (q - 128), q in 1 .. 255.

    The weight side of LLM.int8(), arXiv 2208.07339, section 2 ("vector-wise" quantization).
    """

    kind: ClassVar[str] = "int8_row"
    bits: int = 8
    group_size: int = -1

    def __post_init__(self) -> None:
        check_one_of("bits", self.bits, (8,))
        check_one_of("group_size", self.group_size, (-1,))

    @property
    def words(self) -> str:
        return f"{self.bits} bits {_groups(self.group_size)}, symmetric"

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.arange(256, dtype=torch.float32, device=device)

    def fit(self, weight: Tensor) -> Params:
        return {"absmax": weight.detach().float().abs().amax(-1)}

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        """As bitsandbytes rounds: by the inverse of the scale, unless that overflows."""
        w, absmax = weight.detach().float(), params["absmax"][:, None]
        safe = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
        inverse = 127 / safe
        q = torch.where(torch.isfinite(inverse), w * inverse, w / safe * 127)
        return (q.round_() + 128).clamp_(1, 255).to(torch.uint8)

    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        scales = (params["absmax"] / 127)[:, None]
        return scales, torch.full_like(scales, 128)

    def take(self, params: Params, places: Tensor, size: int) -> "tuple[Int8RowGrid, Params]":
        return self, {"absmax": params["absmax"][places[:, 0]]}

    def buffers(self, rows: int, cols: int, dtype: Kind) -> dict[str, tuple[tuple[int, ...], Kind]]:
        return {"absmax": ((rows,), torch.float32)}

    def check(self, packed: Tensor, params: Params, cols: int) -> None:
        if not packed.is_meta and (packed == 0).any():
            raise LayerError("codes must be from 1 to 255: 0 stands for no level")


@dataclass(frozen=True, kw_only=True)
class SignedGrid:
    """Signed whole numbers around zero, one fp32 scale to a row: W = s * (q - m), q in 1 .. 2**bits - 1.

    m = 2**(bits - 1) and s = max|W| / (m - 1): the largest weight is itself a level, and zero is one. The weight side
    of products of whole numbers (W8A8), as in SmoothQuant, arXiv 2211.10438, eq. 1.
    """

    kind: ClassVar[str] = "signed"
    bits: int = 8
    group_size: int = -1

    def __post_init__(self) -> None:
        check_size("bits", self.bits, least=2, most=8)
        check_one_of("group_size", self.group_size, (-1,))

    @property
    def words(self) -> str:
        return f"{self.bits} bits {_groups(self.group_size)}, symmetric"

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.arange(2**self.bits, dtype=torch.float32, device=device)

    def fit(self, weight: Tensor) -> Params:
        scales = weight.detach().float().abs().amax(-1) / (self.middle - 1)
        return {"scales": torch.where(scales == 0, torch.ones_like(scales), scales)}

    def fit_clipped(self, weight: Tensor, candidates: int = 40, shrink: float = 0.8) -> Params:
        """As `fit`, with each scale the one of least squared error among so many, evenly down to 1 - shrink of it: what
        is above the largest level is cut off. As QuaRot, arXiv 2404.00456, section 5, has it for weights."""
        w, full, most = weight.detach().float(), self.fit(weight)["scales"], self.middle - 1
        best, least = full.clone(), torch.full_like(full, torch.inf)
        for candidate in range(candidates):
            scales = full * (1 - shrink * candidate / candidates)
            near = (w / scales[:, None]).round_().clamp_(-most, most).mul_(scales[:, None])
            error = near.sub_(w).square_().sum(-1)
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
        return {"scales": best}

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        q = (weight.detach().float() / params["scales"][:, None]).round_() + self.middle
        return q.clamp_(1, 2**self.bits - 1).to(torch.uint8)

    def expand(self, params: Params, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        scales = params["scales"][:, None]
        return scales, torch.full_like(scales, self.middle)

    def take(self, params: Params, places: Tensor, size: int) -> "tuple[SignedGrid, Params]":
        return self, {"scales": params["scales"][places[:, 0]]}

    def buffers(self, rows: int, cols: int, dtype: Kind) -> dict[str, tuple[tuple[int, ...], Kind]]:
        return {"scales": ((rows,), torch.float32)}

    def check(self, packed: Tensor, params: Params, cols: int) -> None:
        if not packed.is_meta and (packing.unpack(packed, self.bits, cols) == 0).any():
            raise LayerError(f"codes must be from 1 to {2**self.bits - 1}: 0 stands for no level")


GRIDS: dict[str, type] = {grid.kind: grid for grid in (AffineGrid, NF4Grid, FloatGrid, Int8RowGrid, SignedGrid)}
