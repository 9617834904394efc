"""What `compress` makes of a recipe: no step, layers left alone or set otherwise, two quantizers in a row."""

import pytest
import torch
from tiny_models import fresh_base, linears, logits

import compression
from compression import RecipeError

pytestmark = pytest.mark.usefixtures("tiny_shapes")


def test_fp16_is_the_base_itself():
    base, before = fresh_base("tiny-qwen2")

    result = compression.compress(base, "fp16")

    assert torch.equal(logits(base.model), logits(result.model))
    assert {id(p) for p in base.model.parameters()} == {id(p) for p in result.model.parameters()}
    assert ((), (), ("transformers", "vllm")) == (result.report, result.executed, result.portable[:2])
    assert sum(t.nbytes for n, t in before.items() if n != "lm_head.weight") == result.stored_bytes


def test_layers_that_the_recipe_leaves_alone_or_sets_otherwise_are_reported_so():
    base, _ = fresh_base("tiny-llama")

    result = compression.compress(base, 'rtn(bits=3,layers={"model.layers.0.*":null,"*.down_proj":{"bits":8}})')

    after = linears(result.model)
    outcomes = {entry.name: (entry.outcome, entry.detail) for entry in result.report}
    assert ("kept", "the recipe leaves this layer alone") == outcomes["model.layers.0.mlp.up_proj"]
    assert after["model.layers.0.mlp.up_proj"].weight is linears(base.model)["model.layers.0.mlp.up_proj"].weight
    assert 8 == after["model.layers.1.mlp.down_proj"].weight_part.grid.bits
    assert 3 == after["model.layers.1.mlp.up_proj"].weight_part.grid.bits
    assert outcomes["model.layers.1.mlp.down_proj"][1].startswith("rtn(bits=8)")


def test_a_pattern_that_no_layer_matches_is_refused():
    base, _ = fresh_base("tiny-llama")

    with pytest.raises(RecipeError, match=r"no layer matches '\*.down'; layers are called e.g. model.layers.0"):
        compression.compress(base, 'rtn(layers={"*.down":{"bits":8}})')


def test_two_quantizers_in_a_row_are_run_with_a_dequantize_between_them():
    base, _ = fresh_base("tiny-llama")

    result = compression.compress(base, "rtn(bits=8)-nf4")

    assert ("rtn(bits=8)", "dequantize", "nf4") == result.executed
    assert {"nf4"} == {layer.weight_part.grid.kind for layer in linears(result.model).values()}
