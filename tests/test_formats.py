"""Published GPTQ and AWQ checkpoints: read as they were written, written as others read them, refused in words."""

import dataclasses
import json
import math
import re

import pytest
import torch
from checkpoints import change_tensors, logits, rewrite, says, transformers_model
from hypothesis import given
from hypothesis import strategies as st
from published import awq_tensors, gptq_tensors, publish, random_layer

import compression
from compression import CheckpointError, LayerError, _blocks, _packing
from compression._formats import Published, awq, gptq
from compression._formats._layer import StoredLayer
from compression._formats._model import check_recipe
from compression._grids import AffineGrid
from compression._linear import PackedLinear

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2"}  # fmt: skip
SYMMETRIC = GPTQ | {"sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


# --- One layer --------------------------------------------------------------------------------------------------------


def dequantized(stored, bits, group_size):
    """fp16 weight of what a format read, through PackedLinear."""
    grid = AffineGrid(bits=bits, group_size=group_size, symmetric=False)
    codes = _packing.unpack(stored.codes, bits, stored.codes.shape[1] * 8 // bits)
    params = {"scales": stored.scales, "zero_points": _packing.pack(stored.zeros, bits)}
    return PackedLinear.from_codes(
        codes, params, None, grid, dtype=torch.float16, permutation=stored.permutation
    ).dequantize()


@st.composite
def descriptions(draw):
    method = draw(st.sampled_from(("gptq", "awq")))
    return Published(
        quant_method=method,
        bits=draw(st.sampled_from((2, 3, 4, 8))) if method == "gptq" else 4,
        group_size=draw(st.sampled_from((16, 32, -1))),
        symmetric=draw(st.booleans()) if method == "gptq" else False,
        version=draw(st.sampled_from(("gptq", "gptq_v2"))) if method == "gptq" else "gemm",
        desc_act=draw(st.booleans()) if method == "gptq" else False,
    )


def written_by_hand(layer, published):
    return awq_tensors(layer) if published.quant_method == "awq" else gptq_tensors(layer, published.bits,
                                                                                  published.version)  # fmt: skip


def format_of(published):
    return {"gptq": gptq, "awq": awq}[published.quant_method]


@given(descriptions(), st.integers(0, 99), st.sampled_from((None, 0, "max")))
def test_a_tensor_in_the_published_layout_dequantizes_bit_for_bit(published, seed, zeros):
    layer = random_layer(
        32, 64, published.bits, published.group_size, symmetric=published.symmetric, desc_act=published.desc_act,
        zeros={0: 0, "max": 2**published.bits - 1}.get(zeros), seed=seed,
    )  # fmt: skip
    tensors = written_by_hand(layer, published)

    stored = format_of(published).read(tensors, published)

    assert torch.equal(layer.weight(), dequantized(stored, published.bits, published.group_size))
    assert (stored.permutation is not None) == (published.desc_act and published.group_size != -1)


@given(descriptions(), st.integers(0, 99))
def test_writing_gives_the_published_tensors_back(published, seed):
    layer = random_layer(32, 64, published.bits, published.group_size, desc_act=published.desc_act, seed=seed)
    tensors = written_by_hand(layer, published)
    groups = layer.scales.shape[1]

    again = format_of(published).write(format_of(published).read(tensors, published), published)

    assert format_of(published).shapes(published, 32, 64, groups) == {k: tuple(v.shape) for k, v in again.items()}
    assert all(torch.equal(tensors[key], again[key]) and tensors[key].dtype == again[key].dtype for key in tensors)


@given(st.sampled_from((2, 3, 4, 8)), st.integers(0, 99))
def test_zero_points_less_one_field_by_field_are_the_same_where_none_is_zero(bits, seed):
    """As AutoGPTQ writes them."""
    layer = random_layer(32, 64, bits, 16, seed=seed)
    layer.zeros = layer.zeros.clamp(min=1)
    less_one = random_layer(32, 64, bits, 16, seed=seed)
    less_one.zeros = layer.zeros - 1

    assert torch.equal(gptq_tensors(layer, bits, "gptq")["qzeros"], gptq_tensors(less_one, bits, "gptq_v2")["qzeros"])
    assert torch.equal(layer.zeros, gptq.read(gptq_tensors(layer, bits, "gptq"),
                                              describe(bits, "gptq")).zeros)  # fmt: skip


def describe(bits, version):
    return Published(quant_method="gptq", bits=bits, group_size=16, symmetric=False, version=version)


def test_columns_in_activation_order_stay_in_theirs_where_a_permutation_is_written():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(64, generator=generator)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator)
    layer = StoredLayer(_packing.pack(codes, 4), torch.full((32, 4), 0.5).half(),
                        torch.arange(128, dtype=torch.uint8).view(32, 4) % 16, order)  # fmt: skip

    again = gptq.read(gptq.write(layer, describe(4, "gptq_v2")), describe(4, "gptq_v2"))

    assert torch.equal(dequantized(layer, 4, 16), dequantized(again, 4, 16))


# --- A whole checkpoint -----------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "gptq": GPTQ,
    "gptq-v1": GPTQ | {"checkpoint_format": "gptq"},
    "gptq-sym": SYMMETRIC,
    "gptq-3bit": SYMMETRIC | {"bits": 3},
    "gptq-8bit-channel": GPTQ | {"bits": 8, "group_size": -1},
    "gptq-act-order": GPTQ | {"bits": 2, "desc_act": True},
    "awq": AWQ,
}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("quantization", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_published_checkpoint_computes_what_its_weights_compute(tmp_path, architecture, quantization):
    expected = publish(tmp_path / "p", architecture, quantization)

    opened = compression.load(tmp_path / "p")
    base = compression.open_base(str(tmp_path / "p"), dequantize=True)

    assert torch.equal(logits(expected), logits(base.model))
    torch.testing.assert_close(logits(opened.model), logits(expected), rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(expected.get_submodule(name).weight, layer.dequantize())
        for name, layer in _blocks.packed_layers(opened.model).items()
    )
    assert 7 == len(_blocks.packed_layers(opened.model))
    assert (base.text, base.digest) == opened.base
    assert {"replaced": 7, "kept": 3} == {
        outcome: sum(entry.outcome == outcome for entry in opened.report) for outcome in ("replaced", "kept")
    }


def test_half_precision_and_a_quantized_head_stay_as_they_are_stored(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC | {"lm_head": True}, dtype=torch.float16, lm_head=True)

    opened = compression.load(tmp_path)

    assert torch.equal(expected.lm_head.weight, opened.model.lm_head.dequantize())
    assert torch.float16 == opened.model.lm_head.scales.dtype == opened.model.model.embed_tokens.weight.dtype


def test_layers_stored_dense_stay_dense_and_the_report_says_so(tmp_path):
    quantization = AWQ | {"modules_to_not_convert": ["up_proj"]}
    expected = publish(tmp_path, "LlamaForCausalLM", quantization, dense=(NAME,))

    opened = compression.load(tmp_path)

    assert torch.equal(expected.get_submodule(NAME).weight, opened.model.get_submodule(NAME).weight)
    assert ["kept: the checkpoint stores it uncompressed"] == [
        f"{entry.outcome}: {entry.detail}" for entry in opened.report if entry.name == NAME
    ]


def test_a_bias_of_zeros_that_the_architecture_does_not_have_is_let_go(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC)
    change_tensors(tmp_path, lambda t: t.update({f"{NAME}.bias": torch.zeros(64).half()}))

    torch.testing.assert_close(logits(compression.load(tmp_path).model), logits(expected), rtol=1e-4, atol=1e-5)


def test_groups_in_order_need_no_index(tmp_path):
    expected = publish(tmp_path, "LlamaForCausalLM", SYMMETRIC)
    change_tensors(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])

    torch.testing.assert_close(logits(compression.load(tmp_path).model), logits(expected), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_its_own_values_when_it_is_saved_in_our_format(tmp_path):
    publish(tmp_path / "p", "Qwen2ForCausalLM", SYMMETRIC, dtype=torch.bfloat16)
    opened = compression.load(tmp_path / "p")
    opened.recipe = compression.Recipe.parse("rtn(group_size=32,symmetric=true)")

    again = compression.load(opened.save(tmp_path / "own"))

    assert torch.equal(logits(opened.model), logits(again.model))
    assert torch.float16 == again.model.get_submodule(NAME).scales.dtype


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
        ({"quant_method": "awq", "bits": 8, "checkpoint_format": "gemm"}, ["bits=8", "allowed: 4"]),
        ({"group_size": 0}, ["group_size=0", "-1 (per channel)"]),
        ({"group_size": 4}, ["group_size=4", "8 or more"]),
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

    with pytest.raises(CheckpointError, match=says("no layer of the model has a qweight")):
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
        (lambda t: t[f"{NAME}.scales"].fill_(math.nan), [f"{NAME}.scales holds NaN"]),
        (lambda t: t[f"{NAME}.qzeros"].fill_(0), [NAME, "sym is true", "zero points other than 8"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(0), [NAME, "g_idx does not divide 64 inputs into 2 groups of 32"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(-1), [NAME, "g_idx does not divide"]),
        (lambda t: t[f"{NAME}.g_idx"].fill_(2), [NAME, "g_idx does not divide"]),
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


# --- Measuring it as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["fp16", "rtn(group_size=32,symmetric=true)"])
def test_a_checkpoint_is_measured_as_it_is_beside_its_dequantized_weights(half, tmp_path, steps):
    from bench.options import Options
    from bench.workbench import Workbench

    recipe = compression.Recipe.parse("rtn(group_size=32,symmetric=true)")
    result = compression.compress(half, recipe)
    result.save(tmp_path / "out", "gptq")
    asked = compression.Recipe.parse(steps)
    workbench = Workbench(
        Options(
            base=str(tmp_path / "out"),
            recipes=(asked,),
            prompt_tokens=4,
            new_tokens=4,
            journal=tmp_path / "journal.jsonl",
        )
    )

    measured = workbench.compressed(asked)

    assert (7 * 2 if asked.steps else 0) == len(_blocks.packed_layers(measured.model))
    assert {} == _blocks.packed_layers(workbench.base.model)
    for name, layer in _blocks.packed_layers(result.model).items():
        assert torch.equal(layer.dequantize(), workbench.base.model.get_submodule(name).weight)


def test_a_published_checkpoint_is_multiplied_by_the_backend_that_is_asked_for(half, tmp_path):
    from bench.options import Options
    from bench.workbench import Workbench

    compression.compress(half, "rtn(group_size=32,symmetric=true)").save(tmp_path / "out", "gptq")
    asked = compression.Recipe.parse("gptq(group_size=32,backend=torch)")
    options = {"base": str(tmp_path / "out"), "recipes": (asked,), "prompt_tokens": 4, "new_tokens": 4}

    model = Workbench(Options(**options, journal=tmp_path / "journal.jsonl")).compressed(asked).model

    assert {"torch"} == {layer.backend for layer in _blocks.packed_layers(model).values()}


def test_a_backend_that_cannot_take_a_stored_layer_is_refused(half, tmp_path):
    compression.compress(half, "rtn(group_size=32)").save(tmp_path / "out")

    with pytest.raises(compression.BackendError, match="backend='bitsandbytes' cannot take"):
        compression.load(tmp_path / "out", backend="bitsandbytes")


def test_another_recipe_on_a_published_checkpoint_is_refused_with_its_own():
    published = dataclasses.replace(
        describe(4, "gptq"), recipe=compression.Recipe.parse("rtn(group_size=16)").to_json()
    )
    check_recipe(published, compression.Recipe.parse("rtn(group_size=16)"))
    check_recipe(published, compression.Recipe())

    with pytest.raises(compression.RecipeError, match=r"by gptq, or in full gptq\(.*made by rtn\(group_size=16\).*nf4"):
        check_recipe(published, compression.Recipe.parse("nf4"))


# --- Writing ----------------------------------------------------------------------------------------------------------


WRITTEN = [
    ("gptq", "rtn(group_size=16)", "gptq_v2"),
    ("gptq", "rtn(group_size=32,symmetric=true)", "gptq"),
    ("gptq", "rtn(bits=3,group_size=16)", "gptq_v2"),
    ("gptq", "rtn(bits=2,group_size=16,symmetric=true)", "gptq"),
    ("gptq", "rtn(bits=8,group_size=-1)", "gptq_v2"),
    ("awq", "rtn(group_size=16)", "gemm"),
    ("awq", "rtn(group_size=-1,symmetric=true)", "gemm"),
]


@pytest.mark.parametrize(("format", "steps", "version"), WRITTEN)
def test_a_written_checkpoint_opens_with_the_same_logits(half, tmp_path, format, steps, version):
    result = compression.compress(half, steps)

    again = compression.load(result.save(tmp_path / "out", format))

    assert torch.equal(logits(result.model), logits(again.model))
    assert steps == again.recipe.text
    assert format in result.published_formats and ("gptqmodel",) == result.portable
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert version == quantization.get("checkpoint_format", quantization.get("version"))
    assert not (tmp_path / "out" / "compression.json").exists()


@pytest.mark.parametrize("options", ["", ",clip=false,rounding=gptq"])
def test_an_awq_result_is_written_in_its_format_and_read_back_bit_for_bit(half, tmp_path, options):
    steps = f"awq(group_size=16{options},samples=4,sequence_length=16)"
    result = compression.compress(half, steps, calibration=torch.arange(64).view(4, 16) % 48)

    again = compression.load(result.save(tmp_path / "out", "awq"))

    assert steps == again.recipe.text
    expected, actual = result.model.state_dict(), again.model.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.float(), actual[name].float()), name
    assert torch.equal(logits(result.model), logits(again.model))


def test_activation_order_is_written_and_read_again(half, tmp_path):
    result = compression.compress(half, "rtn(group_size=16,symmetric=true)")
    for name, layer in _blocks.packed_layers(result.model).items():
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
        codes = _packing.unpack(layer.codes, 4, layer.in_features)
        permuted = PackedLinear.from_codes(codes, layer.stored_parameters(), layer.bias, layer.grid, dtype=layer.dtype,
                                           permutation=order)  # fmt: skip
        result.model.set_submodule(name, permuted)
    assert ("gptq",) == result.published_formats

    again = compression.load(result.save(tmp_path / "out", "gptq"))

    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["desc_act"] is True
    for name, layer in _blocks.packed_layers(result.model).items():
        assert torch.equal(layer.dequantize(), again.model.get_submodule(name).dequantize())
    with pytest.raises(LayerError, match="activation order, for which there is no g_idx"):
        result.save(tmp_path / "awq", "awq")


def test_the_tensors_have_the_names_shapes_and_types_of_the_format(half, tmp_path):
    from safetensors.torch import load_file

    compression.compress(half, "rtn(group_size=16)").save(tmp_path / "out", "gptq")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    assert {"qweight", "qzeros", "scales", "g_idx", "bias"} == {
        key.rpartition(".")[2] for key in tensors if key.startswith(name)
    }
    assert {
        "qweight": ((8, 32), torch.int32), "qzeros": ((4, 4), torch.int32), "scales": ((4, 32), torch.float16),
        "g_idx": ((64,), torch.int32),
    } == {key: (tuple(tensors[f"{name}.{key}"].shape), tensors[f"{name}.{key}"].dtype)
          for key in ("qweight", "qzeros", "scales", "g_idx")}  # fmt: skip
    assert not [key for key in tensors if key.endswith((".codes", ".zero_points"))]


def test_transformers_reads_the_description(half, tmp_path):
    from transformers import AutoConfig, AwqConfig, GPTQConfig

    compression.compress(half, "rtn(bits=3,group_size=16,symmetric=true)").save(tmp_path / "gptq", "gptq")
    compression.compress(half, "rtn(group_size=16)").save(tmp_path / "awq", "awq")
    gptq, awq = (AutoConfig.from_pretrained(tmp_path / name).quantization_config for name in ("gptq", "awq"))

    read = GPTQConfig.from_dict(gptq)
    assert (3, 16, True, False, "gptq") == (read.bits, read.group_size, read.sym, read.desc_act, read.format)
    read = AwqConfig.from_dict(awq)
    assert (4, 16, True, "gemm") == (read.bits, read.group_size, read.zero_point, read.format)


@pytest.mark.parametrize(
    ("steps", "format", "words"),
    [
        ("nf4(group_size=32)", "gptq", ["self_attn.q_proj", "evenly spaced levels, not NF4Grid"]),
        ("llm_int8", "gptq", ["self_attn.q_proj", "evenly spaced levels"]),
        ("rtn(bits=3,group_size=16)", "awq", ["self_attn.q_proj", "3 bits; allowed are 4"]),
        ("rtn(group_size=8)", "gptq", ["self_attn.q_proj", "groups are of 8; readers take -1, 16, 32, 64, 128"]),
        ('rtn(group_size=16,layers={"*.up_proj":{"group_size":32}})', "gptq", ["up_proj has", "one setting"]),
        ('rtn(group_size=16,layers={"*.up_proj":{"bits":8}})', "gptq", ["up_proj has", "one setting"]),
        ('rtn(group_size=16,layers={"*.up_proj":null})', "awq", ["up_proj", "it is not quantized"]),
        ("fp16", "gptq", ["q_proj", "it is not quantized"]),
        ("rtn(group_size=16)", "ggml", ["'ggml'", "gptq, awq"]),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(half, tmp_path, steps, format, words):
    result = compression.compress(half, steps)

    with pytest.raises(LayerError) as caught:
        result.save(tmp_path / "out", format)

    assert [] == [word for word in words if word not in str(caught.value)], str(caught.value)
    assert [] == list(tmp_path.iterdir())
    assert format not in result.published_formats


def test_scales_that_fp16_would_round_are_refused(tmp_path):
    transformers_model("LlamaForCausalLM", hidden_size=64).save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), "rtn(group_size=16)")

    with pytest.raises(LayerError, match=r"fp16, which would round those of model\.layers\.0.*fp16 or bf16"):
        result.save(tmp_path / "out", "gptq")
    assert () == result.portable


def test_outputs_that_do_not_fill_whole_words_are_not_written(tmp_path):
    transformers_model("LlamaForCausalLM", dtype=torch.float16).save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), "rtn(bits=3,group_size=16)")

    with pytest.raises(LayerError, match="k_proj: 16 outputs of 3 bits"):
        result.save(tmp_path / "out", "gptq")


def test_a_format_is_chosen_on_the_command_line(half, tmp_path, capsys):
    from compression.__main__ import main

    arguments = ["rtn(group_size=32)", "--base", half, "--out", str(tmp_path / "out"), "--format", "awq", "--json"]
    assert 0 == main(arguments)
    assert "awq" == json.loads(capsys.readouterr().out)["format"]
    assert compression.load(tmp_path / "out").kernels()
    assert 2 == main(["nf4(group_size=32)", "--base", half, "--out", str(tmp_path / "nf4"), "--format", "awq"])
    assert "format awq cannot hold" in capsys.readouterr().err
