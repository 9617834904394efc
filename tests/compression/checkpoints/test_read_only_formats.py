"""Checkpoints of hqq and torchao: opened with the weights that their layouts stand for, or refused by name."""

import json

import pytest
import torch
from block_by_block import tensors
from checkpoints import logits, rewrite, says
from read_only_formats import (
    NAME,
    change_stored,
    hqq_config,
    hqq_layer,
    hqq_setting,
    published,
    torchao_config,
    torchao_layer,
)
from safetensors.torch import load_file

import compression
from compression import CheckpointError, LayerError
from compression.__main__ import main
from compression.architectures import decoder
from compression.checkpoints.formats import registry as formats
from compression.commands import listing


def opened(folder, weights):
    """What `compression.load` makes of it, each layer compared with what it stands for, rounded once from fp32."""
    result = compression.load(folder)
    layers = decoder.stored_layers(result.model)
    assert weights.keys() == layers.keys()
    for name, layer in layers.items():
        exact = layer.weight_part.value(torch.float32)
        assert torch.equal(exact.to(layer.dtype), layer.dequantize()), name
        assert torch.allclose(weights[name], exact.double(), rtol=2**-20, atol=1e-7), name
    return result


def test_weights_without_a_rounding_are_the_same_numbers(tmp_path):
    """Scales of one bit and zero points of a few make exact products."""

    def quantize(name, weight):
        stored, _, said = hqq_layer(weight, hqq_setting())
        stored["scale"].fill_(0.125)
        stored["zero"] = (stored["zero"] * 4).round() / 4
        return None if name == "lm_head" else (stored, weight, said)

    weights = published(tmp_path / "in", hqq_config(hqq_setting()), quantize)
    layer = decoder.stored_layers(compression.load(tmp_path / "in").model)[NAME]
    stored = load_file(tmp_path / "in" / "model.safetensors")
    words, zero = stored[f"{NAME}.W_q"], stored[f"{NAME}.zero"]
    codes = torch.cat([words >> 4, words & 15])
    assert NAME in weights
    assert torch.equal((0.125 * (codes - zero)).view(128, 64).to(torch.bfloat16), layer.dequantize())


@pytest.mark.parametrize("view", [None, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "size"), [(8, 16), (4, 64), (4, None), (3, 32), (2, 16)])
def test_hqq_layers_of_every_packing_open(tmp_path, bits, size, view):
    setting = hqq_setting(bits, size, view_as_float=view is not None)
    weights = published(tmp_path / "in", hqq_config(setting), lambda name, weight: (
        None if name == "lm_head" else hqq_layer(weight, setting, view=view)))  # fmt: skip

    result = opened(tmp_path / "in", weights)

    step = result.recipe.steps[0].method
    assert (1, "hqq", bits, size or -1) == (len(result.recipe.steps), step.info.name, step.bits, step.group_size)
    again = compression.load(result.save(tmp_path / "own"))
    assert result.recipe.text == again.recipe.text and torch.equal(logits(result.model), logits(again.model))


def test_hqq_layers_have_settings_by_their_tags(tmp_path):
    settings = {"self_attn.q_proj": hqq_setting(8, 16), "mlp.up_proj": hqq_setting(3, 32)}
    tags = {f"model.layers.0.{tag}": setting for tag, setting in settings.items()}
    weights = published(tmp_path / "in", hqq_config(settings),
                        lambda name, weight: hqq_layer(weight, tags[name]) if name in tags else None)  # fmt: skip

    result = opened(tmp_path / "in", weights)

    assert tags.keys() == weights.keys()
    assert "down_proj" in result.recipe.text and "hqq(bits=" in result.recipe.text


AO = [
    ("Int8WeightOnlyConfig", {}, {}, "rtn(bits=8,group_size=-1,symmetric=true)"),
    ("Int8WeightOnlyConfig", {}, {"block": (1, 32)}, "rtn(bits=8,group_size=32,symmetric=true)"),
    ("Int8WeightOnlyConfig", {}, {"block": (16, 16)}, "rtn(bits=8,group_size=16,symmetric=true)"),
    ("Float8WeightOnlyConfig", {}, {"kind": "Float8Tensor"}, "rtn_fp"),
    ("IntxWeightOnlyConfig", {}, {"kind": "IntxUnpackedToInt8Tensor", "bits": 4, "block": (1, 32),
                                  "scales": torch.bfloat16}, "rtn(group_size=32,symmetric=true)"),
    ("IntxWeightOnlyConfig", {"mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}},
     {"kind": "IntxUnpackedToInt8Tensor", "bits": 3, "block": (1, 16), "zeros": True}, "rtn(bits=3,group_size=16)"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "data", "layer", "text"), AO)
def test_torchao_layers_of_every_class_open(tmp_path, config, data, layer, text):
    weights = published(tmp_path / "in", torchao_config(config, **data),
                        lambda name, weight: None if name == "lm_head" else torchao_layer(weight, **layer))  # fmt: skip

    assert text == opened(tmp_path / "in", weights).recipe.text


def test_torchao_layers_of_one_scale_open(tmp_path):
    weights = published(tmp_path / "in", torchao_config(),
                        lambda name, weight: torchao_layer(weight, block=tuple(weight.shape)))  # fmt: skip

    assert "rtn(bits=8,group_size=-1,symmetric=true)" == opened(tmp_path / "in", weights).recipe.text


def test_torchao_layers_have_settings_by_name(tmp_path):
    inner = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    config = torchao_config("FqnToConfig", 1, fqn_to_config={"_default": inner, NAME: inner, "lm_head": None})
    blocks = {NAME: (1, 16)}
    weights = published(tmp_path / "in", config, lambda name, weight: (
        None if name == "lm_head" else torchao_layer(weight, block=blocks.get(name))))  # fmt: skip

    text = opened(tmp_path / "in", weights).recipe.text

    assert f'rtn(bits=8,group_size=-1,symmetric=true,layers={{"{NAME}":{{"group_size":16}}}})' == text


def test_int8_of_torchao_becomes_compressed_tensors_with_the_same_numbers(tmp_path):
    config = torchao_config()
    published(tmp_path / "in", config, lambda name, weight: None if name == "lm_head" else torchao_layer(weight))

    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert 0 == main(["convert", *arguments])

    one, other = compression.load(tmp_path / "in"), compression.load(tmp_path / "out")
    assert one.recipe.text == other.recipe.text and torch.equal(logits(one.model), logits(other.model))
    before, after = (tensors(tmp_path / each) for each in ("in", "out"))
    for name, layer in decoder.stored_layers(other.model).items():
        assert torch.equal(layer.dequantize(), one.model.get_submodule(name).dequantize())
        assert torch.equal(before[f"{name}._weight_scale"], after[f"{name}.weight_scale"])
        packed = after[f"{name}.weight_packed"].view(torch.uint8).view(layer.out_features, -1)
        assert torch.equal(before[f"{name}._weight_qdata"].view(torch.uint8) ^ 128, packed)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hqq(tmp_path):
    setting = hqq_setting()
    published(
        tmp_path / "in", hqq_config(setting), lambda name, w: hqq_layer(w, setting) if name != "lm_head" else None
    )
    return tmp_path / "in"


@pytest.fixture
def torchao(tmp_path):
    published(tmp_path / "in", torchao_config(), lambda name, w: torchao_layer(w) if name != "lm_head" else None)
    return tmp_path / "in"


def set_to(name, value):
    return lambda tensors, metadata: tensors.update({f"{NAME}.{name}": value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop(f"{NAME}.W_q"), ["missing", f"{NAME}.W_q"]),
        (lambda t, m: t.pop(f"{NAME}.zero"), ["missing", f"{NAME}.zero"]),
        (set_to("weight", torch.zeros(128, 64)), [NAME, "stored twice"]),
        (set_to("W_q", torch.zeros(100, 32, dtype=torch.uint8)), [NAME, "(100, 32)", "4 bits, groups of 32"]),
        (set_to("W_q", torch.zeros(128, 32, dtype=torch.int8)), [NAME, "torch.int8"]),
        (set_to("W_q", torch.zeros(128, 16, dtype=torch.float16)), [NAME, "view_as_float is 0", "make it 1"]),
        (
            lambda t, m: t.update({f"{NAME}.W_q": torch.zeros(128, 16), f"{NAME}.view_as_float": torch.tensor(1)}),
            [NAME, "torch.float32 of shape (128, 16)", "not the bytes of 128 x 32 numbers"],
        ),
        (set_to("scale", torch.full((256, 1), torch.inf)), [NAME, "scales"]),
        (set_to("scale", torch.ones(256, 1, dtype=torch.int32)), [NAME, "scale", "torch.int32"]),
        (set_to("shape", torch.tensor([64, 128])), [NAME, "shape is [64, 128]"]),
        (set_to("nbits", torch.tensor(8)), [NAME, "nbits is 8", "make it 4"]),
        (set_to("group_size", torch.tensor(64)), [NAME, "group_size is 64"]),
        (set_to("axis", torch.tensor(0)), [NAME, "axis is 0"]),
        (set_to("view_as_float", torch.tensor(1)), [NAME, "view_as_float is 1"]),
        (set_to("quant_zero", torch.tensor(1)), [NAME, "quant_zero is 1"]),
        (set_to("packing", torch.tensor([52], dtype=torch.uint8)), [NAME, "packing is b'4'", "4bit_u8"]),
        (set_to("zero_scale", torch.ones(2)), ["unknown", "zero_scale"]),
    ],
)
def test_hqq_tensors_that_are_damaged_are_refused_by_name(hqq, change, words):
    change_stored(hqq, change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(hqq)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hqq_config([]), ["quant_config must be a table"]),
        (hqq_config(hqq_setting(), skipped=[1]), ["skip_modules"]),
        (hqq_config({"mlp.up_proj": 4}), ["quant_config.mlp.up_proj must be a table"]),
        (hqq_config({"mlp.upproj": hqq_setting(), "mlp.up_proj": hqq_setting()}), ["upproj", "no linear layer"]),
        (hqq_config(hqq_setting() | {"offload_meta": True}), ["offload_meta"]),
        (hqq_config(hqq_setting(1)), ["nbits=1", "2, 3, 4, 8"]),
        (hqq_config(hqq_setting(True)), ["nbits=True"]),
        (hqq_config(hqq_setting(size=4)), ["group_size=4"]),
        (hqq_config(hqq_setting(size=48)), ["does not divide", "two outputs share"]),
        (hqq_config(hqq_setting(axis=0)), ["axis=0", "axis=1"]),
        (hqq_config(hqq_setting(channel_wise=False)), ["channel_wise"]),
        (hqq_config(hqq_setting(), skipped=[]), ["lm_head", "stored as a dense weight"]),
    ],
)
def test_hqq_descriptions_that_are_not_read_are_refused_by_field(hqq, config, words):
    rewrite(hqq / "config.json", quantization_config=config)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(hqq)


def of_layer(**changes):
    def change(tensors, metadata):
        said = metadata[f"{NAME}.weight"]
        for key, value in changes.items():
            (said if key.startswith("_") else said["_data"])[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop(f"{NAME}._weight_scale"), ["missing", f"{NAME}._weight_scale"]),
        (lambda t, m: t.pop(f"{NAME}._weight_qdata"), ["missing", f"{NAME}._weight_qdata"]),
        (set_to("_weight_scale", torch.ones(64, 1)), [NAME, "_weight_scale has shape (64, 1)"]),
        (set_to("_weight_qdata", torch.zeros(128, 64, dtype=torch.uint8)), [NAME, "torch.uint8"]),
        (set_to("_weight_zero_point", torch.ones(128, 1, dtype=torch.int8)), [NAME, "zero points other than 0"]),
        (set_to("_weight_act_quant_scale", torch.ones(1)), ["unknown", "act_quant_scale"]),
        (set_to("weight", torch.ones(128, 64)), [NAME, "stored twice"]),
        (lambda t, m: m.pop("tensor_names"), ["no tensor_names"]),
        (lambda t, m: m.update(tensor_names="layer"), ["tensor_names"]),
        (lambda t, m: m.update(tensor_names={"a": 1}), ["must be a list of names"]),
        (lambda t, m: m.pop(f"{NAME}.weight"), [NAME, "does not say what it is"]),
        (lambda t, m: m.update({f"{NAME}.weight": [1]}), [NAME, "no table"]),
        (lambda t, m: m.update({f"{NAME}.weight": "{"}), [NAME, "not JSON"]),
        (lambda t, m: m.update({"model.norm.weight": m[f"{NAME}.weight"]}), ["model.norm", "no linear layer"]),
        (of_layer(_type="NVFP4Tensor"), [NAME, "'NVFP4Tensor'", "makes Int8Tensor"]),
        (of_layer(_type=["Int8Tensor"]), [NAME, "is of class ['Int8Tensor']"]),
        (of_layer(_type="Float8Tensor"), [NAME, "'Float8Tensor'", "makes Int8Tensor"]),
        (of_layer(_tensor_data_names=["qdata", "act_pre_scale"]), [NAME, "act_pre_scale"]),
        (of_layer(_tensor_data_names="qdata"), [NAME, "_tensor_data_names"]),
        (of_layer(act_quant_kwargs={"granularity": 1}), [NAME, "act_quant_kwargs", "another model"]),
        (of_layer(block_size=[1]), [NAME, "block_size"]),
        (of_layer(block_size=[1, True]), [NAME, "block_size"]),
        (of_layer(block_size=[1, 48]), [NAME, "does not divide"]),
        (of_layer(block_size=[1, 32]), [NAME, "_weight_scale has shape (128, 1)"]),
    ],
)
def test_torchao_tensors_and_metadata_that_are_damaged_are_refused_by_name(torchao, change, words):
    change_stored(torchao, change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(torchao)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_type": "int4_weight_only"}, ["quant_type='int4_weight_only'", "pickles"]),
        ({"quant_type": {"a": 1, "b": 2}}, ["one setting, default"]),
        (torchao_config("Int8DynamicActivationInt8WeightConfig"), ["activations are quantized too"]),
        (torchao_config("UIntXWeightOnlyConfig"), ["'UIntXWeightOnlyConfig' is not read", "Float8WeightOnlyConfig"]),
        (torchao_config(["Int8WeightOnlyConfig"]), ["quant_type ['Int8WeightOnlyConfig'] is not read"]),
        (torchao_config(version=3), ["_version=3", "read is 2"]),
        (torchao_config("FqnToConfig", fqn_to_config={}), ["FqnToConfig", "to each name"]),
        (torchao_config("Float8WeightOnlyConfig"), ["'Int8Tensor'", "makes Float8Tensor"]),
    ],
)
def test_torchao_descriptions_that_are_not_read_are_refused_by_field(torchao, config, words):
    rewrite(torchao / "config.json", quantization_config=torchao_config() | config)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(torchao)


@pytest.mark.parametrize("kind", ["Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"])
def test_the_int4_layouts_of_gpus_are_refused_with_what_to_take(torchao, kind):
    rewrite(torchao / "config.json", quantization_config=torchao_config("Int4WeightOnlyConfig"))

    def change(tensors, metadata):
        for each in metadata.values():
            if isinstance(each, dict) and each["_type"] == "Int8Tensor":
                each["_type"] = kind

    change_stored(torchao, change)

    with pytest.raises(CheckpointError, match=says(kind, "offsets", "IntxWeightOnlyConfig")):
        compression.load(torchao)


@pytest.mark.parametrize("name", ["hqq", "torchao"])
def test_a_file_that_is_cut_off_and_pickles_are_refused(request, name):
    folder = request.getfixturevalue(name)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=says("model.safetensors is damaged or not safetensors")):
            compression.load(folder)
    path.rename(folder / ("qmodel.pt" if name == "hqq" else "pytorch_model.bin"))

    with pytest.raises(CheckpointError, match=says("can run code when opened and is not read")):
        compression.load(folder)


@pytest.mark.parametrize("name", ["hqq", "torchao"])
def test_a_format_that_is_read_is_not_written_and_says_what_to_take(request, tmp_path, capsys, monkeypatch, name):
    result = compression.load(request.getfixturevalue(name))

    assert name in formats.read_only() and name not in formats.names() and name not in result.published_formats
    assert "read, not written; take" in formats.find(name).accepts(result.model.get_submodule(NAME))
    with pytest.raises(LayerError, match=says(name, "read, not written; take", "own")):
        result.save(tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(listing, "spellings", tuple)
    assert 0 == main(["list", "--formats"])
    assert f"{name}: read, not written; take " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "full"), [("hqq", "hqq(group_size=32)"), ("torchao", "rtn(bits=8")])
def test_as_a_base_it_is_refused_unless_dequantized(request, name, full):
    folder = request.getfixturevalue(name)

    with pytest.raises(CheckpointError, match=says("already quantized", name, "dequantize=True")):
        compression.compress(str(folder), "rtn(group_size=16)")
    with pytest.raises(CheckpointError, match="already quantized"):
        compression.open_base(str(folder))
    dense, stored = compression.open_base(str(folder), dequantize=True), compression.load(folder)
    assert not decoder.stored_layers(dense.model) and full in stored.recipe.text
    assert torch.equal(dense.model.get_submodule(NAME).weight, stored.model.get_submodule(NAME).dequantize())


def test_hqq_is_held_by_no_format_but_our_own(hqq, tmp_path, capsys):
    assert () == compression.load(hqq).published_formats
    assert 2 == main(["convert", str(hqq), str(tmp_path / "out"), "--engine", "vllm"])
    assert "no format holds this model for vllm" in capsys.readouterr().err
    assert 0 == main(["convert", str(hqq), str(tmp_path / "out"), "--format", "own", "--json"])
    assert "hqq(group_size=32)" == json.loads(capsys.readouterr().out)["recipe"]
