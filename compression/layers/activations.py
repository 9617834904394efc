"""Quantizers of what flows: of a layer's inputs to whole or floating-point numbers, of keys and values to a few levels
per channel.

They are computed in floating point on the plain way (`simulated`); kernels that accept them compute with the numbers
themselves. Gradients pass through rounding as if there were none.
"""

import dataclasses
import math
from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.files.strict_json import finite
from compression.layers import positions
from compression.layers.kernels.integer_products import token_steps
from compression.layers.parts import InputPart, OutputPart, part, straight_through
from compression.numeric import floats, grouping
from compression.numeric.checks import check_finite, check_shape, check_size
from compression.numeric.floats import FloatGrid

SMALLEST = 1e-5  # that a largest activation counts as
LLOYD_STEPS = 30
MOST_LEVEL_BITS = 8


@part("token_range", place="input")
class TokenRange(InputPart):
    """Whole numbers of `bits` bits, symmetric around zero: x becomes s round(x / s), at most 2**(bits - 1) - 1 steps.

    Args:
        bits: 2 to 16.
        step: s, one number found on calibration text ("static"); None: of each token its largest absolute value over
            the largest number, found at run time ("token").
        clip: share of a token's largest absolute value that its largest number stands for; what is above is cut off.

    Source: SmoothQuant, arXiv 2211.10438, eq. 1; per token as in ZeroQuant, arXiv 2206.01861; `clip` as in QuaRot,
    arXiv 2404.00456, section 5.
    """

    simulated = True

    def __init__(self, bits: int = 8, step: Tensor | float | None = None, clip: float = 1.0):
        super().__init__()
        check_size("bits", bits, least=2, most=16)
        if not (type(clip) in (int, float) and 0 < clip <= 1) or (step is not None and clip != 1):
            raise LayerError(f"clip={clip!r:.80} must be above 0 and at most 1, and 1 beside a static step")
        self.bits, self.clip = bits, float(clip)
        kept = None if step is None else torch.as_tensor(step, dtype=torch.float32).detach().reshape(())
        self.register_buffer("step", kept)
        if kept is not None and not kept.is_meta:
            self.check()

    @classmethod
    def empty(cls, rows: int, cols: int, *, bits: Any, static: Any, clip: Any = 1.0) -> Self:
        if type(static) is not bool:
            raise LayerError(f"static={static!r:.80} must be true or false")
        return cls(bits, torch.empty((), device="meta") if static else None, clip)

    @property
    def settings(self) -> dict[str, Any]:
        clip = {} if self.clip == 1 else {"clip": self.clip}
        return {"bits": self.bits, "static": self.step is not None, **clip}

    @property
    def words(self) -> str:
        clip = "" if self.clip == 1 else f", cut off at {self.clip:g} of the largest"
        return f"activations in {self.bits} bits, one step per {'token' if self.step is None else 'layer'}{clip}"

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def check(self) -> None:
        if self.step is not None:
            check_finite("step", check_shape(self, "step", (), {torch.float32}))
            if not self.step.is_meta and not self.step > 0:
                raise LayerError(f"step={float(self.step)} must be above 0")

    def forward(self, x: Tensor) -> Tensor:
        step = token_steps(x.detach(), self.highest) if self.step is None else self.step
        if self.clip != 1:
            step = step * self.clip
        rounded = (x.detach().float() / step).round_().clamp_(-self.highest, self.highest)
        return straight_through(x, rounded.mul_(step).to(x.dtype))


@part("float_range", place="input")
class FloatRange(InputPart):
    """Values of a small floating-point type, under scales that are found at run time or on calibration text.

    Args:
        grid: element, group and kind of scale (`numeric.floats`): each token has the scales that a row of a weight
            would have. With scales in E4M3 the divisor above them is found on calibration text, so that a token's
            values depend on no other token.
        whole: of "static", fp32 (): with scales in E4M3 that divisor, else the one scale of all tokens; None where
            everything is found at run time.

    Raises:
        LayerError: groups do not tile the inputs; or there is no static form of the scales.

    Sources: FP8, arXiv 2209.05433; OCP Microscaling Formats 1.0; NVFP4 as in compressed-tensors 0.20 (activations are
    "local": scales at run time under a static divisor).
    """

    simulated = True

    def __init__(self, grid: FloatGrid, whole: Tensor | None = None):
        super().__init__()
        self.grid = grid
        if grid.scale == "e4m3" and whole is None:
            raise LayerError("scales of activations in E4M3 need a divisor that calibration text gives")
        if grid.scale == "e8m0" and whole is not None:
            raise LayerError("scales that are powers of two are found at run time, and cannot be static")
        if grid.scale == "float" and grid.group_size != -1 and whole is not None:
            raise LayerError("a static scale is that of all inputs: group_size must be -1")
        kept = None if whole is None else torch.as_tensor(whole, dtype=torch.float32).detach().reshape(())
        self.register_buffer("whole", kept)
        if kept is not None and not kept.is_meta:
            self.check()

    @classmethod
    def fitted(cls, grid: FloatGrid, largest: Tensor) -> Self:
        """Static, for activations whose largest absolute values are `largest` (cols,)."""
        top = largest.float().amax().clamp(min=SMALLEST)
        return cls(grid, grid.divisor_for(top) if grid.scale == "e4m3" else top / floats.LARGEST[grid.element])

    @classmethod
    def empty(cls, rows: int, cols: int, *, element: Any, group_size: Any, scale: Any, static: Any) -> Self:
        if type(static) is not bool:
            raise LayerError(f"static={static!r:.80} must be true or false")
        grid = FloatGrid(element=element, group_size=group_size, scale=scale)
        grouping.check_group(cols, grid.group_size)
        return cls(grid, torch.empty((), device="meta") if static else None)

    @property
    def settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.grid), "static": self.whole is not None}

    @property
    def words(self) -> str:
        static = self.whole is not None and self.grid.scale == "float"
        return f"activations in {self.grid.words.replace('channel', 'layer' if static else 'token')}"

    def check(self) -> None:
        if self.whole is not None:
            check_finite("whole", check_shape(self, "whole", (), {torch.float32}))
            if not self.whole.is_meta and not self.whole > 0:
                raise LayerError(f"whole={float(self.whole)} must be above 0")

    def columns(self, kept: Tensor) -> "FloatRange":
        """Raises LayerError: some of a group goes, which would change the scale of the rest."""
        size, places = self.grid.group_size, kept.cpu()
        whole = size == -1 or (len(places) % size == 0 and all(
            int(group[0]) % size == 0 and int(group[-1]) - int(group[0]) == size - 1 for group in places.split(size)
        ))  # fmt: skip
        if not whole:
            raise LayerError(f"its inputs are rounded in groups of {size}, which go whole; remove before quantizing")
        return self

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if self.whole is not None and self.grid.scale == "float":
            params = {"scales": self.whole.expand(len(flat), 1)}
        else:
            params = self.grid.fit(flat, self.whole)
        codes = self.grid.encode(flat, params)
        return straight_through(x, grouping.decode(self.grid, codes, params, x.dtype).view(x.shape))


@part("outlier_columns", place="input")
class OutlierColumns(InputPart):
    """LLM.int8(), arXiv 2208.07339, eq. 8: columns of x that hold a value of at least `threshold` stay as they are.

    The rest of x is rounded to 8 bits with one absmax per token: that of the values below the threshold, those in
    outlier columns included, as bitsandbytes has it.
    """

    simulated = True

    def __init__(self, threshold: float):
        super().__init__()
        try:
            self.threshold = finite(threshold)  # torch compares with no int beyond 64 bits
        except ValueError:
            self.threshold = math.nan
        if not self.threshold > 0:
            raise LayerError(f"threshold={threshold!r:.80} must be above 0 and finite")

    @property
    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        large = flat.abs() >= self.threshold
        outlier = large.any(0)
        absmax = flat.masked_fill(large, 0).abs().amax(-1, keepdim=True).float()
        absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
        rest = flat.masked_fill(outlier, 0)
        rounded = ((rest * (127 / absmax)).round() * (absmax / 127)).to(x.dtype)
        if rounded.requires_grad:
            rounded = rest + (rounded - rest).detach()
        return torch.where(outlier, flat, rounded).view(x.shape)


@part("levels", place="output")
class Levels(OutputPart):
    """Keys or values on a few levels per channel; outliers, and the first tokens of a sequence, stay as they are.

    Attributes:
        levels: fp32 (rows, 2**bits), ascending.
        low, high: fp32 (rows,): what lies outside of them is an outlier.
        keep_first: tokens at the start of every sequence that stay.

    Source: KVQuant, arXiv 2401.18079. Departures: levels are those of Lloyd's algorithm (k-means in one dimension) on
    the calibration outputs of each channel, not weighted by sensitivity; outliers are found by a threshold for keys and
    values alike, while the paper finds those of values token by token.
    """

    simulated = True

    def __init__(self, levels: Tensor, low: Tensor, high: Tensor, keep_first: int = 0):
        super().__init__()
        check_size("keep_first", keep_first, least=0)
        self.bits, self.keep_first = (levels.shape[1] - 1).bit_length(), keep_first
        for name, tensor in (("levels", levels), ("low", low), ("high", high)):
            self.register_buffer(name, tensor.detach().float())
        self.check()

    @classmethod
    def empty(cls, rows: int, cols: int, *, bits: Any, keep_first: Any) -> Self:
        check_size("bits", bits, most=MOST_LEVEL_BITS)
        edge = torch.empty(rows, device="meta")
        return cls(torch.empty(rows, 2**bits, device="meta"), edge, edge, keep_first)

    @classmethod
    def fitted(cls, outputs: Tensor, bits: int, outliers: float = 0.0, keep_first: int = 0) -> Self:
        """Levels for outputs (..., rows) that a layer was seen to have.

        Args:
            outliers: share of the values of a channel that stay as they are, half of them at either end.

        Raises:
            LayerError: an output is not finite.
        """
        check_size("bits", bits, most=MOST_LEVEL_BITS)
        if not 0 <= outliers < 1:
            raise LayerError(f"outliers={outliers!r} must be from 0 to below 1")
        ordered = outputs.detach().reshape(-1, outputs.shape[-1]).t().float().sort(-1).values.contiguous()
        if not torch.isfinite(ordered).all():
            raise LayerError("the outputs of the calibration text are not finite; check the base")
        count = ordered.shape[1]
        away = min(int(outliers * count / 2), (count - 1) // 2)
        inner = ordered[:, away : count - away].contiguous()
        low, high = _edge(ordered, away), -_edge(-ordered.flip(-1), away)
        return cls(_lloyd(inner, 2**bits), low, high, keep_first)

    @property
    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "keep_first": self.keep_first}

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.keep_first > 0

    @property
    def words(self) -> str:
        return f"outputs on {2**self.bits} levels per channel"

    def check(self) -> None:
        rows = len(self.levels)
        for name, shape in (("levels", (rows, 2**self.bits)), ("low", (rows,)), ("high", (rows,))):
            check_finite(name, check_shape(self, name, shape, {torch.float32}))
        if not self.levels.is_meta and (self.levels[:, 1:] < self.levels[:, :-1]).any():
            raise LayerError("the levels of a channel must ascend")

    def rows(self, kept: Tensor) -> "Levels":
        return Levels(self.levels[kept], self.low[kept], self.high[kept], self.keep_first)

    def forward(self, y: Tensor) -> Tensor:
        levels = self.levels.to(y.dtype)
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        places = torch.zeros(y.shape, dtype=torch.int64, device=y.device)
        for edge in between.unbind(1):
            places += y > edge
        first = torch.arange(len(levels), device=y.device) * levels.shape[1]
        near = levels.flatten()[places + first]
        kept = (y < self.low.to(y.dtype)) | (y > self.high.to(y.dtype))
        if self.keep_first:
            kept = kept | self._first(y)
        return straight_through(y, torch.where(kept, y, near))

    def _first(self, y: Tensor) -> Tensor:
        """Which tokens of y (..., tokens, rows) are among the first of their sequence, (..., tokens, 1)."""
        return (positions.current(y) < self.keep_first)[..., None]


def _edge(ordered: Tensor, away: int) -> Tensor:
    """Below which `away` of the ascending values of each row lie: between two of them, so that none lies on it."""
    if away == 0:
        return ordered[:, 0]
    return (ordered[:, away - 1] + ordered[:, away]) / 2


def _lloyd(ordered: Tensor, count: int) -> Tensor:
    """`count` ascending levels (rows, count) that are means of the values nearest to them, of ascending fp32 values
    (rows, n); they start at the middles of as many equal shares of the values."""
    n = ordered.shape[1]
    sums = ordered.double().cpu().cumsum(-1).to(ordered.device)  # CUDA adds in another order every time
    sums = torch.nn.functional.pad(sums, (1, 0))
    places = ((torch.arange(count, device=ordered.device) * 2 + 1) * n // (2 * count)).clamp(max=n - 1)
    levels = ordered[:, places].double()
    for _ in range(LLOYD_STEPS):
        between = ((levels[:, 1:] + levels[:, :-1]) / 2).float().contiguous()
        ends = torch.searchsorted(ordered, between, right=True)
        ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], n)], -1)
        members = ends[:, 1:] - ends[:, :-1]
        means = (sums.gather(1, ends[:, 1:]) - sums.gather(1, ends[:, :-1])) / members.clamp(min=1)
        levels = torch.where(members > 0, means, levels).sort(-1).values
    return levels.float()
