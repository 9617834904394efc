"""HQQ: zero points by half-quadratic optimisation, without data.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023 (a web
article). What is minimised is sum |W - Q|^p over the zero points, p = 0.7; the steps are in
`compression.numeric.half_quadratic.half_quadratic`. Groups run along the inputs (their axis 1).
Departures: the range of a group always holds zero; every group keeps the best of its zero points, among them that of
`rtn`, where theirs stop all groups when the mean error stops to fall; zero points are compared as they are stored, and
they and the scales are stored in the dtype of the weight.
With `backend="hqq"` the hqq library (0.2.8) finds codes, scales and zero points; what is stored, and how it is
multiplied, stay the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import layers, numeric
from compression.errors import BackendError, LayerError, RecipeError, install_command
from compression.methods.base import Quantizer, method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compression.layers.linear import Linear
    from compression.methods.base import Context
    from compression.numeric.grids import AffineGrid


@method("hqq", keeps_zeros=False)  # zero points are real numbers: zero is not among the levels
@dataclass(frozen=True, kw_only=True)
class HQQ(Quantizer):
    """Real-valued zero points that make the errors of most weights small, found without data (HQQ)."""

    bits: Literal[2, 3, 4, 8] = 4  # of a weight
    group_size: int = 64  # inputs that share a scale; -1: one scale per output channel
    norm: float = 0.7  # p of |error|^p; below 1 few large errors weigh less than many small ones
    beta: float = 10.0  # inverse of the first threshold
    kappa: float = 1.01  # growth of beta
    iterations: int = 20  # at most
    backend: Literal["auto", "native", "torch", "hqq"] = "auto"  # a kernel, or hqq: the library rounds

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 8:
            raise RecipeError(f"hqq(group_size={self.group_size}): allowed are -1 (per channel) and 8 or more")
        for name, low, high in (("norm", 0, 1), ("beta", 0, 1e6), ("kappa", 1, 10), ("iterations", 0, 1000)):
            value = getattr(self, name)
            if not low <= value <= high or (name in ("norm", "beta") and value == 0):
                above = "above 0" if name in ("norm", "beta") else f"at least {low}"
                raise RecipeError(f"hqq({name}={value}): must be {above} and at most {high:g}")
            if self.backend == "hqq" and value != type(self).__dict__[name]:
                raise RecipeError(f"hqq({name}={value}): the hqq library takes {type(self).__dict__[name]:g} alone; "
                                  "leave backend=hqq or the parameter out")  # fmt: skip

    def grid(self) -> "AffineGrid":
        return numeric.grids.AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=False, float_zeros=True)

    def check_layer(self, in_features: int, out_features: int) -> None:
        numeric.grouping.check_group(in_features, self.group_size)
        if self.backend == "hqq":
            _library()

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "Linear":
        import torch

        weight, grid = linear.weight.detach().float(), self.grid()
        if not torch.isfinite(weight).all():
            raise LayerError(
                "the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too narrow a dtype"
            )
        if self.backend == "hqq":
            codes, params, kernels = *self._by_library(weight, linear.weight.dtype), "auto"
        else:
            rounded = numeric.half_quadratic.half_quadratic(
                weight, grid, norm=self.norm, beta=self.beta, kappa=self.kappa, iterations=self.iterations,
                dtype=linear.weight.dtype,
            )  # fmt: skip
            codes, params, kernels = rounded.codes, rounded.params, self.backend
        part = layers.codes.Codes.from_codes(codes, params, grid, dtype=linear.weight.dtype)
        return layers.linear.Linear(part, linear.bias, backend=kernels)

    def _by_library(
        self, weight: "torch.Tensor", dtype: "torch.dtype"
    ) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """Codes uint8 (rows, cols) and stored parameters as the hqq library finds them."""
        import torch

        size = None if self.group_size == -1 else self.group_size
        codes, meta = _library().quantize(
            weight, nbits=self.bits, group_size=size, axis=1, bitpack=False, device=str(weight.device)
        )
        scales, zeros = (meta[name].view(len(weight), -1) for name in ("scale", "zero"))
        return codes.to(torch.uint8).view(weight.shape), self.grid().store(scales, zeros, dtype)


def _library() -> Any:
    """The quantizer of the hqq library.

    Raises:
        BackendError: it is not installed, or does not import.
    """
    try:
        from hqq.core.quantize import Quantizer as Library
    except ImportError as error:
        raise BackendError(
            f"hqq(backend=hqq): the hqq library cannot be imported ({error}); "
            f"{install_command('hqq')}, or leave backend out"
        ) from error
    return Library
