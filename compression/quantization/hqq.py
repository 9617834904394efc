"""HQQ: zero points by half-quadratic optimisation, without data.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023 (a web
article). What is minimised is sum |W - Q|^p over the zero points, p = 0.7; the steps are in
`compression._rounding.half_quadratic`. Groups run along the inputs (their axis 1).
Departures: the range of a group always holds zero; every group keeps the best of its zero points, among them that of
`rtn`, where theirs stop all groups when the mean error stops to fall; zero points are compared as they are stored, and
they and the scales are stored in the dtype of the weight.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compression._errors import LayerError, RecipeError
from compression._registry import LayerwiseMethod, method

if TYPE_CHECKING:
    from torch import nn

    from compression._compress import Context
    from compression._grids import AffineGrid
    from compression._linear import PackedLinear


@method("hqq")
@dataclass(frozen=True, kw_only=True)
class HQQ(LayerwiseMethod):
    """Real-valued zero points that make the errors of most weights small, found without data (HQQ)."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 64  # inputs that share a scale; -1: one scale per output channel
    norm: float = 0.7  # p of |error|^p; below 1 few large errors weigh less than many small ones
    beta: float = 10.0  # inverse of the first threshold
    kappa: float = 1.01  # growth of beta
    iterations: int = 20
    backend: Literal["auto", "native", "torch"] = "auto"

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"hqq(group_size={self.group_size}): allowed are -1 (per channel) and 8 or more")
        for name, low, high in (("norm", 0, 1), ("beta", 0, 1e6), ("kappa", 1, 10), ("iterations", 0, 1000)):
            value = getattr(self, name)
            if not low <= value <= high or (name in ("norm", "beta") and value == 0):
                above = "above 0" if name in ("norm", "beta") else f"at least {low}"
                raise RecipeError(f"hqq({name}={value}): must be {above} and at most {high:g}")

    def grid(self) -> "AffineGrid":
        from compression._grids import AffineGrid

        return AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=False, float_zeros=True)

    def check_layer(self, in_features: int, out_features: int) -> None:
        from compression._grids import check_group

        check_group(in_features, self.group_size)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "PackedLinear":
        import torch

        from compression import _rounding
        from compression._linear import PackedLinear

        weight, grid = linear.weight.detach().float(), self.grid()
        if not torch.isfinite(weight).all():
            raise LayerError("the weight holds NaN or infinite values; compress a sound checkpoint")
        rounded = _rounding.half_quadratic(
            weight, grid, norm=self.norm, beta=self.beta, kappa=self.kappa, iterations=self.iterations,
            dtype=linear.weight.dtype,
        )  # fmt: skip
        return PackedLinear.from_codes(
            rounded.codes, rounded.params, linear.bias, grid, dtype=linear.weight.dtype, backend=self.backend
        )
