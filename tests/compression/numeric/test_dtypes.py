"""Every kernel beside the plain product, for every type that a checkpoint can have: taken, or done the plain way."""

import pytest
import torch
from packed_layers import affine, pack_linear, sparse_linear
from strategies import gaussian
from tiny_models import TINY

import compression
from compression import BackendError
from compression.architectures.random_shapes import SHAPES
from compression.layers.activations import OutlierColumns
from compression.layers.kernels import choose
from compression.layers.kernels.kernel import LayerSpec
from compression.numeric.checks import FLOATS
from compression.numeric.grids import Int8RowGrid
from compression.numeric.normal_float import NF4Grid

DTYPES = sorted(FLOATS, key=str)
ERRORS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of rounding
GRIDS = {
    "affine4": affine(4, 64), "affine4-symmetric": affine(4, 128, True), "affine3": affine(3, 64),
    "affine2": affine(2, 32), "affine8": affine(8, -1), "affine8-groups": affine(8, 64), "nf4": NF4Grid(),
    "nf4-plain": NF4Grid(double_quant=False), "int8": Int8RowGrid(),
}  # fmt: skip


def entering(x, threshold):
    return x if threshold is None else OutlierColumns(threshold)(x)


def far(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_a_packed_layer_multiplies_as_its_dense_weight_in_every_type(name, dtype):
    weight, bias = gaussian(64, 128).to(dtype), gaussian(1, 64, seed=1)[0].to(dtype)
    threshold, coarse = (6.0, 6e-3) if name == "int8" else (None, 0.0)  # bitsandbytes rounds activations from fp16
    for backend in choose.BACKENDS:
        layer = pack_linear(weight, bias, GRIDS[name], backend=backend, threshold=threshold)
        try:
            layer.kernel_name()
        except BackendError as error:
            assert backend not in ("auto", "torch"), error
            continue
        for rows in (1, 3, 40):
            for kind in DTYPES:
                x = gaussian(rows, 128, seed=rows, std=1).to(kind)
                expected = entering(x.double(), threshold) @ layer.dequantize(torch.float64).T + bias.double()
                y = layer(x)
                assert (kind, (rows, 64)) == (y.dtype, tuple(y.shape))
                assert far(y, expected) <= max(ERRORS[kind], ERRORS[dtype], coarse), (backend, rows, kind)


@pytest.mark.parametrize("kernel", choose.KERNELS, ids=lambda kernel: kernel.name)
def test_no_kernel_takes_a_type_that_it_cannot_multiply(kernel):
    for grid in GRIDS.values():
        inputs = ({"kind": "outlier_columns", "threshold": 6.0},) if grid.bits == 8 else ()
        spec = LayerSpec(weight="codes", facts={"grid": grid}, in_features=128, out_features=64, device="cpu",
                                  dtype=torch.float64, backend=kernel.library, inputs=inputs)  # fmt: skip
        assert kernel.refusal(spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["bitmask", "2:4"])
def test_a_sparse_layer_multiplies_as_its_dense_weight_in_every_type(pattern, dtype):
    weight = gaussian(64, 128)
    gone = weight.abs().view(-1, 4).argsort(-1)[:, :2]
    weight = weight.view(-1, 4).scatter(-1, gone, 0.0).view_as(weight).to(dtype)
    layer = sparse_linear(weight, None, pattern)
    for kind in DTYPES:
        x = gaussian(5, 128, std=1).to(kind)
        assert far(layer(x), x.double() @ weight.double().T) <= (1e-12 if kind == torch.float64 else ERRORS[kind])


@pytest.mark.parametrize("text", ["nf4", "rtn(group_size=32)", "hqq(group_size=32)", "magnitude(store=bitmask)"])
def test_a_base_of_64_bits_is_compressed_and_runs(monkeypatch, text):
    shape = next(iter(TINY.values()))
    monkeypatch.setitem(SHAPES, "wide", shape | {"dtype": "float64"})
    model = compression.compress("random:wide", text).model

    with torch.no_grad():
        logits = model(torch.arange(8)[None], use_cache=False).logits

    assert torch.float64 == logits.dtype
    assert logits.isfinite().all()
