"""Number formats of keys and values in a cache: tensors (batch, heads, tokens, head size) in, packed tensors out.

    grid         groups                                                        stored for each group
    IntGrid      by="token": `group_size` channels of one token and head       scale and minimum
                 by="channel": `group_size` tokens of one channel              scale and minimum
    Float8Grid   by="head": one token and head; by="token": all heads of it    scale; none with by="unit"

All stored tensors have groups of tokens in dimension 2, so that later tokens are appended there. An integer stands for
x = minimum + scale * code; the minimum is a real number, as KIVI has it (arXiv:2402.02750). Scales and minima are in
the dtype of the cache where that has 16 bits, else in fp16. Minima are rounded down and scales up: nothing is clipped.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.files.strict_json import exact_fields
from compression.numeric import packing
from compression.numeric.checks import check_one_of, check_size
from compression.numeric.floats import LARGEST, fp8_bytes, fp8_values
from compression.numeric.grouping import _round_up

Stored = dict[str, Tensor]
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class IntGrid:
    """2**bits evenly spaced values between the smallest and the largest of a group.

    Attributes:
        bits: 1 to 8.
        by: "token" or "channel".
        group_size: channels that share a scale, -1 for all of a head; by channel, tokens.
    """

    kind: ClassVar[str] = "int"
    bits: int
    by: str = "token"
    group_size: int = -1

    def __post_init__(self) -> None:
        check_size("bits", self.bits, most=8)
        check_one_of("by", self.by, ("token", "channel"))
        if self.by == "channel" or self.group_size != -1:
            check_size("group_size", self.group_size)

    @property
    def tokens(self) -> int:
        """How many tokens are stored together."""
        return self.group_size if self.by == "channel" else 1

    @property
    def words(self) -> str:
        if self.by == "channel":
            return f"{self.bits} bits by channel in groups of {self.group_size} tokens"
        return f"{self.bits} bits by token" + (f" in groups of {self.group_size}" if self.group_size != -1 else "")

    def check_head(self, size: int) -> None:
        """Raise LayerError if groups do not tile the channels of a head."""
        if self.by == "token" and self.group_size != -1 and size % self.group_size:
            fitting = [each for each in range(8, size + 1) if size % each == 0]
            raise LayerError(f"group_size={self.group_size} does not divide heads of {size} channels; divisors: "
                             f"{', '.join(map(str, fitting)) or 'none'}; -1 makes one group per head")  # fmt: skip

    def encode(self, x: Tensor) -> Stored:
        """The number of tokens must be a multiple of `tokens`."""
        groups = _groups(x, self)
        dtype, steps = _half(x.dtype), 2**self.bits - 1
        minimum = -_round_up(-groups.amin(-1), dtype)
        scale = _round_up((groups.amax(-1).double() - minimum.double()) / steps, dtype)
        _check_range(scale + minimum.abs(), dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = ((groups - minimum.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, steps)
        codes = codes.to(torch.uint8)
        codes = codes.flatten(-2) if self.by == "token" else codes
        return {"codes": packing.pack(codes, self.bits), "scale": scale, "minimum": minimum}

    def decode(self, stored: Stored, size: int, dtype: torch.dtype) -> Tensor:
        """(batch, heads, tokens, size)."""
        scale, minimum = stored["scale"].float(), stored["minimum"].float()
        codes = packing.unpack(stored["codes"], self.bits, size if self.by == "token" else self.group_size).float()
        if self.by == "token":
            codes = codes.unflatten(-1, (scale.shape[-1], -1))
        x = codes.mul_(scale[..., None]).add_(minimum[..., None])
        return (x.flatten(-2) if self.by == "token" else x.transpose(-1, -2).flatten(2, 3)).to(dtype)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Float8Grid:
    """FP8 (E4M3) under a scale of each token, of each token and head, or under none, where more than 448 is cut off."""

    kind: ClassVar[str] = "fp8"
    by: str = "head"
    bits: ClassVar[int] = 8
    tokens: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_one_of("by", self.by, ("head", "token", "unit"))

    @property
    def words(self) -> str:
        scales = {"head": "by token and head", "token": "by token", "unit": "without scales"}
        return f"FP8 (E4M3) {scales[self.by]}"

    def check_head(self, size: int) -> None:
        """Every size will do."""

    def encode(self, x: Tensor) -> Stored:
        if self.by == "unit":
            return {"codes": fp8_bytes(x)}
        dtype = _half(x.dtype)
        largest = x.abs().amax((-1,) if self.by == "head" else (1, 3), keepdim=True)
        scale = _round_up(largest.double() / LARGEST["e4m3"], dtype)
        _check_range(scale, dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return {"codes": fp8_bytes(x.float() / scale.float()), "scale": scale}

    def decode(self, stored: Stored, size: int, dtype: torch.dtype) -> Tensor:
        """(batch, heads, tokens, size)."""
        values = fp8_values(stored["codes"])
        return (values if self.by == "unit" else values.mul_(stored["scale"].float())).to(dtype)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


Grid = IntGrid | Float8Grid
GRIDS: dict[str, type[IntGrid] | type[Float8Grid]] = {each.kind: each for each in (IntGrid, Float8Grid)}


def from_json(entry: Any) -> Grid:
    """The grid that `to_json` gave this of.

    Raises:
        LayerError: it is none.
    """
    kind = GRIDS.get(str(entry.get("kind"))) if isinstance(entry, dict) else None
    if kind is None:
        raise LayerError(f"{entry!r:.200} must be a grid of a cache, of kind {' or '.join(GRIDS)}")
    try:
        known = exact_fields(entry, {"kind", *(each.name for each in fields(kind))})
    except ValueError as error:
        raise LayerError(f"a grid of a cache cannot be: {error}") from None
    return kind(**{name: value for name, value in known.items() if name != "kind"})


def _groups(x: Tensor, grid: IntGrid) -> Tensor:
    """fp32, groups in the last dimension: (batch, heads, tokens, groups, channels), or tokens last."""
    x = x.float()
    if grid.by == "channel":
        return x.unflatten(2, (-1, grid.group_size)).transpose(-1, -2)
    return x.unflatten(-1, (-1, x.shape[-1] if grid.group_size == -1 else grid.group_size))


def _half(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in HALVES else torch.float16


def _check_range(largest: Tensor, dtype: torch.dtype) -> None:
    if not torch.isfinite(largest).all():
        raise LayerError(f"keys or values are not finite, or beyond the range of {dtype} in which scales are stored")
