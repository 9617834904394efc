"""Kernels say what they accept: whatever else a layer holds sends it the plain way, and its name says so."""

import pytest
import torch
from packed_layers import BF16, FP32, WAYS, affine, difference, inputs, layer_of, pack_linear, usable
from strategies import gaussian

from compression.errors import LayerError
from compression.layers.activations import Levels, OutlierColumns, TokenRange
from compression.layers.codes import Codes
from compression.layers.kernels import choose
from compression.layers.linear import Linear
from compression.layers.rounded import Rounded
from compression.layers.transforms import Scale
from compression.numeric.normal_float import NF4Grid


def test_the_int8_kernel_does_not_take_a_layer_with_an_outlier_threshold():
    """It would multiply as if there were none."""
    weight, x = gaussian(64, 256, dtype=BF16), inputs(WAYS[0], 4, dtype=BF16)
    grid = affine(8, -1, True)
    plain, layer = pack_linear(weight, None, grid), pack_linear(weight, None, grid, threshold=6.0)

    assert ("int8", "simulated") == (plain.kernel_name(), layer.kernel_name())
    assert not torch.equal(plain(x), layer(x))
    assert difference(layer(x), layer.reference(x)) < 4e-3 < difference(plain(x), layer.reference(x)) + 4e-3
    assert torch.equal(layer.plain(x), layer(x))


PLACED = {
    "an input quantizer": {"input_part": TokenRange()},
    "an input scale": {"input_part": Scale(torch.full((256,), 2.0))},
    "outlier columns": {"input_part": OutlierColumns(6.0)},
    "two input parts": {"input_part": [Scale(torch.full((256,), 2.0)), TokenRange()]},
    "an output quantizer": {"output_part": Levels.fitted(gaussian(99, 64), 3)},
}


@pytest.mark.parametrize("what", PLACED)
@pytest.mark.parametrize("way", [way for way in WAYS if way.threshold is None and "cpu" in way.devices], ids=str)
def test_no_kernel_takes_a_layer_with_a_part_that_it_does_not_name(way, what):
    if (way.cols, way.rows) != (256, 64):
        pytest.skip("the parts are of another shape")
    usable(way, "cpu")
    layer = layer_of(way)
    layer.backend = "auto"
    x = inputs(way, 3)
    for place, part in PLACED[what].items():
        setattr(layer, place, part)

    if layer.kernel_name() == "w8a8":
        pytest.skip("w8a8 names it; its products are compared in test_integer_products")
    assert layer.kernel_name() in ("simulated", "dequantize")
    assert torch.equal(layer.plain(x), layer(x))
    assert difference(layer(x), layer.reference(x)) <= way.error * 20  # a value near a level may fall on either side
    refused = choose.choose(layer.spec_on("cpu"))[1]
    assert {kernel.name for kernel in choose.KERNELS} == refused.keys()


@pytest.mark.parametrize("name", ["lut4", "int4", "int8", "bitsandbytes-nf4", "gptqmodel"])
def test_the_reason_names_the_part(name):
    grid = {"int8": affine(8, -1, True), "bitsandbytes-nf4": NF4Grid()}.get(name, affine(4, 64))
    layer = Linear(Codes.from_weight(gaussian(64, 256, dtype=BF16), grid), input_part=TokenRange())

    _, refused = choose.choose(layer.spec_on("cpu"))

    assert "with nothing at the input of the layer, not token_range" in refused[name]


def test_a_part_that_is_put_in_after_a_product_is_seen_by_the_next():
    layer, x = layer_of(WAYS[0]), inputs(WAYS[0], 2)
    before = layer(x)

    layer.output_part = Levels.fitted(gaussian(99, 64), 2)
    after = layer(x)
    layer.output_part = None

    assert not torch.equal(before, after)
    assert torch.equal(before, layer(x))
    layer.bias = None
    assert not torch.equal(before, layer(x))


def test_whole_numbers_that_no_kernel_takes_are_named_as_simulated():
    for layer in (Linear(Rounded(gaussian(64, 256), 4), input_part=TokenRange()),
                  Linear(Rounded(gaussian(64, 256)), input_part=TokenRange(6))):  # fmt: skip
        assert "simulated" == layer.kernel_name()
        assert layer.graph_refusal("cpu") is None


def test_an_adapter_beside_codes_leaves_them_their_kernel():
    from compression.layers.low_rank import LowRank

    layer, x = layer_of(WAYS[0]), inputs(WAYS[0], 2)
    kernel, alone = layer.kernel_name(), layer(x)
    a, b = gaussian(4, 256), gaussian(64, 4, seed=1)

    adapted = layer.with_weight(layer.weight_part, LowRank(a, b, 2.0))

    assert kernel == adapted.kernel_name()
    added = 2.0 * (x.to(FP32) @ a.T @ b.T)
    torch.testing.assert_close(alone + added, adapted(x))


@pytest.mark.parametrize("threshold", [6, 10**50, 1e300])
def test_a_threshold_is_a_float_whatever_number_it_was_written_as(threshold):
    part = OutlierColumns(threshold)

    assert type(part.threshold) is float
    assert part(torch.randn(2, 8, generator=torch.Generator().manual_seed(0))).shape == (2, 8)


@pytest.mark.parametrize("threshold", [10**400, 0, -1, float("nan"), float("inf"), True, "6"])
def test_a_threshold_that_is_no_finite_number_above_0_is_refused(threshold):
    with pytest.raises(LayerError, match="threshold"):
        OutlierColumns(threshold)
