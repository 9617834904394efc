"""Packed layers refuse weights that cannot be packed, and says why there is no kernel."""

import re

import pytest
import torch
from packed_layers import BF16, FP16, FP32, affine, pack_linear
from strategies import gaussian

from compression import BackendError, LayerError
from compression.layers.codes import Codes
from compression.layers.kernels import choose
from compression.numeric.grids import Int8RowGrid
from compression.numeric.normal_float import NF4Grid


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = gaussian(4, 64)
    weight[2, 5] = value

    with pytest.raises(LayerError, match="NaN or infinite"):
        pack_linear(weight, None, NF4Grid())
    with pytest.raises(LayerError, match="the bias has NaN"):
        pack_linear(gaussian(4, 64), weight[2, 4:8].new_tensor([0, 1, value, 3]), NF4Grid())


def test_groups_that_do_not_tile_the_inputs_are_refused():
    with pytest.raises(LayerError, match="group_size=64 does not divide the 96 inputs"):
        Codes(NF4Grid(), 8, 96, dtype=FP32)


REFUSED = [
    ("native", affine(8, 64), 64, BF16, "weights of at most 4 bits on CPU only"),
    ("native", affine(4, 24), 96, BF16, "does not tile|native|compiler|processor|turned off"),
    ("bitsandbytes", affine(4, 64), 64, BF16, "NF4 weights only"),
    ("bitsandbytes", Int8RowGrid(), 64, BF16, r"LLM\.int8\(\) only"),
]


@pytest.mark.parametrize(("backend", "grid", "cols", "dtype", "words"), REFUSED)
def test_a_backend_without_a_kernel_for_the_layer_says_why(backend, grid, cols, dtype, words):
    layer = pack_linear(gaussian(16, cols, dtype=dtype), None, grid, backend=backend)

    with pytest.raises(BackendError, match=words) as caught:
        layer(torch.zeros(1, cols, dtype=dtype))
    assert "backend=auto" in str(caught.value)


def test_a_backend_that_there_is_not_is_refused():
    with pytest.raises(LayerError, match="backend='nonsense' must be one of auto, native, torch, bitsandbytes"):
        pack_linear(gaussian(16, 64), None, NF4Grid(), backend="nonsense")


@pytest.mark.parametrize(
    ("grid", "rows", "cols", "dtype", "words"),
    [
        (affine(4, 16), 16, 64, BF16, "groups of 32, 64, 128 or 256 only, not 16"),
        (affine(4, 64), 16, 64, FP32, r"bf16 only, not torch\.float32"),
        (affine(4, 64), 24, 64, BF16, "outputs must be a multiple of 16, not 24"),
        (affine(8, 64), 16, 128, BF16, r"one scale per output channel only \(group_size=-1\)"),
        (affine(8, -1), 16, 64, FP16, r"bf16 only, not torch\.float16"),
    ],
)
def test_why_core_torch_has_no_kernel_is_said_in_words(grid, rows, cols, dtype, words):
    layer = pack_linear(gaussian(rows, cols, dtype=dtype), None, grid, backend="torch")

    kernel, refused = choose.choose(layer.spec_on("cpu"))

    assert kernel is None
    assert "dequantize" == layer.kernel_name()
    assert any(re.search(words, reason) for reason in refused.values())
    assert {each.name for each in choose.KERNELS} == refused.keys()
