"""LowRank: the product of two thin matrices, alone or added to what another part stands for.

Papers: LoRA, arXiv 2106.09685, eq. 3; on packed codes QLoRA, arXiv 2305.14314, eq. 5; held at the zeros of a pruned
weight SparsePEFT, arXiv 2410.03750 (the product is masked while it is trained, so that merging it is exact).
Shapes: W (rows, cols); A (r, cols); B (rows, r); s = alpha / r.
Departure from peft: parts of the project's own. Those of peft know none of its layers but through a private method,
importing it takes seven seconds, which opening an artefact would, and its names would be in what is stored. A test
compares with peft: outputs, gradients, merged weights.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.parts import WeightPart, dtype_named, name_of, part
from compression.numeric.checks import FLOATS, check_finite, check_one_of, check_shape, check_size


@part("low_rank", place="weight")
class LowRank(WeightPart):
    """s B A; with a mask M, s (M * B A). As an adapter, s B A dropout(x) is added.

    Args:
        a: (r, cols).
        b: (rows, r).
        scale: s.
        dropout: probability with which an input of A is zero in training; not stored.
        mask: bool (rows, cols), where the product may be other than zero; not stored.

    Raises:
        LayerError: a value is not allowed.
    """

    plain = "dense"

    def __init__(self, a: Tensor, b: Tensor, scale: float = 1.0, *, dropout: float = 0.0, mask: Tensor | None = None):
        super().__init__()
        check_size("rank", len(a))
        check_one_of("dtype", a.dtype, FLOATS)
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise LayerError(f"scale={scale!r:.80} must be a finite number")
        self.scale, self.dropout = scale, dropout
        self.a, self.b = (t if isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False) for t in (a, b))
        self.register_buffer("mask", mask, persistent=False)

    @classmethod
    def drawn(
        cls,
        rows: int,
        cols: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
        *,
        dropout: float = 0.0,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A uniform within 1 / sqrt(cols), as peft draws it, and B zero: nothing is added yet. In fp32."""
        check_size("rank", rank)
        bound = 1 / math.sqrt(cols)
        a = torch.empty(rank, cols).uniform_(-bound, bound, generator=generator).to(device)
        return cls(a, torch.zeros(rows, rank, device=device), scale, dropout=dropout, mask=mask)

    @classmethod
    def empty(cls, rows: int, cols: int, *, rank: Any, scale: Any, dtype: Any) -> Self:
        check_size("rank", rank)
        a, b = (torch.empty(shape, dtype=dtype_named(dtype), device="meta") for shape in ((rank, cols), (rows, rank)))
        return cls(a, b, scale)

    @property
    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale, "dtype": name_of(self.dtype)}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale!r}, dropout={self.dropout!r}"

    @property
    def words(self) -> str:
        return f"rank {self.rank}"

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b), self.a.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def follows_dtype(self) -> frozenset[str]:
        return frozenset({"a", "b"})

    @property
    def weights(self) -> int:
        return self.a.numel() + self.b.numel()

    def check(self) -> None:
        rows, cols = self.shape
        check_finite("a", check_shape(self, "a", (self.rank, cols), FLOATS))
        check_finite("b", check_shape(self, "b", (rows, self.rank), FLOATS))

    def product(self) -> Tensor:
        """s B A (rows, cols) in the dtype of A and B, zero where the mask is not set; with its gradient."""
        product = self.b @ self.a * self.scale
        return product if self.mask is None else product * self.mask

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.product() if dtype is None else self.product().to(dtype)

    def lookup(self, places: Tensor) -> Tensor:
        return self.product()[places] if self.mask is not None else self.b[places] @ self.a * self.scale

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        thin = nn.functional.dropout(x, self.dropout, self.training).to(self.a.dtype)
        if self.mask is None:
            y = nn.functional.linear(nn.functional.linear(thin, self.a), self.b) * self.scale
        else:
            y = nn.functional.linear(thin, self.product())
        return y if bias is None else y.to(x.dtype) + bias.to(x.dtype)

    def product_dtype(self, x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
        return wanted or x.dtype

    def rows(self, kept: Tensor) -> "LowRank":
        return LowRank(self.a.detach(), self.b.detach()[kept], self.scale, dropout=self.dropout)

    def columns(self, kept: Tensor) -> "LowRank":
        return LowRank(self.a.detach()[:, kept], self.b.detach(), self.scale, dropout=self.dropout)
