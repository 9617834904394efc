"""The format compressed-tensors: activations under numbers that calibration text gave, beside those of the library."""

import json

import pytest
import torch
from checkpoints import change_tensors, logits, says, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import gaussian, seeds

import compression
from compression import CheckpointError, LayerError
from compression.architectures import decoder
from compression.checkpoints.formats.compressed_tensors import store_of
from compression.checkpoints.formats.compressed_tensors_config import FLOAT, INT, NVFP4, Scheme
from compression.checkpoints.formats.compressed_tensors_format import _activations
from compression.layers.activations import TokenRange

FEW = "samples=8,sequence_length=16"
RECIPES = [f"int8(activations=static,{FEW})", f"fp8(activations=static,{FEW})", f"nvfp4({FEW})"]
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def written(half, tmp_path_factory):
    """Each recipe's result and its folder."""
    found = {}
    for steps in RECIPES:
        result = compression.compress(half, steps, calibration="random")
        found[steps] = result, result.save(tmp_path_factory.mktemp("written") / "out", "compressed-tensors")
    return found


@pytest.mark.parametrize("steps", RECIPES)
def test_a_written_checkpoint_opens_with_the_same_logits_and_is_converted_back(written, tmp_path, steps):
    result, folder = written[steps]

    again = compression.load(folder)
    again.save(tmp_path / "own")

    assert torch.equal(logits(result.model), logits(again.model))
    assert torch.equal(logits(result.model), logits(compression.load(tmp_path / "own").model))
    assert steps == again.recipe.text
    assert {"vllm", "transformers"} == set(result.portable)


@pytest.mark.parametrize("steps", RECIPES)
def test_without_a_recipe_it_is_called_by_its_grid(written, tmp_path, steps):
    result, _ = written[steps]
    result.save(tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    assert steps.replace(f",{FEW}", "").replace(f"({FEW})", "") == compression.load(tmp_path / "out").recipe.text


CHANNEL = {"bits": 8, "symmetric": True, "strategy": "channel"}
SCHEMES = {
    "int8-static": Scheme(format=INT, float=False, activations="int8-static", **CHANNEL),
    "fp8-static": Scheme(format=FLOAT, float=True, activations="fp8-static", **CHANNEL),
    "nvfp4": Scheme(format=NVFP4, bits=4, float=True, symmetric=True, strategy="tensor_group", group_size=16,
                    activations="nvfp4"),
}  # fmt: skip


def part_of(scheme, value):
    """What stands at the input where a checkpoint has that number."""
    store = store_of(scheme)
    part = store.input_part()
    (name,) = [key for key, each in store.input_tensors.items() if not each.optional]
    ((key, number),) = store.read_input({name: value.reshape(1)}).items()
    setattr(part, key, number)
    assert torch.equal(store.write_input(part)[name], value.float().reshape(1))
    return part


@settings(max_examples=25)
@given(seeds, st.sampled_from(list(SCHEMES)), st.sampled_from([1e-3, 1.0, 50.0]))
def test_rounded_activations_are_those_of_the_library_to_the_bit(seed, kind, size):
    """Within the range of the calibration text; int8 beyond it differs as the module says."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    x, args = gaussian(5, 64, seed=seed) * size, QuantizationArgs(**_activations(SCHEMES[kind]))
    top = x.abs().max()
    if kind == "nvfp4":
        whole = generate_gparam(-top.reshape(1), top.reshape(1))
        scale, zero = compute_dynamic_scales_and_zp(
            value=x, args=args, module=torch.nn.Linear(64, 4), global_scale=whole
        )
        theirs = fake_quantize(x=x, scale=scale, zero_point=zero, args=args, global_scale=whole)
    else:
        whole = (top / (127 if kind == "int8-static" else 448)).reshape(1)
        theirs = fake_quantize(x=x, scale=whole, zero_point=None, args=args)

    assert torch.equal(theirs, part_of(SCHEMES[kind], whole)(x))


@pytest.mark.process
@pytest.mark.parametrize("steps", RECIPES[:2])
def test_transformers_computes_what_we_do(tmp_path, steps):
    """In fp32, where what activations lose is not hidden by the dtype; the library unpacks NVFP4 to bf16 alone."""
    from transformers import AutoModelForCausalLM

    base = str(tmp_path / "base")
    transformers_model("LlamaForCausalLM", hidden_size=64).save_pretrained(base)
    result = compression.compress(base, steps, calibration="random")
    theirs = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out", "compressed-tensors"))
    own, their = logits(result.model).float(), logits(theirs).float()
    for layer in decoder.stored_layers(result.model).values():
        layer.input_part = None

    assert (own - their).norm() < 0.05 * (logits(result.model).float() - their).norm()


@pytest.mark.process
def test_transformers_opens_nvfp4_with_the_same_numbers(written):
    from transformers import AutoModelForCausalLM

    result, folder = written[RECIPES[2]]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs(torch.arange(4)[None])  # weights are made dense at the first one

    for name, layer in decoder.stored_layers(result.model).items():
        their = theirs.get_submodule(name)
        assert torch.equal(layer.dequantize(), their.weight)
        assert layer.input_part.whole == their.input_global_scale


def test_a_checkpoint_of_others_has_scales_of_the_model_and_zero_points(written, tmp_path):
    """As llm-compressor writes them."""
    result, _ = written[RECIPES[0]]
    result.save(tmp_path / "out", "compressed-tensors")

    def change(tensors):
        for name in [name for name in tensors if name.endswith("input_scale")]:
            tensors[name] = tensors[name].bfloat16()
            tensors[name.replace("scale", "zero_point")] = torch.zeros(1, dtype=torch.int8)

    change_tensors(tmp_path / "out", change)

    opened = decoder.stored_layers(compression.load(tmp_path / "out").model)
    for name, layer in decoder.stored_layers(result.model).items():
        assert layer.input_part.step.bfloat16() == opened[name].input_part.step


def test_a_fused_layer_has_one_scale_of_its_inputs(tmp_path):
    transformers_model("Phi3ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), RECIPES[0], calibration="random")
    folder = result.save(tmp_path / "out", "compressed-tensors")

    assert "model.layers.0.self_attn.qkv_proj.input_scale" in load_file(folder / "model.safetensors")
    assert torch.equal(logits(result.model), logits(compression.load(folder).model))
    layer = next(layer for name, layer in decoder.stored_layers(result.model).items() if "k_proj" in name)
    layer.input_part.step = layer.input_part.step * 2
    with pytest.raises(LayerError, match="the inputs of its parts have scales of their own"):
        result.save(tmp_path / "again", "compressed-tensors")


@pytest.mark.parametrize(
    ("steps", "change", "words"),
    [
        (RECIPES[0], lambda t: t.pop(f"{LAYER}.input_scale"), ["missing", f"{LAYER}.input_scale"]),
        (RECIPES[0], lambda t: t[f"{LAYER}.input_scale"].zero_(), [LAYER, "must be above 0"]),
        (RECIPES[0], lambda t: t[f"{LAYER}.input_scale"].fill_(float("nan")), [LAYER, "above 0"]),
        (RECIPES[1], lambda t: t.update({f"{LAYER}.input_scale": torch.ones(2)}), ["input_scale", "shape (2,)"]),
        (RECIPES[0], lambda t: t.update({f"{LAYER}.input_zero_point": torch.ones(1, dtype=torch.int8)}),
         [LAYER, "input_zero_point is not 0"]),
        (RECIPES[2], lambda t: t.pop(f"{LAYER}.input_global_scale"), ["missing", "input_global_scale"]),
    ],
)  # fmt: skip
def test_numbers_that_are_damaged_are_refused_by_name(written, tmp_path, steps, change, words):
    written[steps][0].save(tmp_path / "out", "compressed-tensors")
    change_tensors(tmp_path / "out", change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "words"), [(TokenRange(4), "not activations in 4 bits"), (TokenRange(clip=0.9), "cut off at 0.9")]
)
def test_activations_in_other_bits_or_cut_off_are_not_written(written, tmp_path, part, words):
    again = compression.load(written[RECIPES[0]][1])
    for layer in decoder.stored_layers(again.model).values():
        layer.input_part = part
    with pytest.raises(LayerError, match=says("q_proj", "int8, fp8, mxfp4 and nvfp4", words)):
        again.save(tmp_path / "out", "compressed-tensors")
