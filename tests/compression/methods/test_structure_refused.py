"""Before any work: what parameters and shapes forbid is refused, and calibration asked for where it is needed."""

import pytest
import torch
from cut_models import CUTS, FOLDERS, IDS, NF4, compressed, folders, opened, skeleton  # noqa: F401

import compression
from compression import CalibrationError, LayerError, Recipe, RecipeError
from compression.architectures.random_shapes import SHAPES
from compression.checkpoints.base import build
from compression.engine.shapes import outcome


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("structured(keep_layers=0)", "keep_layers=0): at least 1"),
        ("structured(keep_layers=-3)", "keep_layers=-3): at least 1"),
        ("structured(keep_layers=0.0)", "above 0 and at most 1"),
        ("structured(keep_layers=1.5)", "keep_layers=1.5): a share must be above 0 and at most 1"),
        ("structured(keep_kv_heads=-0.5)", "keep_kv_heads=-0.5): a share"),
        ("structured(keep_kv_heads=2.0)", "written without a point"),
        ("structured(choose=size)", "allowed are position, similarity, perplexity"),
        ("structured(samples=0)", "structured(samples=0): must be at least 1"),
        ('structured(layers={"*":null})', "no settings per layer"),
        ("p(ratio=1.0)", "p(ratio=1.0): allowed are 0 to below 1"),
        ("p(ratio=-0.1)", "p(ratio=-0.1): allowed are 0 to below 1"),
        ("p(round_to=0)", "p(round_to=0): must be at least 1"),
        ("p(finetune_samples=7)", "p(finetune_samples=7): one step takes 8 texts; allowed are 0 and 8 or more"),
        ("p(sequence_length=0)", "p(sequence_length=0): must be at least 1"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text, words):
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(text)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "text", "words"),
    [
        ("mistral-7b", "structured(keep_layers=33)", "model.layers.0 to model.layers.31; allowed are 1 to 32"),
        ("mistral-7b", "structured(keep_layers=20)-structured(keep_layers=21)", "has 20 layers"),
        ("mistral-7b", "structured(keep_kv_heads=9)", "layers.0.self_attn has 8 heads of keys and values; allowed"),
        ("llama-2-7b", "structured", "model.layers.0.self_attn has no grouped heads, 32 of keys and"),
        ("qwen2.5-3b", "p(ratio=0.999)", "model.layers.0.mlp: p(ratio=0.999) leaves 12 of 11008 neurons"),
        ("qwen2.5-3b", "p(ratio=0.001)", "leaves 10997 of 11008 neurons, and round_to=128 makes that 11008"),
        ("qwen2.5-3b", "p(round_to=1)-nf4", "nf4 cannot take model.layers.0.mlp.down_proj: group_size=64"),
        ("qwen2.5-3b", "nf4-p(round_to=1)", "model.layers.0.mlp.down_proj: its groups of 64 cannot be cut"),
    ],
)  # fmt: skip
def test_what_the_shapes_forbid_is_refused_from_the_configuration_alone(shape, text, words):
    with pytest.raises(LayerError) as refused:
        outcome(Recipe.parse(text), skeleton(shape))
    assert words in str(refused.value)


def test_a_model_without_grouped_heads_loses_layers_alone():
    model = outcome(Recipe.parse("structured(keep_kv_heads=none)"), skeleton("llama-2-7b"))

    assert (20, 32) == (model.config.num_hidden_layers, model.config.num_key_value_heads)
    assert "LlamaForCausalLM" == type(model).__name__


def test_a_llama_with_biases_that_transformers_has_no_class_for_is_refused():
    config = SHAPES["tinyllama-1.1b"] | {"attention_bias": True}

    with pytest.raises(LayerError, match=r"q_proj has a bias.* no class for 24 heads of a Llama of width 2048"):
        outcome(Recipe.parse("structured"), build(config, torch.bfloat16, device="meta"))


def test_a_weight_that_is_not_finite_is_refused_naming_the_layer():
    def edit(model):
        model.model.layers[3].mlp.up_proj.weight.data[1, 2] = float("inf")

    for recipe in ("structured", "p(round_to=1)"):
        with pytest.raises(LayerError, match=r"model\.layers\.3\.mlp\.up_proj.*NaN"):
            compression.compress(opened(edit=edit), recipe, calibration=IDS)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("structured", 0), ("structured(choose=similarity)", 32 * 256), ("structured(heads=importance,samples=2)", 512),
     ("structured(choose=similarity,keep_layers=none)", 0), ("p(samples=3)", 3 * 512), ("p(ratio=0)", 0),
     ("p(samples=3,finetune_samples=1500)", 1500 * 512), ("p(ratio=0,finetune_samples=8)", 8 * 512)],
)  # fmt: skip
def test_calibration_is_asked_for_where_something_is_measured(text, tokens):
    (step,) = Recipe.parse(text).steps

    asked = step.method.calibration

    assert tokens == (0 if asked is None else asked[0] * asked[1])
    if tokens:
        with pytest.raises(CalibrationError, match="needs calibration text"):
            compression.compress(str(FOLDERS["MistralForCausalLM"]), text)


def test_calibration_is_counted():
    assert IDS.numel() == compressed("MistralForCausalLM", CUTS[2]).cost.calibration_tokens
    assert 0 == compressed("MistralForCausalLM", CUTS[0]).cost.calibration_tokens


@pytest.mark.parametrize("text", [CUTS[0], f"{NF4}-{CUTS[2]}"])
def test_block_by_block_it_is_refused_in_words(text, tmp_path):
    with pytest.raises(RecipeError, match="works on the whole model at once; take compress"):
        compression.compress_to(tmp_path / "out", str(FOLDERS["MistralForCausalLM"]), text, calibration=IDS)
