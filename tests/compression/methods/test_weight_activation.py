"""Weights and activations rounded to nearest: layers by hand, static ranges, what is kept and what is refused."""

import pytest
import torch
from checkpoints import logits

import compression
from compression import LayerError
from compression.architectures.decoder import decoder_blocks, stored_layers
from compression.calibration.capture import Inputs
from compression.numeric import outlier_victim

IDS = torch.randint(48, (6, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=6,sequence_length=24"
WAYS = ["int8", f"int8(activations=static,{SMALL})", "fp8", f"fp8(activations=static,{SMALL})"]


@pytest.fixture
def base(folder):
    return compression.open_base(str(folder))


def largest_inputs(base):
    """By path, the largest absolute input of a layer of the first block."""
    block, found = decoder_blocks(base.model)[0], {}

    def see(stack, x):
        for path in stack.readers:
            found[path] = max(found.get(path, 0.0), float(x.abs().max()))

    Inputs.of_first_block(base.model, IDS).observe(block, see)
    return found


@pytest.mark.parametrize("steps", WAYS)
def test_a_layer_is_the_product_of_what_was_rounded(base, steps):
    result, largest = compression.compress(base, steps, calibration=IDS), largest_inputs(base)
    x, top = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), 127 if "int8" in steps else 448

    def rounded(values, scale):
        whole = (values / scale).clamp(-top, top)
        return (whole.round() if top == 127 else whole.to(torch.float8_e4m3fn).float()) * scale

    for path in ("self_attn.q_proj", "mlp.up_proj"):
        dense, layer = (each.model.layers[0].get_submodule(path) for each in (base.model, result.model))
        weight = rounded(dense.weight, dense.weight.abs().amax(-1, keepdim=True) / top)
        scale = largest[path] / top if "static" in steps else x.abs().amax(-1, keepdim=True) / top
        torch.testing.assert_close(layer(x), rounded(x, scale) @ weight.t(), rtol=1e-4, atol=1e-5)


def test_int8_is_smoothquant_that_smooths_nothing(base):
    """With alpha=0 on weights that are alike everywhere, nothing is scaled."""
    with torch.no_grad():
        for block in decoder_blocks(base.model):
            for _, linear in block.linears():
                linear.weight.copy_(linear.weight.sign())
    for activations in ("token", "static"):
        one, other = (
            compression.compress(base, f"{name}activations={activations},{SMALL})", calibration=IDS).model
            for name in ("int8(", "smoothquant(alpha=0,")
        )
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_layers_may_be_kept(base):
    result = compression.compress(base, 'int8(layers={"*.o_proj":null})')

    kept = [entry.name for entry in result.report if entry.outcome == "kept" and "_proj" in entry.name]
    assert [f"model.layers.{number}.self_attn.o_proj" for number in range(2)] == kept


def test_no_text_is_asked_for_where_none_is_read(folder):
    assert () == compression.compress(str(folder), "int8").notes
    assert 0 == compression.compress(str(folder), "fp8").cost.calibration_tokens


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_static_layer_of_a_recipe_without_text_is_refused(base, name):
    recipe = f'{name}(layers={{"*.o_proj":{{"activations":"static"}}}})'

    with pytest.raises(LayerError, match=r"o_proj: no text was read for its static .* set activations=static for the"):
        compression.compress(base, recipe)


@pytest.mark.parametrize(("steps", "size"), [("nvfp4", 16), ("mxfp4", 32)])
def test_inputs_that_groups_do_not_tile_are_refused_before_any_work(steps, size):
    from compression.recipes.recipe import Recipe

    with pytest.raises(LayerError, match=f"group_size={size} does not divide the 24 inputs"):
        Recipe.parse(steps).steps[0].method.check_layer(24, 8)


def test_rptq_of_one_cluster_is_int8_with_one_static_range(base):
    one = f"rptq(bits=8,activation_bits=8,clusters=1,head_clusters=none,rounding=nearest,{SMALL})"
    other = f"int8(activations=static,symmetric=false,{SMALL})"

    assert torch.equal(*(logits(compression.compress(base, each, calibration=IDS).model) for each in (one, other)))


def test_olive_rounds_a_layer_and_what_enters_it_in_pairs(base):
    result = compression.compress(base, f"olive({SMALL})", calibration=IDS)
    dense, layer = (each.model.layers[0].self_attn.q_proj for each in (base.model, result.model))
    x, seen = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), []
    Inputs.of_first_block(base.model, IDS).observe(
        decoder_blocks(base.model)[0], lambda stack, x: seen.append(x) if "self_attn.q_proj" in stack.readers else None
    )
    step = outlier_victim.fit(torch.cat([each.flatten() for each in seen])[None])[0]
    scales = outlier_victim.fit(dense.weight)[:, None]

    weight = outlier_victim.rounded(dense.weight / scales) * scales
    torch.testing.assert_close(layer(x), outlier_victim.rounded(x / step) * step @ weight.t(), rtol=1e-4, atol=1e-5)
    assert len(seen) == 6


def test_olive_without_activations_reads_no_text_and_refuses_a_static_layer(base, folder):
    result = compression.compress(str(folder), "olive(activation_bits=16)")

    assert 0 == result.cost.calibration_tokens
    assert all(layer.input_part is None for layer in stored_layers(result.model).values())
    with pytest.raises(LayerError, match=r"o_proj: no text was read for its static range"):
        compression.compress(base, 'olive(activation_bits=16,layers={"*.o_proj":{"activation_bits":4}})')
