"""LoraLinear: a linear layer that stays as it is, and the product of two thin matrices that is added to it.

Papers: LoRA, arXiv 2106.09685, eq. 3; on packed codes QLoRA, arXiv 2305.14314, eq. 5; held at the zeros of a pruned
weight SparsePEFT, arXiv 2410.03750 (the product is masked while it is trained, so that merging it is exact).
Shapes: W (rows, cols); A (r, cols); B (rows, r); s = alpha / r.
Departure from peft: a module of the project's own. Those of peft know none of its layers but through a private method,
importing it takes seven seconds, which opening an artefact would, and its names would be in what is stored. A test
compares with peft: outputs, gradients, merged weights.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.checks import (
    FLOATS,
    check_finite,
    check_incoming,
    check_loaded,
    check_one_of,
    check_shape,
    check_size,
)
from compression.layers.packed import PackedLinear
from compression.layers.sparse import SparseLinear

DENSE = "dense"


class LoraLinear(nn.Module):
    """y = base(x) + s B A dropout(x); with a mask M, s (M * B A) in the place of s B A.

    Args:
        base: a linear layer, dense or stored in any way; nothing in it is trained.
        rank: r.
        scale: s.
        dropout: probability with which an input of A is zero in training.
        mask: bool (rows, cols), where the product may be other than zero; not stored.
        dtype: of A and B.

    Raises:
        LayerError: the base has an adapter already, or a value is not allowed.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if isinstance(base, LoraLinear):
            raise LayerError("this layer already has an adapter; use recover once, or pass merge=all")
        check_size("rank", rank)
        check_one_of("dtype", dtype, FLOATS)
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise LayerError(f"scale={scale!r:.80} must be a finite number")
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
        self.base, self.rank, self.scale, self.dropout = base, rank, scale, dropout
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.register_buffer("mask", mask, persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(cols), as peft draws it, and B zero: the layer computes what its base does."""
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_a.shape).uniform_(-bound, bound, generator=generator)
        self.lora_a.data.copy_(drawn)
        self.lora_b.data.zero_()

    def check(self) -> None:
        """Raise LayerError unless A and B are what the layer is described as; the base has a check of its own."""
        check_finite("lora_a", check_shape(self, "lora_a", (self.rank, self.in_features), FLOATS))
        check_finite("lora_b", check_shape(self, "lora_b", (self.out_features, self.rank), FLOATS))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_incoming(self, state_dict, prefix, ("lora_a", "lora_b"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_loaded(self, state_dict, prefix)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        thin = nn.functional.dropout(x, self.dropout, self.training).to(self.lora_a.dtype)
        if self.mask is None:
            added = nn.functional.linear(nn.functional.linear(thin, self.lora_a), self.lora_b) * self.scale
        else:
            added = nn.functional.linear(thin, self.product())
        return y + added.to(y.dtype)

    def product(self) -> Tensor:
        """s B A (rows, cols) in the dtype of the adapter, zero where the mask is not set."""
        product = self.lora_b @ self.lora_a * self.scale
        return product if self.mask is None else product * self.mask

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that the base stands for."""
        return self.base.weight.dtype if isinstance(self.base, nn.Linear) else self.base.dtype  # type: ignore[return-value]

    def to_linear(self) -> nn.Linear:
        """A dense layer whose weight is the sum, taken in fp32 and rounded once to the dtype of the layer."""
        base = self.base if isinstance(self.base, nn.Linear) else self.base.to_linear()  # type: ignore[operator]
        linear = nn.Linear(self.in_features, self.out_features, bias=base.bias is not None, device="meta")
        weight = (base.weight.detach().float() + self.product().detach().float()).to(base.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        return linear

    def with_base(self, base: nn.Module, a: Tensor, b: Tensor) -> "LoraLinear":
        """The adapter of other A and B on another base, scaled as this one."""
        layer = LoraLinear(base, self.rank, self.scale, dropout=self.dropout, dtype=a.dtype, device="meta")
        layer.lora_a, layer.lora_b = (nn.Parameter(t.detach(), requires_grad=False) for t in (a, b))
        return layer

    def kernel_name(self, device: torch.device | str | None = None) -> str:
        """The kernel of the base (default: where it is)."""
        return self.base.kernel_name(device) if isinstance(self.base, PackedLinear | SparseLinear) else DENSE

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale!r}, dropout={self.dropout!r}"
