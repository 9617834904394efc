"""The format compressed-tensors beside the library of that name: single layers bit for bit, and whole checkpoints."""

import json

import pytest
import torch
from checkpoints import change_tensors, logits, rewrite, says, transformers_model
from hypothesis import given
from hypothesis import strategies as st
from published import random_layer
from safetensors.torch import load_file
from strategies import gaussian, seeds

import compression
from compression import CheckpointError, LayerError, RecipeError
from compression.architectures import decoder
from compression.checkpoints.formats import compressed_tensors, compressed_tensors_config
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats.compressed_tensors_config import FLOAT, INT, MXFP4, NVFP4, PACKED, Scheme, parse
from compression.checkpoints.formats.recipes import check_recipe
from compression.layers.activations import TokenRange
from compression.layers.codes import Codes
from compression.layers.dense import Dense
from compression.layers.kernels.integer_products import exact_here
from compression.layers.linear import Linear

ROWS, COLS = 24, 64
LAYER = "model.layers.0.mlp.up_proj"


@st.composite
def schemes(draw):
    format = draw(st.sampled_from((PACKED, INT, FLOAT, NVFP4, MXFP4)))
    if format in (NVFP4, MXFP4):
        size, strategy = (16, "tensor_group") if format == NVFP4 else (32, "group")
        return Scheme(format=format, bits=4, float=True, symmetric=True, strategy=strategy, group_size=size)
    strategy = draw(st.sampled_from(("tensor", "channel", "group", "block") if format == FLOAT else
                                    ("channel", "group")))  # fmt: skip
    return Scheme(
        format=format,
        bits=draw(st.integers(2, 8)) if format == PACKED else 8,
        float=format == FLOAT,
        symmetric=format == FLOAT or draw(st.booleans()),
        strategy=strategy,
        group_size=16 if strategy == "group" else None,
        block=(8, 16) if strategy == "block" else None,
    )


def library_scheme(scheme):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme.bits, type="float" if scheme.float else "int", symmetric=scheme.symmetric,
        strategy=scheme.strategy, group_size=scheme.group_size,
        block_structure=None if scheme.block is None else list(scheme.block),
    )  # fmt: skip
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressor(scheme):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(scheme.format)


def library_tensors(scheme, seed):
    """What the library stores of a seeded bf16 layer."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight, theirs = gaussian(ROWS, COLS, seed=seed).bfloat16(), library_scheme(scheme)
    state, extra = {"weight": weight}, {}
    if scheme.format == NVFP4:
        extra["global_scale"] = state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
    low, high = (grouped(getattr(weight, name), scheme) for name in ("amin", "amax"))
    scale, zero = calculate_qparams(low, high, theirs.weights, **extra)
    state["weight_scale"] = scale
    if not scheme.symmetric:
        state["weight_zero_point"] = zero
    return compressor(scheme).compress(state, theirs)


def grouped(reduce, scheme):
    """Extremes of what shares a scale, in the shape of the scales."""
    weight = reduce.__self__
    if scheme.strategy == "tensor":
        return reduce().reshape(1)
    if scheme.strategy == "channel":
        return reduce(-1, keepdim=True)
    if scheme.block:
        blocks = weight.view(ROWS // 8, 8, COLS // 16, 16)
        return getattr(blocks, reduce.__name__)((1, 3))
    return getattr(weight.view(ROWS, -1, scheme.group_size), reduce.__name__)(-1)


def same_bytes(one, other):
    return torch.equal(one.flatten().clone().view(torch.uint8), other.flatten().clone().view(torch.uint8))


@given(schemes(), st.integers(0, 9))
def test_a_layer_of_the_library_has_the_same_bits_and_is_written_as_it_was(scheme, seed):
    tensors = library_tensors(scheme, seed)
    value = compressor(scheme).decompress(dict(tensors), library_scheme(scheme))["weight"]
    store = compressed_tensors.store_of(scheme)

    part = store.read(dict(tensors), ROWS, COLS, torch.bfloat16)

    assert torch.equal(value.bfloat16(), part.value())
    wanted = store.tensors(ROWS, COLS)
    assert {name for name, each in wanted.items() if not each.optional} <= tensors.keys()
    assert all(tuple(tensors[name].shape) in wanted[name].shapes for name in wanted.keys() & tensors.keys())
    assert all(tensors[name].dtype in wanted[name].dtypes for name in wanted.keys() & tensors.keys())
    if scheme.strategy in ("channel", "group", "tensor_group"):
        again = store.write(part)
        assert scheme == compressed_tensors.scheme_of(Linear(part)) or scheme.format == INT
        for name in again.keys() & wanted.keys():
            assert again[name].dtype == tensors[name].dtype and same_bytes(again[name], tensors[name]), name


@given(st.integers(2, 8), seeds)
def test_words_with_unused_bits_of_before_2026_are_read(bits, seed):
    codes = torch.randint(0, 2**bits, (ROWS, COLS), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    each = 32 // bits
    words = []
    for row in codes.tolist():
        own = [sum(code << bits * j for j, code in enumerate(row[i : i + each])) for i in range(0, COLS, each)]
        words.append([word - 2**32 if word >= 2**31 else word for word in own])

    assert torch.equal(codes, compressed_tensors._from_words(torch.tensor(words, dtype=torch.int32), bits, COLS))


def test_numbers_outside_of_their_bits_are_refused():
    scheme = Scheme(format=INT, bits=4, float=False, symmetric=True, strategy="channel")
    tensors = {"weight": torch.full((ROWS, COLS), 9, dtype=torch.int8), "weight_scale": torch.ones(ROWS, 1)}

    with pytest.raises(ValueError, match="numbers outside of -8 to 7"):
        compressed_tensors.store_of(scheme).read(tensors, ROWS, COLS, torch.float32)


# --- Whole checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


RECIPES = [
    "rtn(group_size=16)", "rtn(group_size=32,symmetric=true)", "rtn(bits=3,group_size=16)", "rtn(bits=8,group_size=-1)",
    "rtn_fp", "rtn_fp(element=e2m1,group_size=16,scale=e4m3)", "rtn_fp(element=e2m1,group_size=32,scale=e8m0)",
    'rtn(group_size=16,layers={"*.down_proj":{"bits":8,"group_size":-1},"*.q_proj":null})', "int8", "fp8", "mxfp4",
]  # fmt: skip


@pytest.mark.parametrize("steps", RECIPES)
def test_a_written_checkpoint_opens_with_the_same_logits(half, tmp_path, steps):
    result = compression.compress(half, steps)

    again = compression.load(result.save(tmp_path / "out", "compressed-tensors"))

    assert torch.equal(logits(result.model), logits(again.model))
    assert steps == again.recipe.text and "compressed-tensors" in result.published_formats


@pytest.mark.parametrize("steps", [steps for steps in RECIPES if "symmetric" in steps or "fp" in steps])
def test_transformers_opens_it_with_the_same_weights(half, tmp_path, steps):
    """Symmetric weights: transformers 5.23 makes new zero points, since it expects them unpacked."""
    from transformers import AutoModelForCausalLM

    result = compression.compress(half, steps)
    theirs = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out", "compressed-tensors"))
    theirs(torch.arange(4)[None])  # weights are made dense at the first one

    for name, layer in result.model.named_modules():
        if _coded(layer):
            assert torch.equal(layer.dequantize(), theirs.get_submodule(name).weight), name


class LibraryRange(TokenRange):
    """A step of largest / 127.5, and numbers from -128: so the library imitates int8; engines divide by 127."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / step).round().clamp(-128, 127) * step


@pytest.mark.parametrize(("steps", "weights"), [("int8", "rtn(bits=8,group_size=-1)"), ("fp8", "rtn_fp")])
def test_what_is_computed_of_rounded_activations_is_what_the_library_computes(tmp_path, steps, weights):
    """In fp32, where what activations lose is not hidden by the dtype."""
    from transformers import AutoModelForCausalLM

    base = str(tmp_path / "base")
    transformers_model("LlamaForCausalLM", hidden_size=64).save_pretrained(base)
    result = compression.compress(base, steps)
    theirs = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out", "compressed-tensors"))
    alone = compression.compress(base, weights).model
    if steps == "int8":
        for layer in decoder.stored_layers(result.model).values():
            layer.input_part = LibraryRange()
            layer.weight_part = Dense(layer.weight_part.value())

    own, their, without = (logits(each).float() for each in (result.model, theirs, alone))

    assert (own - their).norm() < 0.05 * (without - their).norm()


def test_only_mxfp4_activations_need_a_gpu_in_vllm(half):
    format = formats.find("compressed-tensors")

    needs = {steps: format.needs_gpu("vllm", decoder.stored_layers(compression.compress(half, steps).model).values())
             for steps in ("int8", "fp8", "mxfp4", "rtn(bits=8,group_size=-1)", "rtn(group_size=16)")}  # fmt: skip

    assert {"mxfp4", "rtn(bits=8,group_size=-1)"} == {steps for steps, gpu in needs.items() if gpu}


def test_a_checkpoint_of_others_multiplies_whole_numbers(half, tmp_path):
    compression.compress(half, "int8").save(tmp_path / "out", "compressed-tensors")

    opened = compression.load(tmp_path / "out")

    assert {"w8a8" if exact_here() else "simulated": 14} == opened.kernels()
    detail = next(entry.detail for entry in opened.report if entry.outcome == "replaced")
    assert "8 bits" in detail and "activations in 8 bits, one step per token" in detail


def test_of_several_groups_the_setting_of_most_layers_is_the_recipe_and_the_others_are_named(half, tmp_path):
    steps = 'rtn(group_size=16,symmetric=true,layers={"*.down_proj":{"group_size":32},"*.q_proj":null})'
    compression.compress(half, steps).save(tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    (step,) = compression.load(tmp_path / "out").recipe.steps

    assert (16, True) == (step.method.group_size, step.method.symmetric)
    settings = {name: None if each is None else each.group_size for name, each in step.layers}
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert settings == {f"{b}.{n}": v for b in blocks for n, v in (("self_attn.q_proj", None), ("mlp.down_proj", 32))}
    assert 32 == step.for_layer("model.layers.1.mlp.down_proj").group_size


def test_several_settings_without_a_recipe_are_measured_under_no_recipe():
    groups = {"a": {"targets": ["re:.*up_proj"], "weights": WEIGHTS | {"num_bits": 8}},
              "b": {"targets": ["Linear"], "weights": WEIGHTS}}  # fmt: skip
    published = parse(described(config_groups=groups), "here")

    check_recipe(published, compression.Recipe())
    with pytest.raises(RecipeError, match=says("2 settings", "rtn(group_size=16,symmetric=true)")):
        check_recipe(published, compression.Recipe.parse("rtn(group_size=16,symmetric=true)"))
    one = parse(described(), "here")
    check_recipe(one, compression.Recipe.parse("rtn(group_size=16,symmetric=true)"))


def test_one_divisor_for_a_fused_layer_is_asked_for_before_anything_is_written(tmp_path):
    transformers_model("Phi3ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), "rtn_fp(element=e2m1,group_size=16,scale=e4m3)")

    assert "compressed-tensors" not in result.published_formats
    with pytest.raises(LayerError, match="its parts have a divisor each"):
        result.save(tmp_path / "out", "compressed-tensors")


@given(st.integers(1, 40), st.integers(8, 10**9))
def test_scales_of_blocks_are_spread_over_the_rows_that_there_are(rows, height):
    scheme = Scheme(format=FLOAT, bits=8, float=True, symmetric=True, strategy="block", block=(height, 16))
    scales = torch.rand(-(-rows // height), 4)

    spread = compressed_tensors.store_of(scheme).by_row(scales, rows)

    assert torch.equal(spread, scales[torch.arange(rows) // height])


@pytest.mark.parametrize(
    ("steps", "engines"),
    [
        ("rtn(group_size=16,symmetric=true)", {"vllm", "transformers"}),
        ("rtn(group_size=16)", {"vllm"}),
        ("rtn(bits=3,group_size=16,symmetric=true)", {"transformers"}),
        ("rtn_fp", {"vllm", "transformers"}),
        ("int8", {"vllm", "transformers"}),
    ],
)
def test_it_is_said_which_engines_open_what_is_written(half, steps, engines):
    model = compression.compress(half, steps).model
    format = formats.find("compressed-tensors")

    assert engines == {each for each in format.engines if format.refusal_of_model(each, model) is None}
    assert len(format.engines) == len(format.served(model))


@pytest.mark.parametrize("steps", ["rtn(group_size=16)", "rtn_fp", "int8", "fp8", "mxfp4"])
def test_without_a_recipe_a_checkpoint_is_called_by_its_grid(half, tmp_path, steps):
    compression.compress(half, steps).save(tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["meta"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    assert steps == compression.load(tmp_path / "out").recipe.text


def test_groups_of_inputs_that_are_no_neighbours_are_read(seed=0):
    layer = random_layer(ROWS, COLS, 4, 16, symmetric=True, desc_act=True, seed=seed)
    scheme = Scheme(format=PACKED, bits=4, float=False, symmetric=True, strategy="group", group_size=16, ordered=True)
    tensors = {
        "weight_packed": compressed_tensors._to_words(layer.codes.to(torch.uint8), 4), "weight_scale": layer.scales,
        "weight_shape": torch.tensor([ROWS, COLS]), "weight_g_idx": layer.g_idx.int(),
    }  # fmt: skip

    part = compressed_tensors.store_of(scheme).read(tensors, ROWS, COLS, torch.float16)

    assert torch.equal(layer.weight(), part.value())


def test_columns_in_activation_order_are_not_written(half, tmp_path):
    steps = "gptq(group_size=16,symmetric=true,static_groups=false,samples=4,sequence_length=16)"
    result = compression.compress(half, steps, calibration="random")

    with pytest.raises(LayerError, match=says("activation order", "static_groups=true")):
        result.save(tmp_path / "out", "compressed-tensors")


def _coded(layer):
    return isinstance(layer, compression.layers.Linear) and isinstance(layer.weight_part, Codes)


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        ("compressed-tensors", "own", "rtn(bits=5,group_size=16)"),
        ("gptq", "compressed-tensors", "rtn(group_size=16,symmetric=true)"),
        ("gptq", "compressed-tensors", "rtn(bits=3,group_size=16)"),
        ("awq", "compressed-tensors", "rtn(group_size=16)"),
    ],
)
def test_there_and_back_every_tensor_is_the_same_bytes(half, tmp_path, first, second, steps):
    compression.compress(half, steps).save(tmp_path / "1", first)
    compression.load(tmp_path / "1").save(tmp_path / "2", second)
    compression.load(tmp_path / "2").save(tmp_path / "3", first)

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "13")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "13"]
    assert configs[0] == configs[1]


# --- What is refused --------------------------------------------------------------------------------------------------

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def described(group=None, **changes):
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS} | (group or {})}
    return {"quant_method": "compressed-tensors", "format": PACKED, "config_groups": groups, "ignore": []} | changes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (described(kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme"]),
        (described(transform_config={"config_groups": {"a": 1}}), ["transform_config"]),
        (described(config_groups={}), ["config_groups", "at least one"]),
        (described(format="marlin-24"), ["'marlin-24'", PACKED]),
        (described({"output_activations": {"num_bits": 8}}), ["output_activations"]),
        (described({"input_activations": 8}), ["input_activations", "a table or null"]),
        (described({"input_activations": {"num_bits": 8}}), ["activations in int8-static", "4 bits, strategy group"]),
        (described({"input_activations": TOKENS | {"dynamic": "local"}}), ["'dynamic': 'local'", "under a stored one"]),
        (described({"input_activations": TOKENS | {"dynamic": 1}}), ["'dynamic': 1", "not read"]),
        (described({"input_activations": TOKENS | {"symmetric": False}}), ["zero points"]),
        (described({"input_activations": TOKENS | {"num_bits": 4}}), ["'num_bits': 4", "int8, fp8, mxfp4"]),
        (described({"input_activations": TOKENS}), ["activations in int8", "pack-quantized, 4 bits, strategy group"]),
        (described({"targets": "Linear"}), ["targets", "list of names"]),
        (described({"targets": ["re:("]}), ["'re:('", "no regular expression"]),
        (described({"targets": ["re:.*{99999999999999999999}"]}), ["no regular expression"]),
        (described({"weights": WEIGHTS | {"num_bits": 1}}), ["num_bits=1"]),
        (described({"weights": WEIGHTS | {"group_size": 4}}), ["group_size=4", "at least 8"]),
        (described({"weights": WEIGHTS | {"group_size": 2**40}}), ["group_size"]),
        (described({"weights": None}), ["weights must be a table"]),
        (described({"weights": WEIGHTS | {"num_bits": 9}}), ["num_bits=9"]),
        (described({"weights": WEIGHTS | {"num_bits": True}}), ["num_bits=True"]),
        (described({"weights": WEIGHTS | {"group_size": 0}}), ["group_size=0"]),
        (described({"weights": WEIGHTS | {"strategy": "channel"}}), ["channel", "group_size=16"]),
        (described({"weights": WEIGHTS | {"strategy": "token"}}), ["'token'", "tensor, channel"]),
        (described({"weights": WEIGHTS | {"block_structure": [1, 2]}}), ["block_structure"]),
        (described({"weights": WEIGHTS | {"dynamic": True}}), ["dynamic"]),
        (described({"weights": WEIGHTS | {"type": "float"}}), ["num_bits=4", "float"]),
        (described({"weights": WEIGHTS | {"type": "float", "num_bits": 8}}), [PACKED, "type float"]),
        (described({"format": MXFP4, "weights": WEIGHTS | {"type": "float"}}), ["mxfp4-pack-quantized is 32"]),
    ],
)  # fmt: skip
def test_descriptions_that_are_not_read_are_refused_by_field(config, words):
    with pytest.raises(CheckpointError, match=says("here", *words)):
        parse(config, "here")


def overlapping(config):
    group = {"targets": ["re:.*up_proj"], "weights": WEIGHTS | {"num_bits": 8}}
    config["config_groups"] |= {"a": group, "b": group | {"weights": WEIGHTS}}


def absent(config):
    config["config_groups"]["group_0"]["targets"].append("model.layers.7.mlp.up_proj")


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(compressed_tensors_config, "_SECONDS", 1e-6)
    slow = r"re:(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\s"

    with pytest.raises(CheckpointError, match=says("takes too long", LAYER)):
        parse(described({"targets": [slow]}), "here").scheme_of(LAYER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overlapping, [LAYER, "a and of b", "different schemes"]),
        (absent, ["'model.layers.7.mlp.up_proj'", "no linear layer"]),
        (lambda config: config["ignore"].append(LAYER), [f"{LAYER}.weight"]),
        (lambda config: config["ignore"].remove("lm_head"), ["lm_head", "dense weight"]),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=8), ["weight_packed", "8 bits"]),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=False), ["weight_zero_point"]),
    ],
)
def test_a_description_that_contradicts_the_tensors_is_refused(half, tmp_path, change, words):
    compression.compress(half, "rtn(group_size=16,symmetric=true)").save(tmp_path / "out", "compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())["quantization_config"]
    change(config)
    rewrite(path, quantization_config=config)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), ["missing", f"{LAYER}.weight_scale"]),
        (lambda t: t[f"{LAYER}.weight_shape"].add_(1), [LAYER, "weight_shape is"]),
        (lambda t: t[f"{LAYER}.weight_scale"].fill_(float("nan")), [LAYER, "NaN"]),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(96, 64)}), [LAYER, "twice"]),
        (lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].long()}), ["int64"]),
    ],
)
def test_tensors_that_are_damaged_are_refused_by_name(half, tmp_path, change, words):
    compression.compress(half, "rtn(group_size=16,symmetric=true)").save(tmp_path / "out", "compressed-tensors")
    change_tensors(tmp_path / "out", change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("nf4(group_size=32)", ["q_proj", "NF4"]),
        ("hqq(group_size=16)", ["q_proj", "real zero points"]),
        ("rtn(group_size=16,embeddings=8)", ["leave embeddings=8 out"]),
        ("rtn_fp(element=e2m1,group_size=16)", ["q_proj", "NVFP4"]),
        ("magnitude", ["has none", "save it as it is"]),
        ("llm_int8", ["q_proj", "not 8 bits in one group per channel"]),
    ],
)
def test_what_it_cannot_hold_is_refused_before_anything_is_written(half, tmp_path, steps, words):
    result = compression.compress(half, steps, calibration="random")

    with pytest.raises(LayerError, match=says(*words)):
        result.save(tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
