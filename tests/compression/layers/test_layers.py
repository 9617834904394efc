"""What is recorded of layers: bits and errors of a real compressed model, against the model itself."""

import pytest

import compression
from bench.results import layers
from compression.layers.report import LayerReport

DEEP = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(saved):
    return compression.open_base(str(saved))


def _described(base, recipe, **given):
    compressed = compression.compress(base, compression.Recipe.parse(recipe), seed=0, **given)
    found = layers.describe(compressed, base.model)
    return compressed, found, {each["name"]: each for each in found["layers"]}


def test_bits_are_those_stored_and_the_error_is_the_change_of_the_weight(base):
    compressed, found, by_name = _described(base, "rtn(bits=4,group_size=32)")

    before = base.model.get_submodule(DEEP).weight.float()
    after = compressed.model.get_submodule(DEEP)
    assert 8 * after.stored_bytes / before.numel() == by_name[DEEP]["bits"]
    assert float((after.dequantize().float() - before).norm() / before.norm()) == pytest.approx(by_name[DEEP]["error"])
    assert ("weight", "replaced") == (by_name[DEEP]["of"], by_name[DEEP]["outcome"])
    assert (None, "kept") == (by_name["lm_head"]["error"], by_name["lm_head"]["outcome"])
    assert ["rtn(group_size=32)"] == found["executed"]
    assert len(by_name) - 3 == sum(found["kernels"].values())  # all but embeddings, head and norms


def test_fewer_bits_cost_a_larger_error(base):
    errors = [_described(base, f"rtn(bits={bits},group_size=32)")[2][DEEP]["error"] for bits in (2, 4, 8)]

    assert sorted(errors, reverse=True) == errors
    assert errors[0] > 10 * errors[2]


def test_what_a_method_reports_of_its_error_is_what_is_shown(base):
    _, _, by_name = _described(base, "magnitude(sparsity=0.5)")

    detail = by_name[DEEP]["detail"]
    assert f"weight error {by_name[DEEP]['error']:.3g}" in detail
    assert "weight" == by_name[DEEP]["of"]


def test_what_was_cut_or_removed_has_no_error(base):
    _, _, cut = _described(base, "structured(keep_layers=1,keep_kv_heads=1)")

    assert "removed" in {each["outcome"] for each in cut.values()}
    assert {None} == {each["error"] for each in cut.values()}


def test_a_weight_that_was_scaled_is_not_compared_with_what_it_was(base):
    compressed, _, by_name = _described(base, "rtn(bits=8,group_size=32)")
    moved = LayerReport("norms", "replaced", "divided by the scales of the layers that read them")
    compressed.report = (*compressed.report, moved)

    again = {each["name"]: each for each in layers.describe(compressed, base.model)["layers"]}
    assert by_name[DEEP]["error"] > 0
    assert again[DEEP]["error"] is None
    assert by_name[DEEP]["bits"] == again[DEEP]["bits"]
