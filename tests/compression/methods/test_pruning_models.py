"""Whole models pruned: shares over all layers, what is written and reported, and what is refused."""

import json
import re

import pytest
import torch
from pruning_cases import SMALL, TOKENS, linears, tiny_base
from strategies import gaussian

import compression
from compression import LayerError, Recipe, RecipeError
from compression.architectures.decoder import decoder_blocks
from compression.calibration import observers
from compression.calibration.capture import Inputs
from compression.calibration.observers import Hessian
from compression.numeric import sparsity


@pytest.fixture
def base(monkeypatch):
    return tiny_base(monkeypatch)


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [f"sparsegpt(sparsity=0,{SMALL})", f"wanda(sparsity=0,{SMALL})", "magnitude(sparsity=0)",
     "magnitude(sparsity=0,scope=global)"],
)  # fmt: skip
def test_no_sparsity_is_the_identity(base, text):
    result = compression.compress(base, text)

    before, after = base.model.state_dict(), result.model.state_dict()
    assert [] == [name for name in before if not torch.equal(before[name], after[name])]


def test_global_magnitude_has_the_promised_share_over_all_layers_and_one_threshold(base):
    result = compression.compress(base, 'magnitude(sparsity=0.3,scope=global,layers={"*.0.mlp.up_proj":null})')

    before, after = linears(base.model), linears(result.model)
    kept = after.pop("model.layers.0.mlp.up_proj")
    assert kept.weight is before["model.layers.0.mlp.up_proj"].weight
    zeros = sum(int((layer.weight == 0).sum()) for layer in after.values())
    assert sparsity.removed(0.3, sum(layer.weight.numel() for layer in after.values())) == zeros
    largest = max(float(before[n].weight[layer.weight == 0].abs().max()) for n, layer in after.items())
    smallest = min(float(layer.weight[layer.weight != 0].abs().min()) for layer in after.values())
    assert largest <= smallest


def test_global_magnitude_cannot_be_streamed_and_has_one_setting(base, tmp_path):
    with pytest.raises(RecipeError, match="works on the whole model at once"):
        compression.compress_to(tmp_path / "out", "random:tiny-pruned", "magnitude(scope=global)")
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.up_proj has settings of its own"):
        compression.compress(base, 'magnitude(scope=global,layers={"*.0.mlp.up_proj":{"sparsity":0.3}})')


def test_what_is_written_block_by_block_is_what_is_made_in_memory(base, tmp_path):
    text = f"sparsegpt(store=bitmask,{SMALL})"
    expected = compression.compress(base, text)

    compression.compress_to(tmp_path / "streamed", "random:tiny-pruned", text)

    streamed = compression.load(tmp_path / "streamed")
    first, second = expected.model.state_dict(), streamed.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (expected.report, expected.stored_bytes) == (streamed.report, streamed.stored_bytes)


def test_a_densely_stored_model_is_as_large_as_before_and_opens_in_plain_transformers(base, tmp_path):
    from transformers import AutoModelForCausalLM

    result = compression.compress(base, f"sparsegpt({SMALL})")
    plain = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "dense"), dtype="auto")

    assert torch.equal(result.model(TOKENS, use_cache=False).logits, plain(TOKENS, use_cache=False).logits)
    weight = plain.model.layers[0].mlp.gate_proj.weight
    assert weight.numel() // 2 == int((weight == 0).sum())
    assert compression.compress(base, "fp16").stored_bytes == result.stored_bytes
    assert ("transformers", "vllm") == result.portable[:2]
    assert () == compression.compress(base, "magnitude(store=bitmask)").portable


@pytest.mark.parametrize("text", [f"sparsegpt({SMALL})", f"wanda(pattern=2:4,store=nm,{SMALL})"])
def test_the_report_tells_the_sparsity_reached_and_the_error_of_outputs_on_calibration(base, text):
    ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(5))
    seen = []
    Inputs.of_first_block(base.model, ids).observe(
        decoder_blocks(base.model)[0],
        lambda site, x: seen.append(x[0].float()) if "mlp.up_proj" in site.readers else None,
    )
    name = "model.layers.0.mlp.up_proj"

    result = compression.compress(base, text, calibration=ids)

    (detail,) = (entry.detail for entry in result.report if entry.name == name)
    before, after = (linears(model)[name].weight.float() for model in (base.model, result.model))
    y, changed = (torch.cat(seen) @ w.t() for w in (before, after))
    told = re.search(r"sparsity (\S+), output error (\S+) \(magnitude: (\S+)\)", detail)
    assert 0.5 == float(told[1]) == float((after == 0).float().mean())
    assert float(told[2]) == pytest.approx(float((y - changed).square().sum() / y.square().sum()), rel=0.01)


def test_wanda_sums_up_no_hessian(base, monkeypatch):
    made = []
    work = Hessian.__init__
    monkeypatch.setattr(Hessian, "__init__", lambda self, *arguments: made.append(1) or work(self, *arguments))

    compression.compress(base, f"wanda({SMALL})")
    assert [] == made
    compression.compress(base, f"sparsegpt({SMALL})")
    assert made


def test_wanda_keeps_some_of_the_inputs_spread_over_all():
    seen = observers.Norms(8, tokens=3 * observers.ERROR_TOKENS)
    for part in gaussian(3 * observers.ERROR_TOKENS, 8, std=1).split(512):
        seen.add(part[None])

    assert observers.ERROR_TOKENS <= sum(map(len, seen._sample._some)) <= 1.1 * observers.ERROR_TOKENS


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsegpt(sparsity=1)", "allowed are 0 to below 1"),
        ("wanda(sparsity=-0.1)", "allowed are 0 to below 1"),
        ("magnitude(pattern=4:2)", "n:m with 0 < n < m <= 32"),
        ("magnitude(pattern=0:4)", "n weights of m neighbours that stay"),
        ('magnitude(pattern="two:four")', "allowed are none and n:m"),
        ("wanda(pattern=2:4,sparsity=0.3)", "makes 2 of 4 weights zero, a sparsity of 0.5; leave one"),
        ("wanda(store=nm)", "needs a pattern"),
        ("magnitude(pattern=2:4,scope=global)", "leave one of the two out"),
        ("sparsegpt(damp=2)", "allowed are 0 to 1"),
        ("wanda(samples=0)", "must be at least 1"),
        ("wanda(store=dens)", "allowed are dense, bitmask, nm"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.parse(text)


@pytest.mark.parametrize("text", [f"sparsegpt(pattern=3:7,{SMALL})", "magnitude(pattern=3:7)"])
def test_a_pattern_that_does_not_divide_is_refused_naming_the_layer_and_what_does(base, text):
    words = r"model\.layers\.0\.self_attn\.q_proj: pattern=3:7 does not divide the 64 inputs .* 2, 4, 8, 16, 32;"
    with pytest.raises(LayerError, match=words):
        compression.compress(base, text)


@pytest.mark.parametrize("text", [f"sparsegpt({SMALL})", f"wanda({SMALL})", "magnitude", "magnitude(scope=global)"])
def test_a_weight_that_is_not_finite_is_refused_naming_the_layer(base, text):
    base.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")

    with pytest.raises(LayerError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        compression.compress(base, text)


def test_one_recipe_has_one_spelling():
    for texts in (("wanda", "wanda(sparsity=0.5)", "wanda(pattern=none)"),
                  ("wanda(pattern=2:4)", "wanda:pattern=2:4", 'wanda(pattern="2:4",sparsity=0.5)'),
                  ("wanda(pattern=1:4)", "wanda(sparsity=0.75,pattern=1:4)")):  # fmt: skip
        recipes = {Recipe.parse(text) for text in texts}
        assert {texts[0]} == {recipe.text for recipe in recipes}
        assert recipes == {Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) for recipe in recipes}
    assert 0.75 == Recipe.parse("wanda(pattern=1:4)").steps[0].method.share
