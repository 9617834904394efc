"""An offset, s (middle - z) times the sum of x, costs no precision, whatever the mean of x is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import BF16, FP32, affine, pack_linear
from strategies import gaussian, seeds

from compression.layers.kernels import choose
from compression.layers.kernels.kernel import LayerSpec
from compression.numeric.grids import AffineGrid

COLS, ROWS, INPUTS = 512, 256, 16
GRIDS = {
    "int8": (AffineGrid(bits=8, group_size=-1, symmetric=False, float_zeros=True), affine(8, -1), affine(8, -1, True)),
    "int4": (AffineGrid(bits=4, group_size=32, symmetric=False, float_zeros=True), affine(4, 128), affine(4, 64, True)),
    "lut4": (AffineGrid(bits=3, group_size=64, symmetric=False, float_zeros=True), affine(4, 128), affine(4, -1)),
}


@pytest.mark.parametrize("mean", [0, 0.3, -3, 30])
@pytest.mark.parametrize(("kernel", "grid"), [(name, grid) for name, grids in GRIDS.items() for grid in grids], ids=str)
def test_a_product_is_as_exact_as_the_plain_one_with_the_dequantized_weight(kernel, grid, mean):
    layer = pack_linear(gaussian(ROWS, COLS, dtype=BF16), None, grid, backend=_library(kernel))
    x = (gaussian(INPUTS, COLS, seed=1, std=1) + mean).to(BF16)

    exact = x.double() @ layer.dequantize(FP32).double().T
    plain = x @ layer.dequantize(BF16).T

    assert kernel == layer.kernel_name()
    assert _error(layer(x), exact) <= _error(plain, exact)


@given(seed=seeds, mean=st.floats(-100, 100), cols=st.integers(8, 80), low=st.floats(-2, 2), width=st.floats(0.01, 3))
@settings(max_examples=40)
def test_an_8_bit_product_rounds_once_wherever_the_range_of_its_weights_lies(seed, mean, cols, low, width):
    weight = (torch.rand(32, cols, generator=torch.Generator().manual_seed(seed)) * width + low).to(BF16)
    layer = pack_linear(weight, None, affine(8, -1))
    x = (gaussian(4, cols, seed=seed, std=1) + mean).to(BF16)

    exact = x.double() @ layer.dequantize(FP32).double().T
    terms = x.double().abs() @ layer.dequantize(FP32).double().abs().T

    assert "int8" == layer.kernel_name()
    assert ((layer(x).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * terms).all()


def _library(kernel):
    library = next(each.library for each in choose.KERNELS if each.name == kernel)
    grid = GRIDS[kernel][1]
    spec = LayerSpec(weight="codes", facts={"grid": grid}, in_features=COLS, out_features=ROWS, device="cpu",
                              dtype=BF16, backend=library)  # fmt: skip
    if reason := next(each for each in choose.KERNELS if each.name == kernel).refusal(spec):
        pytest.skip(f"{kernel}: {reason}")
    return library


def _error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())
