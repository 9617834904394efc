"""Checkpoints written in the published formats: read again, measured as they are, and what no format can hold."""

import json
import shutil

import pytest
import torch
from checkpoints import logits, transformers_model
from packed_layers import coded_linear

import compression
from compression import LayerError
from compression.architectures import decoder
from compression.numeric import packing


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


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
    assert format in result.published_formats and "gptqmodel" == result.portable[0]
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
    for name, layer in decoder.stored_layers(result.model).items():
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
        codes = packing.unpack(layer.weight_part.codes, 4, layer.in_features)
        part = layer.weight_part
        permuted = coded_linear(
            codes, part.parameters_of_grid(), layer.bias, part.grid, dtype=layer.dtype, permutation=order
        )
        result.model.set_submodule(name, permuted)
    assert ("gptq",) == result.published_formats

    again = compression.load(result.save(tmp_path / "out", "gptq"))

    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["desc_act"] is True
    for name, layer in decoder.stored_layers(result.model).items():
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


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("rtn(group_size=32,embeddings=8)", "leave embeddings=8 out"),
        ("nf4(group_size=32)", "evenly spaced levels"),
        ("structured(keep_layers=1)-nf4(group_size=32)", "evenly spaced levels"),
        ('rtn(group_size=32,layers={"*.down_proj":{"bits":8}})', "one setting for all layers"),
    ],
)
def test_a_format_that_cannot_hold_a_recipe_is_refused_before_any_weight_is_read(
    half, tmp_path, capsys, steps, words
):  # fmt: skip
    from compression.__main__ import main

    base = tmp_path / "base"
    shutil.copytree(half, base)
    (base / "model.safetensors").write_bytes(b"no tensors")

    assert 2 == main([steps, "--base", str(base), "--out", str(tmp_path / "out"), "--format", "gptq"])
    said = capsys.readouterr().err
    assert words in said
    assert "no tensors" not in said and "damaged" not in said
    assert ["base"] == sorted(path.name for path in tmp_path.iterdir())


# --- Measuring it as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["fp16", "rtn(group_size=32,symmetric=true)"])
def test_a_checkpoint_is_measured_as_it_is_beside_its_dequantized_weights(half, tmp_path, steps):
    from bench.session.options import Options
    from bench.session.session import Workbench

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

    assert (7 * 2 if asked.steps else 0) == len(decoder.stored_layers(measured.model))
    assert {} == decoder.stored_layers(workbench.base.model)
    for name, layer in decoder.stored_layers(result.model).items():
        assert torch.equal(layer.dequantize(), workbench.base.model.get_submodule(name).weight)


def test_a_published_checkpoint_is_multiplied_by_the_backend_that_is_asked_for(half, tmp_path):
    from bench.session.options import Options
    from bench.session.session import Workbench

    compression.compress(half, "rtn(group_size=32,symmetric=true)").save(tmp_path / "out", "gptq")
    own = "gptq(group_size=32,symmetric=true,act_order=false,static_groups=false"
    asked = compression.Recipe.parse(f"{own},backend=torch)")
    options = {"base": str(tmp_path / "out"), "recipes": (asked,), "prompt_tokens": 4, "new_tokens": 4}

    model = Workbench(Options(**options, journal=tmp_path / "journal.jsonl")).compressed(asked).model

    assert {"torch"} == {layer.backend for layer in decoder.stored_layers(model).values()}


def test_a_backend_that_cannot_take_a_stored_layer_is_refused(half, tmp_path):
    compression.compress(half, "rtn(group_size=32)").save(tmp_path / "out")

    with pytest.raises(compression.BackendError, match="backend='bitsandbytes' cannot take"):
        compression.load(tmp_path / "out", backend="bitsandbytes")
