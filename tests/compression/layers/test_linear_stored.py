"""What packed layers store: the codes are safe through all that is done to a module, in any order of columns."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import (
    BF16,
    BRAIN,
    EXACT,
    FP32,
    WAYS,
    Way,
    affine,
    coded_linear,
    difference,
    inputs,
    layer_of,
    on_devices,
    pack_linear,
    usable,
)
from strategies import gaussian, seeds
from torch import nn

from compression import LayerError
from compression.layers.codes import Codes
from compression.layers.kernels import choose
from compression.layers.linear import Linear
from compression.numeric import packing


@pytest.fixture(params=WAYS, ids=str)
def way(request):
    usable(request.param, "cpu")
    return request.param


@pytest.mark.parametrize("kernel", choose.KERNELS, ids=lambda kernel: kernel.name)
@on_devices
@given(seed=seeds)
@settings(max_examples=5)
def test_unpacking_a_kernels_layout_gives_back_the_canonical_codes(kernel, device, seed):
    ways = [way for way in WAYS if way.kernel == kernel.name and device in way.devices]
    for way in ways:
        usable(way, device)
        layer = layer_of(way, seed=seed, device=device)
        spec = layer.spec_on(torch.device(device))
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, layer.weight_part.codes.shape, dtype=torch.uint8, generator=random).to(device)

        assert torch.equal(codes, kernel.unpack(kernel.pack(codes, layer.weight_part.parameters_of_grid(), spec), spec))
    if not ways:
        pytest.skip(f"{kernel.name} has no kernel on {device}")


def test_the_state_dict_holds_the_same_bits_before_and_after_a_forward(way):
    layer = layer_of(way)
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    layer(inputs(way, 1))
    after = layer.state_dict()

    names = [f"weight_part.{name}" for name in ("codes", *layer.weight_part.parameters_of_grid())]
    assert {*names, "bias"} == set(before) and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_stored_bytes_are_the_bytes_of_the_state_dict_before_and_after_a_forward(way):
    layer = layer_of(way)
    counted = layer.stored_bytes

    layer(inputs(way, 1))

    assert counted == layer.stored_bytes == sum(v.numel() * v.element_size() for v in layer.state_dict().values())


def _widened(way):
    """Bytes of a row that a kernel's layout has beyond the codes."""
    if way.kernel == "lut4":
        return (4 - way.grid.bits) * way.cols // 8
    if way.kernel == "int8":  # multiples of 16, and 16 for the offset
        return -way.cols % 16 + (0 if way.grid.symmetric else 16)
    return 0


def test_codes_are_held_once_so_that_memory_is_what_is_stored(way):
    layer = layer_of(way)
    layer(inputs(way, 1))

    held = {t.data_ptr(): t.numel() * t.element_size() for t in layer.buffers()}

    assert layer.stored_bytes + _widened(way) * way.rows == sum(held.values())


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
    parameters = {name: value.clone() for name, value in layer.weight_part.parameters_of_grid().items()}
    layer(inputs(way, 1))

    layer.to(FP32)

    x = inputs(way, 1, dtype=FP32)
    assert FP32 == layer.dtype == layer.dequantize().dtype
    assert difference(layer(x), layer.reference(x)) <= EXACT, "computed in fp32 now"
    assert all(torch.equal(value, getattr(layer.weight_part, name)) for name, value in parameters.items())


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


# --- Columns in another order -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9), seed=seeds, bits=st.sampled_from((2, 3, 4, 8)), dtype=st.sampled_from((BF16, torch.float32))
)
def test_columns_stored_in_another_order_give_the_same_layer(rows, seed, bits, dtype):
    """Codes of permuted columns, with the permutation, against the same columns put back in their places."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(128, generator=random)
    weight, x = gaussian(48, 128, seed=seed, dtype=dtype), gaussian(rows, 128, seed=seed + 1, dtype=dtype)
    stored = pack_linear(weight[:, order], None, affine(bits, 64))
    permuted = coded_linear(
        packing.unpack(stored.weight_part.codes, bits, 128), stored.weight_part.parameters_of_grid(), None,
        affine(bits, 64), dtype=dtype, permutation=order,
    )  # fmt: skip

    assert torch.equal(permuted.dequantize()[:, order], stored.dequantize())
    allowed = BRAIN if dtype == BF16 else EXACT
    assert difference(permuted(x), stored(x[:, order])) < allowed  # the dense product adds in another order
    assert difference(permuted(x), permuted.reference(x)) < allowed
    assert permuted.stored_bytes == stored.stored_bytes + 4 * 128
    loaded = Linear(Codes(affine(bits, 64), 48, 128, dtype=dtype, permuted=True))
    loaded.load_state_dict(permuted.state_dict(), assign=True)
    assert torch.equal(loaded(x), permuted(x))


def test_an_order_that_names_a_column_twice_is_refused():
    layer = pack_linear(gaussian(8, 64, seed=0), None, affine(4, 32))
    order = torch.arange(64)
    order[3] = 4

    with pytest.raises(LayerError, match=r"no permutation of 0 \.\. 63"):
        coded_linear(
            torch.zeros(8, 64, dtype=torch.uint8), layer.weight_part.parameters_of_grid(), None, affine(4, 32),
            dtype=torch.float32, permutation=order,
        )  # fmt: skip
