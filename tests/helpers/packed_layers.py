"""Packed layers, one to a kernel and a dtype that it takes, their inputs, and how far outputs differ."""

from dataclasses import dataclass

import pytest
import torch
from strategies import gaussian

from compression.layers.activations import OutlierColumns
from compression.layers.codes import Codes, packed_linear
from compression.layers.kernels import choose
from compression.layers.linear import Linear
from compression.layers.sparse import Sparse
from compression.numeric.grids import AffineGrid, Int8RowGrid
from compression.numeric.grouping import Grid
from compression.numeric.normal_float import NF4Grid

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

on_devices = pytest.mark.parametrize("device", DEVICES)


@dataclass(frozen=True)
class Way:
    """A kernel and a layer that it takes; `error` bounds |y - reference| / |reference| (Frobenius)."""

    kernel: str
    grid: Grid
    dtype: torch.dtype
    error: float
    backend: str = "auto"
    threshold: float | None = None
    cols: int = 256
    rows: int = 64
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self):
        return f"{self.kernel}-{self.grid.kind}{self.grid.bits}-{str(self.dtype).removeprefix('torch.')}"


def affine(bits, group_size, symmetric=False):
    return AffineGrid(bits=bits, group_size=group_size, symmetric=symmetric)


EXACT, HALF, BRAIN = 1e-5, 2e-3, 1.2e-2  # fp32; fp16: 2**-11 and more sums; bf16: 2**-8 and sums of rounded products
CPU = ("cpu",)
WAYS = (
    Way("lut4", affine(4, 64), FP32, EXACT, devices=CPU),
    Way("lut4", affine(4, 32, True), BF16, BRAIN, devices=CPU),
    Way("lut4", affine(4, -1), FP16, HALF, devices=CPU),
    Way("lut4", NF4Grid(), FP32, EXACT, devices=CPU),
    Way("lut4", NF4Grid(double_quant=False, group_size=32), BF16, BRAIN, devices=CPU),
    Way("lut4", affine(3, 64), BF16, BRAIN, devices=CPU),
    Way("lut4", affine(3, -1, True), FP16, HALF, devices=CPU),
    Way("lut4", affine(2, 32), FP32, EXACT, devices=CPU),
    Way("int4", affine(4, 128), BF16, BRAIN, backend="torch"),
    Way("int4", affine(4, 32, True), BF16, BRAIN, backend="torch"),
    Way("int8", affine(8, -1, True), BF16, BRAIN),
    Way("int8", affine(8, -1), BF16, BRAIN),
    Way("int8", affine(8, -1, True), BF16, BRAIN, cols=200, rows=13),
    Way("int8", affine(8, -1), BF16, BRAIN, cols=200),
    Way("bitsandbytes-nf4", NF4Grid(), BF16, BRAIN, backend="bitsandbytes"),
    Way("bitsandbytes-nf4", NF4Grid(), FP32, EXACT, backend="bitsandbytes"),
    Way("bitsandbytes-nf4", NF4Grid(double_quant=False), FP16, HALF, backend="bitsandbytes"),
    Way("bitsandbytes-int8", Int8RowGrid(), FP16, HALF, backend="bitsandbytes", threshold=6.0),
    Way("bitsandbytes-int8", Int8RowGrid(), BF16, BRAIN, backend="bitsandbytes", threshold=6.0),
    Way("dequantize", affine(2, 16), FP32, EXACT),
    Way("dequantize", affine(3, 64), BF16, BRAIN, devices=("cuda",)),
    Way("dequantize", affine(3, 72), BF16, BRAIN, cols=216),
    Way("dequantize", affine(3, 40, True), FP16, HALF, cols=200, rows=13),
    Way("dequantize", affine(8, 64), FP32, EXACT),
    Way("dequantize", affine(4, 8), FP32, EXACT, cols=24, rows=5),
    Way("simulated", Int8RowGrid(), FP32, EXACT, threshold=6.0, backend="torch"),
)  # fmt: skip


def outlier_columns(threshold):
    return None if threshold is None else OutlierColumns(threshold)


def pack_linear(weight, bias, grid, *, threshold=None, **options):
    """A layer with its weight rounded to nearest on a grid; with a threshold as LLM.int8() multiplies."""
    return packed_linear(weight, bias, grid, input_part=outlier_columns(threshold), **options)


def coded_linear(codes, params, bias, grid, *, dtype, permutation=None, **options):
    return Linear(Codes.from_codes(codes, params, grid, dtype=dtype, permutation=permutation), bias, **options)


def sparse_linear(weight, bias, pattern=None):
    return Linear(Sparse.from_weight(weight, pattern), bias)


def holds(layer, kind):
    """Whether a layer is one of ours, with a weight of that kind as its first or only part."""
    return isinstance(layer, Linear) and layer.weight_part.summands[0].kind == kind


def layer_of(way, *, bias=True, seed=0, device="cpu"):
    weight = gaussian(way.rows, way.cols, seed=seed, dtype=way.dtype).to(device)
    given_bias = gaussian(1, way.rows, seed=seed + 1, dtype=way.dtype)[0].to(device) if bias else None
    layer = pack_linear(weight, given_bias, way.grid, backend=way.backend, threshold=way.threshold)
    return layer.eval()


def inputs(way, rows, *, seed=0, dtype=None, device="cpu"):
    """(rows, cols), two of the columns with outliers."""
    x = gaussian(rows, way.cols, seed=seed + 2, std=1)
    x[:, [3, 11]] *= 20
    return x.to(dtype or way.dtype).to(device)


def usable(way, device):
    if device not in way.devices:
        pytest.skip(f"{way.kernel} has no kernel on {device}")
    codes = Codes(way.grid, way.rows, way.cols, dtype=way.dtype)
    spec = Linear(codes, input_part=outlier_columns(way.threshold)).spec_on(device)
    for kernel in choose.KERNELS:
        if kernel.name == way.kernel and (reason := kernel.refusal(spec)) and way.kernel != "bitsandbytes-nf4":
            pytest.skip(f"{way.kernel}: {reason}")
    if "bitsandbytes" in way.kernel:
        pytest.importorskip("bitsandbytes")


def difference(y, expected):
    return float((y.float() - expected.float()).norm() / expected.float().norm())
