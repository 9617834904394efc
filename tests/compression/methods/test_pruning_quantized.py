"""Pruned weights that are quantized: zeros stay, and steps come in an order that keeps them."""

from dataclasses import dataclass

import pytest
import torch
from calibration_inputs import hessian_of, inputs
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import holds
from pruning_cases import SMALL, TOKENS, linears, tiny_base
from strategies import gaussian, seeds, weights

import compression
from compression import Recipe, RecipeError
from compression.engine.schedule import make_schedule
from compression.methods.base import ModelMethod
from compression.methods.quantization.weight_activation.llm_int8 import LLMInt8
from compression.methods.quantization.weight_only.awq import AWQ
from compression.methods.quantization.weight_only.gptq import GPTQ
from compression.methods.quantization.weight_only.hqq import HQQ
from compression.methods.quantization.weight_only.nf4 import NF4
from compression.methods.quantization.weight_only.rtn import RTN
from compression.numeric import sparsity
from compression.numeric.rounding import relative_error
from compression.recipes.registry import METHODS, method


@pytest.fixture
def base(monkeypatch):
    return tiny_base(monkeypatch)


# --- Quantizers keep the zeros ----------------------------------------------------------------------------------------

BITS = st.sampled_from((2, 3, 4, 8))
GROUPS = st.sampled_from((8, 32, -1))
KEEPING = st.one_of(
    st.builds(RTN, bits=BITS, group_size=GROUPS, symmetric=st.booleans()),
    st.builds(NF4, double_quant=st.booleans(), group_size=st.sampled_from((32, 64))),
    st.just(LLMInt8()),
    st.builds(GPTQ, bits=BITS, group_size=GROUPS, symmetric=st.booleans(), act_order=st.booleans(),
              static_groups=st.booleans()),
    st.builds(AWQ, bits=BITS, group_size=GROUPS, symmetric=st.booleans(), clip=st.booleans(),
              rounding=st.sampled_from(("nearest", "gptq"))),
)  # fmt: skip


def quantized(method, weight, hessian):
    if isinstance(method, GPTQ | AWQ):
        return method.round(weight.float(), hessian, weight.dtype).decode(method.grid())
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return method.compress_linear(linear, None).dequantize()


@given(KEEPING, weights(), seeds, st.sampled_from((None, (2, 4))))
def test_every_weight_that_was_pruned_is_zero_when_it_is_quantized(method, weight, seed, pattern):
    mask = sparsity.choose(gaussian(*weight.shape, seed=seed).abs(), 0.5, pattern, by_row=True)

    after = quantized(method, weight.masked_fill(mask, 0), hessian_of(inputs(64, seed=seed, tokens=100)))

    assert (after[mask] == 0).all()


def test_without_exact_zeros_or_their_level_the_zeros_are_lost():
    """What the law above would see of a quantizer that does not keep them."""
    mask = torch.arange(64).repeat(8, 1) % 2 == 0
    weight, hessian = gaussian(8, 64).masked_fill(mask, 0), hessian_of(inputs(64))
    nearly = weight.masked_fill(mask, 1e-30)

    assert not (quantized(GPTQ(group_size=32), nearly, hessian)[mask] == 0).all()
    few = torch.arange(64).repeat(8, 1) % 16 == 0
    assert not (quantized(HQQ(group_size=32), gaussian(8, 64).masked_fill(few, 0), hessian)[few] == 0).all()
    losing = {name for name, cls in compression.list_methods().items() if not cls.info.keeps_zeros}
    assert {"gguf", "hqq", "slicegpt", "quarot", "spinquant"} == losing


def test_gptq_of_a_pruned_weight_is_nearer_than_rounding_it_to_nearest():
    mask = sparsity.choose(gaussian(32, 128).abs(), 0.5, None, by_row=True)
    weight, hessian = gaussian(32, 128).masked_fill(mask, 0), hessian_of(inputs(128, tokens=1000))

    ours, nearest = (
        relative_error(weight, quantized(method, weight, hessian), hessian)
        for method in (GPTQ(bits=3, group_size=32), RTN(bits=3, group_size=32, symmetric=True))
    )

    assert ours < 0.9 * nearest


JOINT = (
    f"sparsegpt({SMALL})-gptq(group_size=32,{SMALL})",
    f"sparsegpt(pattern=2:4,store=nm,{SMALL})-gptq(bits=3,group_size=32,static_groups=false,{SMALL})",
    f"wanda({SMALL})-nf4(group_size=32)",
    f"wanda(store=bitmask,{SMALL})-rtn(group_size=32)",
    f"magnitude(scope=global)-awq(group_size=32,{SMALL})",
)


@pytest.mark.parametrize("text", JOINT)
def test_a_recipe_of_pruning_and_quantizing_keeps_the_zeros_and_its_bytes_add_up(base, text, tmp_path):
    pruner, quantizer = text.split(")-")
    pruned = linears(compression.compress(base, f"{pruner})").model)

    result = compression.compress(base, text)

    for name, layer in linears(result.model).items():
        mask = pruned[name].weight == 0
        assert holds(layer, "codes") and mask.float().mean() > 0.4
        assert (layer.dequantize()[mask] == 0).all(), name
    assert compression.compress(base, quantizer).stored_bytes == result.stored_bytes
    result.save(tmp_path / "joint")
    assert compression.load(tmp_path / "joint").stored_bytes == result.stored_bytes


@pytest.mark.parametrize("text", ["sparsegpt-hqq", "hqq-wanda", "magnitude-nf4-hqq"])
def test_a_quantizer_that_would_lose_the_zeros_is_refused_before_any_work(base, text):
    with pytest.raises(RecipeError, match=r"hqq would lose the zeros .* quantizers that keep them: .*gptq"):
        compression.compress(base, text)


# --- The order of steps -----------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsegpt-gptq", ["sparsegpt", "gptq"]),
        ("nf4-sparsegpt", ["nf4", "dequantize", "sparsegpt", "nf4"]),
        ("wanda-nf4-magnitude", ["wanda", "nf4", "dequantize", "magnitude", "nf4"]),
        ("wanda(store=bitmask)-nf4", ["wanda(store=bitmask)", "nf4"]),
        ("magnitude-edit", ["magnitude", "edit"]),
        ("magnitude(store=bitmask)-edit", ["magnitude(store=bitmask)", "densify", "edit"]),
        ("magnitude(store=bitmask)-magnitude(scope=global)", ["magnitude(store=bitmask)", "magnitude(scope=global)"]),
    ],
)
def test_pruned_weights_are_quantized_again_and_made_dense_for_a_step_on_the_whole_model(registered, text, expected):
    method("edit", leaves="dense")(
        dataclass(frozen=True, kw_only=True)(
            type("Edit", (ModelMethod,), {"apply": lambda self, model, context: model})
        )
    )

    assert expected == [what for _, what in make_schedule(Recipe.parse(text).steps)]


def test_layers_that_a_quantizer_leaves_alone_stay_as_pruning_stored_them(base, tmp_path):
    text = f'wanda(store=bitmask,{SMALL})-rtn(group_size=32,layers={{"*.down_proj":null}})'

    result = compression.compress(base, text)

    kinds = {name.endswith("down_proj"): layer.weight_part.kind for name, layer in linears(result.model).items()}
    assert {True: "sparse", False: "codes"} == kinds
    assert 2 == result.kernels()["densify"]
    opened = compression.load(result.save(tmp_path / "mixed"))
    assert torch.equal(*(r.model(TOKENS, use_cache=False).logits for r in (result, opened)))
