"""GGUF files opened as they are stored, and results written as one: the same bytes, the same values, or a refusal."""

import shutil

import gguf as library
import numpy as np
import pytest
import torch
from checkpoints import TOKENS, says, transformers_model
from gguf_files import SIZES, TEXT, opened_model, tokenizer_of, write

import compression
from compression import CheckpointError, LayerError
from compression.architectures import decoder
from compression.checkpoints.formats import gguf_tokenizer
from compression.layers.embedding import Embedding

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def content(path):
    """Type and bytes of every tensor, as the library sees them."""
    return {each.name: (each.tensor_type.name, each.data.tobytes()) for each in library.GGUFReader(path).tensors}


def values(path):
    """fp32 values of every tensor, as the library reads them."""
    return {each.name: library.quants.dequantize(each.data, each.tensor_type)
            for each in library.GGUFReader(path).tensors}  # fmt: skip


def compressed(tmp_path, recipe, name="LlamaForCausalLM", dtype=torch.bfloat16, tied=False, **sizes):
    transformers_model(name, tied=tied, dtype=dtype, **SIZES | sizes).save_pretrained(tmp_path / "base")
    return compression.compress(str(tmp_path / "base"), recipe)


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_opened_and_written_again_is_the_same_bytes(tmp_path, kind, tied):
    write(tmp_path / "a.gguf", kind, tied)

    opened = compression.load(tmp_path / "a.gguf")
    opened.save(tmp_path / "out", format="gguf")

    assert content(tmp_path / "a.gguf") == content(tmp_path / "out" / "model.gguf")
    assert sum(len(raw) for name, (_, raw) in content(tmp_path / "a.gguf").items() if "norm" not in name) == (
        opened.stored_bytes - sum(p.nbytes for name, p in opened.model.named_parameters() if "norm" in name)
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_layers_are_stored_and_stand_for_what_the_file_holds(tmp_path, tied):
    write(tmp_path / "a.gguf", "Q4_1", tied)

    opened, dense = compression.load(tmp_path / "a.gguf"), opened_model(tmp_path / "a.gguf")

    stored = decoder.stored_layers(opened.model)
    assert {"ggml Q4_1"} == {each.weight_part.words for each in stored.values() if not isinstance(each, Embedding)}
    assert 2 * 7 + 2 == len(stored)
    for name, layer in stored.items():
        assert torch.equal(dense.get_submodule(name).weight, layer.weight), name
    torch.testing.assert_close(dense(TOKENS).logits, opened.model(TOKENS).logits)
    told = {entry.name: entry.detail for entry in opened.report}
    assert "gguf, ggml Q4_1, kernel dequantize" == told["model.layers.1.mlp.down_proj"]
    assert "gguf, ggml Q4_1, kernel lookup" == told["model.embed_tokens"]
    assert ("gguf(type=q4_1)", "a.gguf", None) == (opened.recipe.text, opened.base[0], opened.tokenizer)


def test_a_result_of_a_file_is_saved_in_the_own_format_and_opened_again(tmp_path):
    write(tmp_path / "a.gguf", "Q8_0")
    opened = compression.load(tmp_path / "a.gguf")

    again = compression.load(opened.save(tmp_path / "own"))

    assert torch.equal(opened.model(TOKENS).logits, again.model(TOKENS).logits)
    assert opened.stored_bytes == again.stored_bytes


def test_a_folder_with_one_file_is_the_file(tmp_path):
    write(tmp_path / "a.gguf", "Q4_0")

    assert "gguf(type=q4_0)" == compression.load(tmp_path).recipe.text

    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=says("has 2 GGUF files, a.gguf the first", "--merge")):
        compression.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        compression.load(tmp_path)


def test_layers_of_several_types_have_a_recipe_that_names_them(tmp_path):
    write(tmp_path / "a.gguf", "Q4_0")
    compression.load(tmp_path / "a.gguf").save(tmp_path / "plain", format="gguf")
    base = compressed(tmp_path, "fp16", dtype=torch.float32)
    recipe = 'gguf(type=q4_0,layers={"*.v_proj":{"type":"q8_0"}})'
    mixed = compression.compress(str(tmp_path / "base"), recipe)

    again = compression.load(mixed.save(tmp_path / "mixed", format="gguf"))

    assert recipe == again.recipe.text
    assert "fp16" == compression.load(base.save(tmp_path / "dense", format="gguf")).recipe.text


def test_a_type_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    write(tmp_path / "a.gguf", "MXFP4")

    with pytest.raises(CheckpointError, match=says("is stored as MXFP4, which is not read", "Q6_K")):
        compression.load(tmp_path / "a.gguf")


# --- Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("steps", ["fp16", "gguf(type=q5_1)", "gguf"])
def test_a_written_file_opens_with_the_same_logits(tmp_path, name, tied, steps):
    result = compressed(tmp_path, steps, name, torch.float32, tied)

    path = result.save(tmp_path / "out", format="gguf")

    again = compression.load(path / "model.gguf")
    assert torch.equal(result.model(TOKENS).logits, again.model(TOKENS).logits)
    assert steps == again.recipe.text
    assert ["model.gguf"] == [each.name for each in path.iterdir()]


@pytest.mark.parametrize("steps", ["rtn(group_size=32,symmetric=true)", "rtn(bits=8,group_size=32,symmetric=true)",
                                    "gguf(type=q4_0)", "gguf(type=q8_0)", "fp16"])  # fmt: skip
def test_the_library_reads_the_values_that_the_layers_stand_for(tmp_path, steps):
    result = compressed(tmp_path, steps, "Qwen2ForCausalLM")

    found = values(result.save(tmp_path / "out", format="gguf") / "model.gguf")

    for number, block in enumerate(decoder.decoder_blocks(result.model)):
        paths = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
        for part, name in paths.items():
            layer = block.layer(name)
            weight = layer.weight if steps == "fp16" else layer.dequantize(torch.float32)
            assert np.array_equal(weight.float().numpy(), found[f"blk.{number}.{part}.weight"])
    assert np.array_equal(result.model.model.norm.weight.float().numpy(), found["output_norm.weight"])


def test_transformers_reads_what_is_written(tmp_path):
    from transformers import AutoModelForCausalLM

    result = compressed(tmp_path, "gguf(type=q8_0)", dtype=torch.float32)
    result.save(tmp_path / "out", format="gguf")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)

    torch.testing.assert_close(result.model(TOKENS).logits, theirs(TOKENS).logits)


def test_codes_count_as_a_format_that_llama_cpp_opens(tmp_path):
    result = compressed(tmp_path, "rtn(group_size=32,symmetric=true)")

    assert ("gptq", "awq", "compressed-tensors", "gguf") == result.published_formats
    assert {"vllm", "gptqmodel", "llama.cpp", "transformers"} == set(result.portable)


FITS = "what fits is the method gguf"
REFUSED = {
    "grid": ({"recipe": "rtn(group_size=32)"}, ["layers.0.self_attn.q_proj: it has no block type for 4 bits", FITS]),
    "group": ({"recipe": "rtn(group_size=16,symmetric=true)"}, ["4 bits in groups of 16", FITS]),
    "nf4": ({"recipe": "nf4(group_size=32)"}, ["it has no block type for", FITS]),
    "sparse": ({"recipe": "magnitude(store=bitmask)"}, ["it has no block type for a weight of kind sparse", FITS]),
    "embeddings": ({"recipe": "rtn(group_size=32,symmetric=true,embeddings=8)"}, ["model.embed_tokens: it has no"]),
    "scales": ({"recipe": "rtn(group_size=32,symmetric=true)", "dtype": torch.float32}, ["fp16", "would round"]),
    "architecture": ({"recipe": "fp16", "name": "Olmo2ForCausalLM"}, ["cannot hold Olmo2ForCausalLM", "LlamaFor"]),
    "window": ({"recipe": "fp16", "name": "MistralForCausalLM", "sliding_window": 8}, ["sliding window (8)"]),
    "positions": ({"recipe": "fp16", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                  ["scaled positions: rope_type 'dynamic'", "linear, yarn"]),
    "activation": ({"recipe": "fp16", "hidden_act": "gelu"}, ["hidden_act=silu, not gelu"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_in_a_file_is_refused_and_nothing_is_written(tmp_path, options, words):
    result = compressed(tmp_path, **options)

    with pytest.raises(LayerError, match=says(*words)):
        result.save(tmp_path / "out", format="gguf")

    assert not (tmp_path / "out").exists()
    assert "gguf" not in result.published_formats


# --- Tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gguf_tokenizer.STEPS)
def test_a_tokenizer_goes_with_the_file(tmp_path, name):
    tokenizer = tokenizer_of(name)
    transformers_model("LlamaForCausalLM", **SIZES | {"vocab_size": 320}).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    path = compression.compress(str(tmp_path / "base"), "gguf(type=q8_0)").save(tmp_path / "out", format="gguf")

    again = compression.load(path)
    assert tokenizer(TEXT).input_ids == again.tokenizer(TEXT).input_ids
    assert TEXT == again.tokenizer.decode(again.tokenizer(TEXT).input_ids)
    assert ("<s>", "</s>", "{{ messages }}") == (
        again.tokenizer.bos_token, again.tokenizer.eos_token, again.tokenizer.chat_template
    )  # fmt: skip
    assert (0, 1) == (again.model.generation_config.bos_token_id, again.model.generation_config.eos_token_id)
    reader = library.GGUFReader(path / "model.gguf")
    assert name == reader.get_field("tokenizer.ggml.pre").contents()


def strange():
    from tokenizers import pre_tokenizers

    return tokenizer_of("gpt-2", pre_tokenizer=pre_tokenizers.Whitespace())


def lower():
    from tokenizers import normalizers

    return tokenizer_of("gpt-2", normalizer=normalizers.Lowercase())


@pytest.mark.parametrize(
    ("make", "size", "words"),
    [
        (strange, 320, ["cuts text by", "Whitespace", "known are gpt-2, smollm"]),
        (lower, 320, ["normalizes text by Lowercase"]),
        (lambda: tokenizer_of("gpt-2"), 100, ["at most as many tokens as the model has rows, 100"]),
    ],
    ids=["cuts", "normalizer", "rows"],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(make, size, words):
    with pytest.raises(LayerError, match=says(*words)):
        gguf_tokenizer.described(make(), size)
