"""What other programs make of the folders that are written: dense ones are theirs, of packed ones they make nothing."""

import json

import pytest
import torch
from checkpoints import logits, rewrite, transformers_model
from earlier_schemas import of_schema_1, tensors_of_schema_1

import compression
from compression.__main__ import main

PACKED = ["rtn(group_size=8)", "nf4(group_size=32)", "magnitude(store=bitmask)"]
DENSE = ["fp16", "magnitude(scope=row)"]


@pytest.fixture(scope="module", params=["in memory", "block by block"])
def write(request, saved, tmp_path_factory):
    """Writes the result of a recipe, in one of two ways, to a new folder."""

    def written(recipe):
        out = tmp_path_factory.mktemp("written") / "out"
        if request.param == "in memory":
            return compression.compress(str(saved), recipe).save(out)
        return compression.compress_to(out, str(saved), recipe)

    return written


def openers():
    import transformers

    auto = [transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig]
    return [*auto, transformers.LlamaForCausalLM, transformers.LlamaModel]


@pytest.mark.parametrize("steps", PACKED)
def test_a_packed_model_is_refused_by_every_way_into_transformers(write, steps):
    out = write(steps)

    for opener in openers():
        with pytest.raises((ValueError, OSError), match=r"compression-bench|no file named model\.safetensors"):
            opener.from_pretrained(out)
    assert not (out / "model.safetensors").exists() and not list(out.glob("*.index.json"))
    assert compression.load(out).recipe.text == steps


@pytest.mark.parametrize("steps", [*DENSE, "structured(keep_layers=1,keep_kv_heads=1)"])
def test_a_dense_one_is_opened_with_the_same_logits(write, steps, request):
    from transformers import AutoModelForCausalLM

    if "structured" in steps and "block by block" in request.node.name:
        pytest.skip("it needs the whole model at once")
    out = write(steps)

    opened = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert torch.equal(logits(compression.load(out).model), logits(opened))


def as_it_was_before(folder):
    """The folder as the first schema had it: a configuration that engines know, and their names of files."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | config.pop("uncompressed", {})))
    layers = json.loads((folder / "compression.json").read_text())["layers"]
    layers = {name: of_schema_1(layer) for name, layer in layers.items()}
    rewrite(folder / "compression.json", schema=1, files=..., layers=layers)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        tensors_of_schema_1(path, path)
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    from safetensors import safe_open

    weight_map = {}
    for path in files:
        with safe_open(path, "pt") as file:
            weight_map |= {name: path.name for name in file.keys()}  # noqa: SIM118 - not a mapping
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("steps", [PACKED[0], *DENSE])
def test_folders_of_the_first_schema_stay_readable(write, steps):
    out = write(steps)
    expected = compression.load(out)

    as_it_was_before(out)

    opened = compression.load(out)
    assert torch.equal(logits(expected.model), logits(opened.model))
    assert (expected.recipe, expected.report, expected.base) == (opened.recipe, opened.report, opened.base)


# --- How many bytes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "base"
    transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("format", ["own", "gptq", "awq"])
def test_the_bytes_that_are_said_are_those_of_the_tensors_in_the_files(half, tmp_path, capsys, format, symmetric):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    recipe = f"rtn(group_size=16,symmetric={symmetric})"
    assert 0 == main([recipe, "--base", half, "--out", str(out), "--format", format, "--json"])

    said = json.loads(capsys.readouterr().out)
    tensors = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored == said["stored_bytes"] == compression.load(out).stored_bytes
    assert 8 * stored / compression.load(out).parameters == said["bits_per_parameter"]
    left_out = {"gptq": ("g_idx", "qzeros"), "awq": ("qzeros",), "own": ()}[format]
    assert all(any(name.endswith(key) for name in tensors) for key in left_out)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_published_checkpoint_is_measured_by_what_its_files_hold(half, tmp_path, format):
    from safetensors.torch import load_file

    from bench.session.options import Options
    from bench.session.session import Workbench

    out = compression.compress(half, "rtn(group_size=16,symmetric=true)").save(tmp_path / "out", format)
    recipe = compression.Recipe.parse("rtn(group_size=16,symmetric=true)")
    options = Options(
        base=str(out), recipes=(recipe,), journal=tmp_path / "journal.jsonl", prompt_tokens=4, new_tokens=4
    )
    workbench = Workbench(options)

    workbench.measure_size(recipe)

    (value,) = [row.value for row in workbench.rows.values() if row.metric == "efficiency.stored_bytes"]
    assert sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()) == value
