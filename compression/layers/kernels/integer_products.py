"""Products of whole numbers on both sides (W8A8): activations are rounded at run time, and 32 bits add up.

y = s_x s_w (q_x q_w^T): q_x int8 with a step of each token, or of the layer; q_w int8 with a scale of each row. Sums
are exact, so that a product differs from the plain one by the rounding of floating-point numbers alone.

Source: SmoothQuant, arXiv 2211.10438, section 4; operator: torch's `_int_mm` (oneDNN on CPUs, cuBLASLt on CUDA).
Limits: on processors without VNNI oneDNN adds pairs of products up in 16 bits, which overflow, and for one input torch
2.13 gives anything. The first are found by trying (`exact_here`); both are refused.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from compression.layers.kernels.kernel import Accepts, Kernel, LayerSpec, Product, canonical, unlimited
from compression.layers.kernels.torch_products import missing_op
from compression.numeric.grids import AffineGrid, SignedGrid
from compression.numeric.grouping import Params

CUDA_ROWS = 17  # that cuBLASLt wants of a batch, at least
HIGHEST = 127


def token_steps(x: Tensor, highest: int = HIGHEST) -> Tensor:
    """The largest absolute value of each token of x (..., cols) over `highest`: fp32 (..., 1), 1 where that is 0."""
    largest = x.abs().amax(-1, keepdim=True).float() / highest  # several times as fast as torch.aminmax on CPUs
    return torch.where(largest == 0, 1, largest)


@functools.cache
def exact_here() -> bool:
    """Whether `_int_mm` adds the largest products up exactly on this processor."""
    extremes = torch.tensor([HIGHEST, -HIGHEST], dtype=torch.int8)
    for rows in (1, 40):
        x, weight = extremes.repeat(rows)[:rows, None].expand(rows, 64), extremes.repeat(16)[:, None].expand(32, 64)
        sums = torch._int_mm(x.contiguous(), weight.contiguous().t())
        if not torch.equal(sums, 64 * x[:, :1].int() * weight[:, 0].int()):
            return False
    return True


def _refuses(spec: LayerSpec) -> str | None:
    if isinstance(spec.grid, AffineGrid) and not (spec.grid.symmetric and spec.group == spec.in_features):
        return "symmetric weights with one scale per output channel only"
    if spec.inputs[0]["bits"] != 8:
        return f"activations in 8 bits only, not {spec.inputs[0]['bits']}"
    if spec.inputs[0].get("clip", 1) != 1:
        return "activations up to their largest only, none of them cut off"
    if spec.device_type == "cuda":
        if spec.in_features % 8 or spec.out_features % 8:
            return f"inputs and outputs must be multiples of 8, not {spec.in_features} and {spec.out_features}"
        if torch.cuda.get_device_capability(spec.device) < (7, 5):
            return "compute capability 7.5 or newer"
    if reason := missing_op("_int_mm", spec):
        return reason
    if spec.device_type == "cpu" and spec.in_features < 2:
        return "two inputs or more"
    if spec.device_type == "cpu" and not exact_here():
        return "this processor has no VNNI, without which sums of 8-bit products overflow"
    return None


def _pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """int8 (rows, cols)."""
    return (canonical(codes, spec) ^ 0x80).view(torch.int8)


def _unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return layout.view(torch.uint8) ^ 0x80


def _bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    scales, step, least = (
        params["scales"].float().flatten(),
        params.get("step"),
        CUDA_ROWS if spec.device_type == "cuda" else 1,
    )
    turned = layout.t()
    rounded = _by_token if step is None else _by_layer(step)

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, spec.in_features)
        codes, steps = rounded(flat)
        few = len(codes) < least
        sums = torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, least - len(codes))) if few else codes, turned)
        y = (sums[: len(flat)] if few else sums).float()  # first: a product of int32 and fp32 is not vectorized
        return y.mul_(steps).mul_(scales).to(spec.dtype).view(*x.shape[:-1], spec.out_features)

    product.held = (scales, *(() if step is None else (step,)))  # type: ignore[attr-defined]
    return product


def _by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    steps = token_steps(x)
    return (x / steps).round_().to(torch.int8), steps


def _by_layer(step: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: ((x.float() / step).round_().clamp_(-HIGHEST, HIGHEST).to(torch.int8), step)


W8A8 = Kernel(
    name="w8a8", library="torch", refuses=_refuses,
    accepts=Accepts(words="8-bit weights and activations only", weight=("rounded", "codes"),
                    grids=(SignedGrid, AffineGrid), bits=(8,),
                    inputs=("token_range",)),
    pack=_pack, unpack=_unpack, bind=_bind, max_rows=unlimited, rowwise=True,
)  # fmt: skip
