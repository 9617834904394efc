"""PackedLinear: every kernel against the slow reference, and the codes safe through all that is done to a module."""

import copy
import io
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import gaussian, seeds
from torch import nn

from compression import BackendError, LayerError, _kernels, _packing
from compression._grids import AffineGrid, Grid, Int8RowGrid, NF4Grid, decode
from compression._linear import PackedLinear, llm_int8_multiply

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
    Way("int4", affine(4, 128), BF16, BRAIN, backend="torch"),
    Way("int4", affine(4, 32, True), BF16, BRAIN, backend="torch"),
    Way("int8", affine(8, -1, True), BF16, BRAIN),
    Way("int8", affine(8, -1), BF16, BRAIN),
    Way("bitsandbytes-nf4", NF4Grid(), BF16, BRAIN, backend="bitsandbytes"),
    Way("bitsandbytes-nf4", NF4Grid(), FP32, EXACT, backend="bitsandbytes"),
    Way("bitsandbytes-nf4", NF4Grid(double_quant=False), FP16, HALF, backend="bitsandbytes"),
    Way("bitsandbytes-int8", Int8RowGrid(), FP16, HALF, backend="bitsandbytes", threshold=6.0),
    Way("bitsandbytes-int8", Int8RowGrid(), BF16, BRAIN, backend="bitsandbytes", threshold=6.0),
    Way("dequantize", affine(2, 16), FP32, EXACT),
    Way("dequantize", affine(3, 64), BF16, BRAIN),
    Way("dequantize", affine(3, 40, True), FP16, HALF, cols=200, rows=13),
    Way("dequantize", affine(8, 64), FP32, EXACT),
    Way("dequantize", affine(4, 8), FP32, EXACT, cols=24, rows=5),
    Way("dequantize", Int8RowGrid(), FP32, EXACT, threshold=6.0, backend="torch"),
)  # fmt: skip


def layer_of(way, *, bias=True, seed=0, device="cpu"):
    weight = gaussian(way.rows, way.cols, seed=seed, dtype=way.dtype).to(device)
    given_bias = gaussian(1, way.rows, seed=seed + 1, dtype=way.dtype)[0].to(device) if bias else None
    layer = PackedLinear.from_weight(weight, given_bias, way.grid, backend=way.backend, threshold=way.threshold)
    return layer.eval()


def inputs(way, rows, *, seed=0, dtype=None, device="cpu"):
    """(rows, cols), two of the columns with outliers."""
    x = gaussian(rows, way.cols, seed=seed + 2, std=1)
    x[:, [3, 11]] *= 20
    return x.to(dtype or way.dtype).to(device)


def usable(way, device):
    if device not in way.devices:
        pytest.skip(f"{way.kernel} has no kernel on {device}")
    spec = PackedLinear(way.grid, way.cols, way.rows, bias=False, dtype=way.dtype, threshold=way.threshold)._spec_on(
        torch.device(device)
    )
    for kernel in _kernels.KERNELS:
        if kernel.name == way.kernel and (reason := kernel.refuses(spec)) and way.kernel != "bitsandbytes-nf4":
            pytest.skip(f"{way.kernel}: {reason}")
    if "bitsandbytes" in way.kernel:
        pytest.importorskip("bitsandbytes")


@pytest.fixture(params=WAYS, ids=str)
def way(request):
    usable(request.param, "cpu")
    return request.param


def difference(y, expected):
    return float((y.float() - expected.float()).norm() / expected.float().norm())


# --- The product ------------------------------------------------------------------------------------------------------


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
    codes = _packing.unpack(layer.codes, 4, chosen.cols)
    weight = decode(chosen.grid, codes, layer.stored_parameters()).double()

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

    y = llm_int8_multiply(x, weight, 6.0)

    assert {3, 11} <= set(outliers)
    assert difference(y, expected) <= EXACT


def test_the_compute_dtype_is_the_precision_of_the_product_and_not_of_the_output():
    weight, x = gaussian(64, 256), inputs(WAYS[0], 4, dtype=FP32)
    exact = PackedLinear.from_weight(weight, None, NF4Grid(), backend="torch")
    coarse = PackedLinear.from_weight(weight, None, NF4Grid(), compute_dtype=BF16)

    error = difference(coarse(x), exact.reference(x))

    assert (FP32, FP32) == (coarse(x).dtype, exact(x).dtype)
    assert error <= BRAIN
    assert error > EXACT or coarse.kernel_name() == "dequantize", "only without a kernel may a CPU take fp32"


# --- What is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", _kernels.KERNELS, ids=lambda kernel: kernel.name)
@on_devices
@given(seed=seeds)
@settings(max_examples=5)
def test_unpacking_a_kernels_layout_gives_back_the_canonical_codes(kernel, device, seed):
    ways = [way for way in WAYS if way.kernel == kernel.name and device in way.devices]
    for way in ways:
        usable(way, device)
        layer = layer_of(way, seed=seed, device=device)
        spec = layer._spec_on(torch.device(device))
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, layer.codes.shape, dtype=torch.uint8, generator=random).to(device)

        assert torch.equal(codes, kernel.unpack(kernel.pack(codes, spec), spec))
    if not ways:
        pytest.skip(f"{kernel.name} has no kernel on {device}")


def test_the_state_dict_holds_the_same_bits_before_and_after_a_forward(way):
    layer = layer_of(way)
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    layer(inputs(way, 1))
    after = layer.state_dict()

    assert ["codes", *layer.stored_parameters(), "bias"] == list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_stored_bytes_are_the_bytes_of_the_state_dict_before_and_after_a_forward(way):
    layer = layer_of(way)
    counted = layer.stored_bytes

    layer(inputs(way, 1))

    assert counted == layer.stored_bytes == sum(v.numel() * v.element_size() for v in layer.state_dict().values())


def test_codes_are_held_once_so_that_memory_is_what_is_stored(way):
    layer = layer_of(way)
    layer(inputs(way, 1))

    held = {t.data_ptr(): t.numel() * t.element_size() for t in layer.buffers()}

    assert layer.stored_bytes == sum(held.values())


def test_a_fresh_layer_with_the_loaded_state_gives_equal_outputs(way):
    layer, fresh = layer_of(way), layer_of(way, seed=7)
    x = inputs(way, 1)
    expected = layer(x)
    fresh(x)  # packed for its kernel: loading must not write into that layout

    fresh.load_state_dict(layer.state_dict())

    assert torch.equal(expected, fresh(x))
    fresh.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(expected, fresh(x))


def test_loading_does_not_touch_the_layer_that_the_state_came_from(way):
    layer, fresh = layer_of(way), layer_of(way, seed=7)
    before = layer.dequantize()
    fresh.load_state_dict(layer.state_dict(), assign=True)

    fresh(inputs(way, 1))

    assert torch.equal(before, layer.dequantize())


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def to_another_dtype_and_back(layer):
    dtype = layer.dtype
    return layer.to(FP32).to(dtype)


COPIES = (copy.deepcopy, through_pickle, through_torch_save, to_another_dtype_and_back, lambda layer: layer.to("cpu"))
COPY_IDS = ("deepcopy", "pickle", "torch.save", "to dtype and back", "to device")


@pytest.mark.parametrize("through", COPIES, ids=COPY_IDS)
def test_after_a_forward_the_weight_survives(way, through):
    layer = layer_of(way)
    weight, x = layer.dequantize(), inputs(way, 1)
    expected = layer(x)

    moved = through(layer)

    assert torch.equal(weight, moved.dequantize())
    assert torch.equal(expected, moved(x))
    assert torch.equal(weight, layer.dequantize())
    assert torch.equal(expected, layer(x))


def test_dequantizing_after_a_forward_gives_the_weight_that_was_stored(way):
    layer = layer_of(way)
    before = layer.dequantize(FP32)

    for rows in (1, 40):
        layer(inputs(way, rows))
        assert torch.equal(before, layer.dequantize(FP32))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_change_of_dtype_reaches_the_product_but_not_the_stored_scales(bias):
    way = WAYS[0]
    layer = layer_of(Way("lut4", way.grid, BF16, BRAIN), bias=bias)
    parameters = {name: value.clone() for name, value in layer.stored_parameters().items()}
    layer(inputs(way, 1))

    layer.to(FP32)

    x = inputs(way, 1, dtype=FP32)
    assert FP32 == layer.dtype == layer.dequantize().dtype
    assert difference(layer(x), layer.reference(x)) <= EXACT, "computed in fp32 now"
    assert all(torch.equal(value, getattr(layer, name)) for name, value in parameters.items())


def test_a_dense_layer_made_of_a_packed_one_computes_the_same(way):
    layer = layer_of(way)
    layer(inputs(way, 1))

    linear = layer.to_linear()

    x = inputs(way, 5)
    assert isinstance(linear, nn.Linear)
    assert torch.equal(layer.dequantize(), linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    if way.threshold is None:
        assert difference(linear(x), layer.reference(x)) <= way.error


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight = gaussian(4, 64)
    weight[2, 5] = value

    with pytest.raises(LayerError, match="NaN or infinite"):
        PackedLinear.from_weight(weight, None, NF4Grid())
    with pytest.raises(LayerError, match="the bias holds NaN"):
        PackedLinear.from_weight(gaussian(4, 64), weight[2, 4:8].new_tensor([0, 1, value, 3]), NF4Grid())


def test_groups_that_do_not_tile_the_inputs_are_refused():
    with pytest.raises(LayerError, match="group_size=64 does not divide the 96 inputs"):
        PackedLinear(NF4Grid(), 96, 8, bias=False, dtype=FP32)


REFUSED = [
    ("native", affine(3, 64), 64, BF16, "4-bit weights on CPU only"),
    ("native", affine(4, 24), 96, BF16, "does not tile|native|compiler|processor|turned off"),
    ("bitsandbytes", affine(4, 64), 64, BF16, "NF4 weights only"),
    ("bitsandbytes", Int8RowGrid(), 64, BF16, r"LLM\.int8\(\) only"),
    ("nonsense", NF4Grid(), 64, BF16, "backend='nonsense' cannot take a nf4 layer of 16 x 64"),
]


@pytest.mark.parametrize(("backend", "grid", "cols", "dtype", "words"), REFUSED)
def test_a_backend_without_a_kernel_for_the_layer_says_why(backend, grid, cols, dtype, words):
    layer = PackedLinear.from_weight(gaussian(16, cols, dtype=dtype), None, grid, backend=backend)

    with pytest.raises(BackendError, match=words) as caught:
        layer(torch.zeros(1, cols, dtype=dtype))
    assert "backend=auto" in str(caught.value)


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
    layer = PackedLinear.from_weight(gaussian(rows, cols, dtype=dtype), None, grid, backend="torch")

    kernel, refused = _kernels.choose(layer._spec_on(torch.device("cpu")))

    assert kernel is None
    assert "dequantize" == layer.kernel_name()
    assert any(re.search(words, reason) for reason in refused.values())
    assert {each.name for each in _kernels.KERNELS} == refused.keys()


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9), seed=seeds, bits=st.sampled_from((2, 3, 4, 8)), dtype=st.sampled_from((BF16, torch.float32))
)
def test_columns_stored_in_another_order_give_the_same_layer(rows, seed, bits, dtype):
    """Codes of permuted columns, with the permutation, against the same columns put back in their places."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(128, generator=random)
    weight, x = gaussian(48, 128, seed=seed, dtype=dtype), gaussian(rows, 128, seed=seed + 1, dtype=dtype)
    stored = PackedLinear.from_weight(weight[:, order], None, affine(bits, 64))
    permuted = PackedLinear.from_codes(
        _packing.unpack(stored.codes, bits, 128), stored.stored_parameters(), None, affine(bits, 64),
        dtype=dtype, permutation=order,
    )  # fmt: skip

    assert torch.equal(permuted.dequantize()[:, order], stored.dequantize())
    allowed = BRAIN if dtype == BF16 else EXACT
    assert difference(permuted(x), stored(x[:, order])) < allowed  # the dense product adds in another order
    assert difference(permuted(x), permuted.reference(x)) < allowed
    assert permuted.stored_bytes == stored.stored_bytes + 4 * 128
    loaded = PackedLinear(affine(bits, 64), 128, 48, bias=False, dtype=dtype, permuted=True)
    loaded.load_state_dict(permuted.state_dict())
    assert torch.equal(loaded(x), permuted(x))


def test_an_order_that_names_a_column_twice_is_refused():
    layer = PackedLinear.from_weight(gaussian(8, 64, seed=0), None, affine(4, 32))
    order = torch.arange(64)
    order[3] = 4

    with pytest.raises(LayerError, match=r"no permutation of 0 \.\. 63"):
        PackedLinear.from_codes(
            torch.zeros(8, 64, dtype=torch.uint8), layer.stored_parameters(), None, affine(4, 32),
            dtype=torch.float32, permutation=order,
        )  # fmt: skip
