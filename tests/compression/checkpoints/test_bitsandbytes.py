"""Checkpoints of bitsandbytes: those of transformers open here, ours open there, with the same weights."""

import json

import pytest
import torch
from checkpoints import change_tensors, logits, rewrite, says, transformers_model
from safetensors.torch import load_file

import compression
from compression import CheckpointError, LayerError
from compression.architectures import decoder

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "model.layers.0.mlp.up_proj"
STEPS = ["nf4", "nf4(double_quant=false,group_size=128)", "llm_int8", "llm_int8(threshold=4.0)"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    return str(folder)


def theirs(weight):
    """What bitsandbytes makes of a stored weight."""
    from bitsandbytes import functional

    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * (weight.SCB / 127)[:, None] if weight.CB is not None else weight.data.float()


@pytest.mark.parametrize("steps", STEPS)
def test_what_is_written_opens_with_the_same_weights(half, tmp_path, steps):
    result = compression.compress(half, steps)

    again = compression.load(result.save(tmp_path / "out", "bitsandbytes"))

    assert steps == again.recipe.text
    assert {"transformers", "vllm"} == set(result.portable)
    for name, layer in decoder.stored_layers(result.model).items():
        assert torch.equal(layer.dequantize(), again.model.get_submodule(name).dequantize()), name
        assert type(layer.input_part) is type(again.model.get_submodule(name).input_part)
    assert torch.equal(logits(result.model), logits(again.model))


@pytest.mark.parametrize("steps", STEPS[:2])
def test_transformers_opens_it_with_the_same_weights(half, tmp_path, steps):
    from transformers import AutoModelForCausalLM

    result = compression.compress(half, steps)
    opened = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out", "bitsandbytes"), dtype=torch.bfloat16)

    assert "bitsandbytes" in str(type(opened.get_submodule(NAME)))
    for name, layer in decoder.stored_layers(result.model).items():
        assert torch.equal(layer.dequantize(), theirs(opened.get_submodule(name).weight)), name


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_that_transformers_quantized_opens_with_its_weights(half, tmp_path, double):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(half, quantization_config=config, dtype=torch.bfloat16)
    expected = {
        name: theirs(module.weight) for name, module in model.named_modules() if "Linear4bit" in str(type(module))
    }
    model.save_pretrained(tmp_path / "out")

    opened = compression.load(tmp_path / "out")

    assert f"nf4{'' if double else '(double_quant=false)'}" == opened.recipe.text
    assert expected.keys() == decoder.stored_layers(opened.model).keys()
    for name, weight in expected.items():
        assert torch.equal(weight, opened.model.get_submodule(name).dequantize()), name


@pytest.mark.parametrize("steps", STEPS)
def test_there_and_back_every_tensor_is_the_same_bytes(half, tmp_path, steps):
    compression.compress(half, steps).save(tmp_path / "1", "bitsandbytes")
    compression.load(tmp_path / "1").save(tmp_path / "2", "own")
    compression.load(tmp_path / "2").save(tmp_path / "3", "bitsandbytes")

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "13")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


STATE = f"{NAME}.weight.quant_state.bitsandbytes__nf4"


def with_state(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(STATE), ["missing", STATE]),
        (lambda t: t.update({STATE: torch.tensor([123], dtype=torch.uint8)}), [NAME]),
        (with_state(shape=[1, 2]), [NAME, "of shape [256, 128]"]),
        (with_state(blocksize=96), [NAME, "group_size=96 does not divide"]),
        (with_state(blocksize=True), [NAME, "blocksize=True"]),
        (with_state(nested_blocksize=64), [NAME, "must be 256"]),
        (with_state(quant_type="fp4"), [NAME, "NF4"]),
        (lambda t: t[f"{NAME}.weight.quant_map"].add_(1), [NAME, "other levels"]),
        (lambda t: t[f"{NAME}.weight.nested_quant_map"].add_(1), [NAME, "other levels"]),
        (lambda t: t.update({f"{NAME}.weight.absmax": t[f"{NAME}.weight.absmax"][:3]}), [NAME, "blocks make it"]),
        (lambda t: t[f"{NAME}.weight.nested_absmax"].fill_(float("nan")), [NAME, "absmax_scales"]),
    ],
)
def test_tensors_that_are_damaged_are_refused_by_name(half, tmp_path, change, words):
    compression.compress(half, "nf4").save(tmp_path / "out", "bitsandbytes")
    change_tensors(tmp_path / "out", change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": False}, ["load_in_4bit and load_in_8bit"]),
        ({"bnb_4bit_quant_type": "fp4"}, ["bnb_4bit_quant_type='fp4'"]),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ["bnb_4bit_quant_storage"]),
        ({"bnb_4bit_use_double_quant": "yes"}, ["bnb_4bit_use_double_quant"]),
        ({"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": -1}, ["llm_int8_threshold=-1"]),
    ],
)
def test_descriptions_that_are_not_read_are_refused_by_field(half, tmp_path, changes, words):
    compression.compress(half, "nf4").save(tmp_path / "out", "bitsandbytes")
    path = tmp_path / "out" / "config.json"
    rewrite(path, quantization_config=json.loads(path.read_text())["quantization_config"] | changes)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("rtn", ["q_proj", "NF4 and LLM.int8()"]),
        ("nf4(embeddings=8)", ["leave embeddings=8 out"]),
        ('nf4(layers={"*.up_proj":{"double_quant":false}})', ["layers of one kind"]),
        ("magnitude", ["no quantized layer"]),
    ],
)
def test_what_it_cannot_hold_is_refused_before_anything_is_written(half, tmp_path, steps, words):
    result = compression.compress(half, steps)

    with pytest.raises(LayerError, match=says(*words)):
        result.save(tmp_path / "out", "bitsandbytes")
    assert not (tmp_path / "out").exists()
