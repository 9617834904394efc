"""`python -m compression convert`, and what is listed of formats and engines."""

import json

import pytest
import torch
from checkpoints import logits, transformers_model

import compression
from compression.__main__ import main
from compression.architectures import decoder
from compression.checkpoints import weights
from compression.checkpoints.formats import registry as formats
from compression.commands.listing import Opening, holding, opening, spellings, spellings_of


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


def saved(half, steps, folder, format="own"):
    return compression.compress(half, steps).save(folder, format)


@pytest.mark.parametrize("first", ["own", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("second", ["own", "gptq", "compressed-tensors"])
def test_every_format_becomes_every_other(half, tmp_path, capsys, first, second):
    before = saved(half, "rtn(group_size=16,symmetric=true)", tmp_path / "in", first)

    assert 0 == main(["convert", str(before), str(tmp_path / "out"), "--format", second, "--json"])

    facts = json.loads(capsys.readouterr().out)
    assert (second, "rtn(group_size=16,symmetric=true)") == (facts["format"], facts["recipe"])
    assert facts["stored_bytes"] == weights.bytes_in((tmp_path / "out").glob("*.safetensors")) > 0
    one, other = compression.load(before), compression.load(tmp_path / "out")
    for name, layer in decoder.stored_layers(one.model).items():
        assert torch.equal(layer.dequantize(), other.model.get_submodule(name).dequantize())
    assert torch.equal(logits(one.model), logits(other.model))


@pytest.mark.parametrize(
    ("steps", "format"),
    [
        ("rtn(group_size=16,symmetric=true)", "gptq"),
        ("rtn(group_size=16)", "awq"),
        ("rtn(bits=8,group_size=-1)", "compressed-tensors"),
        ("rtn_fp", "compressed-tensors"),
    ],
)
def test_the_format_is_found_that_an_engine_opens(half, tmp_path, capsys, steps, format):
    saved(half, steps, tmp_path / "in")

    assert 0 == main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--engine", "vllm"])

    shown = capsys.readouterr().out
    assert f"format: {format}\n" in shown and "vllm opens it" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{in}"], ["two folders", "not 1"]),
        (["convert", "{in}", "{out}"], ["one of --format and --engine"]),
        (["convert", "{in}", "{out}", "--format", "awq", "--engine", "vllm"], ["one of --format and --engine"]),
        (["convert", "{in}", "{in}", "--format", "gptq"], ["already exists"]),
        (["convert", "{out}", "{out}2", "--format", "gptq"], ["no such folder"]),
        (["convert", "{in}", "{out}", "--format", "awq"], ["format awq cannot hold", "3 bits"]),
        (["convert", "{in}", "{out}", "--engine", "vllm"], ["no format holds this model for vllm", "not with 3"]),
        (["nf4", "{out}"], ["belongs to python -m compression convert"]),
        (["nf4", "--engine", "vllm", "--out", "{out}"], ["--engine belongs to python -m compression convert"]),
        (["nf4", "--formats", "--out", "{out}"], ["--formats belongs to python -m compression list"]),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(half, tmp_path, capsys, arguments, words):
    saved(half, "rtn(bits=3,group_size=16)", tmp_path / "in")
    places = {"in": tmp_path / "in", "out": tmp_path / "out"}

    assert 2 == main([each.format(**places) for each in arguments])

    said = " ".join(capsys.readouterr().err.split())
    assert [] == [word for word in words if word not in said], said
    assert ["in"] == [path.name for path in tmp_path.iterdir()]


def test_an_uncompressed_checkpoint_is_no_matter_of_a_format_of_quantized_layers(half, tmp_path, capsys):
    assert 2 == main(["convert", half, str(tmp_path / "out"), "--format", "compressed-tensors"])
    assert "has none; save it as it is" in capsys.readouterr().err


def test_the_bytes_of_a_gguf_file_are_counted(half, tmp_path, capsys):
    arguments = ["gguf(type=q8_0)", "--base", half, "--out", str(tmp_path / "out"), "--format", "gguf", "--json"]
    assert 0 == main(arguments)

    facts = json.loads(capsys.readouterr().out)
    assert (tmp_path / "out" / "model.gguf").stat().st_size == facts["stored_bytes"]
    assert 8 < facts["bits_per_parameter"] < 40  # embeddings and head are in 32 bits


def test_a_tokenizer_that_a_format_has_no_name_for_is_refused_before_anything_is_compressed(tmp_path, capsys):
    assert 2 == main(["gguf(type=q8_0)", "--base", "reference", "--out", str(tmp_path / "out"), "--format", "gguf"])

    assert "llama.cpp has no name" in capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())


def test_engines_are_those_of_the_formats():
    assert set(formats.ENGINES) == {each for name in formats.names()[1:] for each in formats.find(name).engines}


def test_what_is_listed_is_what_becomes_of_a_model(half):
    for steps in ("rtn(bits=4)", "rtn(bits=3,symmetric=true)", "hqq(bits=4)", "llm_int8", "rtn_fp"):
        listed = holding(steps, half if "(" not in steps else "reference")
        result = compression.compress("reference", steps)
        assert set(listed) - {"own"} == set(result.published_formats), steps
        opening = {engine for engines in listed.values() for engine, each in engines.items() if each.why is None}
        assert opening == set(result.portable), steps
    assert {"transformers": Opening(), "vllm": Opening()} == holding("magnitude")["own"]
    assert {} == holding("nf4")["own"]


def test_what_only_a_gpu_opens_is_listed_as_such():
    assert Opening(on_gpu=True) == holding("nf4")["bitsandbytes"]["vllm"]
    assert Opening() == holding("nf4")["bitsandbytes"]["transformers"]
    assert "transformers, vllm (GPU)" == opening(holding("nf4")["bitsandbytes"])


def test_a_method_is_listed_in_each_setting_that_decides_on_the_format():
    assert [f"gguf(type={each})" for each in ("q4_0", "q8_0")] == [
        each for each in spellings_of("gguf") if each.endswith(("q4_0)", "q8_0)"))
    ]
    assert "rtn(bits=4,group_size=32,symmetric=true)" in spellings_of("rtn")
    assert "llama.cpp" in holding("rtn(bits=4,group_size=32,symmetric=true)")["gguf"]


def test_the_list_of_formats_names_every_spelling(capsys):
    assert 0 == main(["list", "--formats", "--json"])

    listed = json.loads(capsys.readouterr().out)
    assert list(spellings()) == [each["recipe"] for each in listed]
    assert {"own", *(each for row in listed for each in row["formats"])} == set(formats.names())
