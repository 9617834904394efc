"""What the folder of a published checkpoint says of itself: read as others write it, refused where tensors differ."""

import dataclasses
import json
import math
import re

import pytest
import torch
from checkpoints import change_tensors, logits, rewrite, says, transformers_model
from formats import AWQ, NAME, SYMMETRIC, describe
from published import publish

import compression
from compression import CheckpointError
from compression.checkpoints.formats.recipes import check_recipe

# --- What a folder says of itself -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "gptq"
    publish(folder, "LlamaForCausalLM", SYMMETRIC)
    return folder


@pytest.fixture
def checkpoint(published_once, tmp_path):
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for path in published_once.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def open_both_ways(folder):
    """As it is stored, and dequantized as a base: what one refuses, the other refuses in the same words."""
    try:
        compression.open_base(str(folder), dequantize=True)
    except CheckpointError as error:
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(error))}$"):
            compression.load(folder)
        raise
    compression.load(folder)


def describe_as(folder, **changes):
    rewrite(
        folder / "config.json", quantization_config={k: v for k, v in (SYMMETRIC | changes).items() if v is not ...}
    )


OLD = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}  # as AutoGPTQ wrote it


def test_a_folder_with_only_a_side_file_opens_all_the_same(checkpoint, published_once):
    rewrite(checkpoint / "config.json", quantization_config=...)
    (checkpoint / "quantize_config.json").write_text(json.dumps(OLD))

    assert torch.equal(logits(compression.load(published_once).model), logits(compression.load(checkpoint).model))
    with pytest.raises(CheckpointError, match=says("already quantized (gptq)", "compression.load")):
        compression.open_base(str(checkpoint))


def test_a_side_file_that_agrees_changes_nothing(checkpoint, published_once):
    (checkpoint / "quantize_config.json").write_text(json.dumps(OLD))

    assert torch.equal(logits(compression.load(published_once).model), logits(compression.load(checkpoint).model))


def test_the_side_file_of_llm_awq_is_read_in_its_own_words(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", AWQ)
    rewrite(tmp_path / "config.json", quantization_config=...)
    side = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(side))

    torch.testing.assert_close(logits(compression.load(tmp_path).model), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, ["config.json says bits=4", "quantize_config.json says bits=3"]),
        ({"group_size": 128}, ["group_size=32", "group_size=128"]),
        ({"desc_act": True}, ["desc_act=False", "desc_act=True"]),
        ({"sym": False}, ["sym=True", "sym=False"]),
        ({"checkpoint_format": "gptq_v2"}, ["version='gptq'", "version='gptq_v2'"]),
        ({"quant_method": "awq"}, ["quant_method='gptq'", "quant_method='awq'"]),
    ],
    ids=str,
)
def test_descriptions_that_disagree_are_refused_with_both_values(checkpoint, changes, words):
    (checkpoint / "quantize_config.json").write_text(json.dumps(OLD | changes))

    with pytest.raises(CheckpointError, match=says(*words)):
        open_both_ways(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "aqlm"}, ["'aqlm'", "gptq, awq"]),
        ({"quant_method": ...}, ["quant_method None", "gptq, awq"]),
        ({"bits": 5}, ["bits=5", "2, 3, 4, 8"]),
        ({"bits": True}, ["bits=True", "2, 3, 4, 8"]),
        ({"bits": ...}, ["bits=None"]),
        ({"quant_method": "awq", "bits": 8, "checkpoint_format": "gemm"}, ["bits=8", "it must be 4"]),
        ({"group_size": 0}, ["group_size=0", "-1 (per channel)"]),
        ({"group_size": 4}, ["group_size=4", "at least 8"]),
        ({"group_size": "128"}, ["group_size='128'"]),
        ({"group_size": ...}, ["group_size=None"]),
        ({"checkpoint_format": "marlin"}, ["'marlin'", '"gptq", "gptq_v2"']),
        ({"quant_method": "awq", "checkpoint_format": "gemv"}, ["'gemv'", '"gemm"']),
        ({"quant_method": "awq", "checkpoint_format": ..., "zero_point": False}, ["zero_point=False", "true"]),
        ({"quant_method": "awq", "checkpoint_format": ..., "backend": "llm-awq"}, ["llm-awq"]),
        ({"is_marlin_format": True}, ["is_marlin_format=True"]),
        ({"pack_dtype": "int64"}, ["pack_dtype='int64'", "int32"]),
        ({"adapter": {"path": "x"}}, ["adapter"]),
        ({"sym": "yes"}, ["sym='yes'"]),
        ({"dynamic": {"+:.*up_proj.*": {"bits": 8}}}, ["dynamic", "+:.*up_proj.*"]),
        ({"dynamic": [1]}, ["dynamic must map"]),
    ],
    ids=str,
)
def test_a_description_of_a_kind_that_is_not_read_is_refused_with_what_is(checkpoint, changes, words):
    describe_as(checkpoint, **changes)

    with pytest.raises(CheckpointError, match=says(*words)):
        open_both_ways(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_side_file_that_is_no_json_object_is_refused(checkpoint, content):
    (checkpoint / "quantize_config.json").write_text(content)

    with pytest.raises(CheckpointError, match=says("quantize_config.json")):
        open_both_ways(checkpoint)


def test_layers_that_dynamic_leaves_uncompressed_are_no_obstacle(checkpoint):
    describe_as(checkpoint, dynamic={"-:.*lm_head.*": {}})

    compression.load(checkpoint)


# --- Tensors that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales"])
def test_a_layer_without_one_of_its_tensors_is_refused_naming_it(checkpoint, key):
    change_tensors(checkpoint, lambda t: t.pop(f"{NAME}.{key}"))

    with pytest.raises(CheckpointError, match=says(f"missing {NAME}.{key}")):
        open_both_ways(checkpoint)


def test_a_layer_without_any_of_its_tensors_is_refused(checkpoint):
    change_tensors(checkpoint, lambda t: [t.pop(name) for name in list(t) if name.startswith(NAME)])

    with pytest.raises(CheckpointError, match=says(f"missing {NAME}.weight")):
        open_both_ways(checkpoint)


def test_activation_order_without_its_index_is_refused(checkpoint):
    describe_as(checkpoint, desc_act=True)
    change_tensors(checkpoint, lambda t: t.pop(f"{NAME}.g_idx"))

    with pytest.raises(CheckpointError, match=says(f"missing {NAME}.g_idx")):
        open_both_ways(checkpoint)


def test_weights_that_are_not_quantized_at_all_are_refused(tmp_path):
    transformers_model("LlamaForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", quantization_config=SYMMETRIC)

    with pytest.raises(CheckpointError, match=says("no layer of the model is stored so")):
        open_both_ways(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:, 1:].clone()}), [f"{NAME}.qzeros", "(2, 7)"]),
        (
            lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].t().contiguous()}),
            [f"{NAME}.qweight", "(64, 8)"],
        ),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:1].clone()}), [f"{NAME}.scales", "(1, 64)"]),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].long()}), [f"{NAME}.qweight", "torch.int64"]),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].int()}), [f"{NAME}.scales", "torch.int32"]),
        (lambda t: t[f"{NAME}.scales"].fill_(math.nan), [f"{NAME}: scales holds NaN"]),
        (lambda t: t[f"{NAME}.qzeros"].fill_(0), [NAME, "sym is true", "zero points other than 8"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(0), [NAME, "g_idx does not divide 64 inputs into 2 groups of 32"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(-1), [NAME, "g_idx names groups from -1 to -1; there are 0 to 1"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(2), [NAME, "g_idx names groups from 2 to 2"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(2**31 - 1), [NAME, "g_idx names groups from 2147483647"]),
        (lambda t: t.update({f"{NAME}.weight": torch.ones(64, 64)}), [NAME, "stored twice"]),
        (lambda t: t.update({f"{NAME}.bias": torch.ones(64)}), [f"unknown {NAME}.bias"]),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.qweight": torch.ones(1).int()}), ["unknown model.layers.1"]),
    ],
)
def test_tensors_that_contradict_the_description_are_refused_by_name(checkpoint, change, words):
    change_tensors(checkpoint, change)

    with pytest.raises(CheckpointError, match=says(*words)):
        open_both_ways(checkpoint)


@pytest.mark.parametrize("group_size", [48, 128])
def test_groups_that_do_not_tile_the_inputs_are_refused(checkpoint, group_size):
    describe_as(checkpoint, group_size=group_size)

    with pytest.raises(CheckpointError, match=says(f"group_size={group_size} does not divide the 64 inputs")):
        open_both_ways(checkpoint)


def test_outputs_that_do_not_fill_whole_words_are_refused(checkpoint):
    describe_as(checkpoint, bits=3)
    rewrite(checkpoint / "config.json", num_attention_heads=1, num_key_value_heads=1, head_dim=16)

    with pytest.raises(CheckpointError, match=says("q_proj", "16 outputs of 3 bits do not fill whole 32-bit words")):
        open_both_ways(checkpoint)


def test_a_quantized_head_that_is_tied_to_the_embeddings_is_refused(tmp_path):
    publish(tmp_path, "LlamaForCausalLM", SYMMETRIC, lm_head=True)
    rewrite(tmp_path / "config.json", tie_word_embeddings=True)

    with pytest.raises(CheckpointError, match=says("lm_head is quantized", "ties it to the embeddings")):
        open_both_ways(tmp_path)


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(CheckpointError, match=says("model.safetensors is damaged or not safetensors")):
        open_both_ways(checkpoint)


def test_a_published_checkpoint_is_no_uncompressed_base_and_the_words_say_what_to_do(checkpoint):
    with pytest.raises(CheckpointError, match=says("already quantized (gptq)", "compression.load", "dequantize=True")):
        compression.open_base(str(checkpoint))
    with pytest.raises(CheckpointError, match="already quantized"):
        compression.compress(str(checkpoint), "rtn(group_size=32)")


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_others_is_called_by_its_method_and_settings(checkpoint):
    text = compression.load(checkpoint).recipe.text

    assert text.startswith("gptq")
    assert "symmetric=true" in text or "symmetric" not in text


def test_a_published_awq_checkpoint_is_called_awq_and_its_recipe_can_run(tmp_path):
    publish(tmp_path, "LlamaForCausalLM", AWQ)

    recipe = compression.load(tmp_path).recipe

    assert "awq(group_size=32)" == recipe.text
    assert recipe == compression.Recipe.parse(recipe.text)


def test_another_recipe_on_a_published_checkpoint_is_refused_with_its_own():
    published = dataclasses.replace(
        describe(4, "gptq"), recipe=compression.Recipe.parse("rtn(group_size=16)").to_json()
    )
    check_recipe(published, compression.Recipe.parse("rtn(group_size=16)"))
    check_recipe(published, compression.Recipe())

    with pytest.raises(compression.RecipeError, match=r"by gptq, or in full gptq\(.*made by rtn\(group_size=16\).*nf4"):
        check_recipe(published, compression.Recipe.parse("nf4"))
