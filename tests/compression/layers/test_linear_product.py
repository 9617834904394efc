"""Packed layers multiply: every kernel against the slow reference, and the gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import (
    BF16,
    BRAIN,
    EXACT,
    FP16,
    FP32,
    HALF,
    WAYS,
    difference,
    inputs,
    layer_of,
    on_devices,
    pack_linear,
    usable,
)
from strategies import gaussian, seeds

from compression.layers.activations import OutlierColumns
from compression.numeric import packing
from compression.numeric.grouping import decode
from compression.numeric.normal_float import NF4Grid


@pytest.fixture(params=WAYS, ids=str)
def way(request):
    usable(request.param, "cpu")
    return request.param


@on_devices
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_product_is_that_of_the_reference_for_one_to_forty_rows(way, device):
    usable(way, device)
    layer = layer_of(way, device=device)

    for rows in (1, 2, 7, 16, 17, 40):
        x = inputs(way, rows, device=device)
        y = layer(x)

        assert ((rows, way.rows), way.dtype) == (y.shape, y.dtype)
        assert difference(y, layer.reference(x)) <= way.error, rows
    assert way.kernel == layer.kernel_name()


@given(rows=st.integers(1, 40), seed=seeds, bias=st.booleans(), chosen=st.sampled_from(WAYS))
@settings(max_examples=40)
def test_the_product_is_that_of_the_reference_for_any_rows_and_weights(rows, seed, bias, chosen):
    if "bitsandbytes" in chosen.kernel:
        pytest.importorskip("bitsandbytes")
    layer = layer_of(chosen, seed=seed, bias=bias)
    x = inputs(chosen, rows, seed=seed)

    assert difference(layer(x), layer.reference(x)) <= chosen.error


@given(chosen=st.sampled_from(WAYS[:5]), seed=seeds)
def test_the_reference_is_the_plain_product_with_the_decoded_weight(chosen, seed):
    layer = layer_of(chosen, seed=seed)
    x = inputs(chosen, 3, seed=seed, dtype=FP32)
    codes = packing.unpack(layer.weight_part.codes, 4, chosen.cols)
    weight = decode(chosen.grid, codes, layer.weight_part.parameters_of_grid()).double()

    expected = x.double() @ weight.T + layer.bias.double()

    assert difference(layer.reference(x), expected) <= EXACT


def test_inputs_of_another_dtype_give_outputs_of_that_dtype(way):
    layer = layer_of(way)

    for dtype in (FP32, BF16, FP16):
        x = inputs(way, 2, dtype=dtype)
        y = layer(x)
        assert dtype == y.dtype
        assert difference(y, layer.reference(x)) <= max(way.error, {FP32: 0, BF16: BRAIN, FP16: HALF}[dtype])


def test_leading_dimensions_and_strides_of_the_input_do_not_matter(way):
    layer = layer_of(way)
    x = inputs(way, 6)
    y = layer(x)

    batched, strided = layer(x.view(2, 3, -1)), layer(x.T.contiguous().T)

    assert (2, 3, way.rows) == batched.shape
    assert difference(batched.view(6, -1), y) <= way.error
    assert difference(strided, y) <= way.error


@on_devices
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_gradient_for_x_is_that_of_the_dense_layer(way, device):
    usable(way, device)
    layer = layer_of(way, device=device)
    layer(inputs(way, 2, device=device))  # packed for its kernel, as after any inference
    x = inputs(way, 3, device=device).requires_grad_()

    layer(x).sum().backward()

    expected = layer.dequantize(FP32).sum(0).expand(3, -1)
    assert difference(x.grad, expected) <= max(way.error, 1e-3)


def test_llm_int8_keeps_outlier_columns_and_rounds_the_others_row_by_row():
    x, weight = inputs(WAYS[0], 4, dtype=FP32), gaussian(8, 256)
    outliers = [j for j in range(256) if any(abs(float(v)) >= 6.0 for v in x[:, j])]
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(4):
        row = x[i].double()
        scale = max(abs(float(v)) for v in row if abs(float(v)) < 6.0) / 127
        seen = [float(row[j]) if j in outliers else round(float(row[j]) / scale) * scale for j in range(256)]
        expected[i] = weight.double() @ torch.tensor(seen, dtype=torch.float64)

    y = OutlierColumns(6.0)(x) @ weight.T

    assert {3, 11} <= set(outliers)
    assert difference(y, expected) <= EXACT


def test_the_compute_dtype_is_the_precision_of_the_product_and_not_of_the_output():
    weight, x = gaussian(64, 256), inputs(WAYS[0], 4, dtype=FP32)
    exact = pack_linear(weight, None, NF4Grid(), backend="torch")
    coarse = pack_linear(weight, None, NF4Grid(), compute_dtype=BF16)

    error = difference(coarse(x), exact.reference(x))

    assert (FP32, FP32) == (coarse(x).dtype, exact(x).dtype)
    assert error <= BRAIN
    assert error > EXACT or coarse.kernel_name() == "dequantize", "only without a kernel may a CPU take fp32"
