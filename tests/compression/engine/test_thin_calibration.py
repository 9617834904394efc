"""Weights that are fitted to too little text, which engines open what `gptq` makes, and what it was made by before."""

import json

import pytest
import small_runs
import torch
from block_by_block import deep_checkpoint, write
from checkpoints import transformers_model
from earlier_schemas import of_schema_1, tensors_of_schema_1

import compression
from bench.session import summary
from bench.session.session import Workbench
from compression import Recipe
from compression.architectures import decoder
from compression.checkpoints.formats.affine_formats import GPTQ

FEW = "samples=4,sequence_length=12"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin") / "base"
    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["gptq(group_size=16,", "awq(group_size=16,rounding=gptq,", "sparsegpt("])
def test_a_method_that_fits_a_hessian_says_where_there_is_too_little_text(base, method):
    widest = max(layer.in_features for _, layer in _linears(compression.open_base(base).model))
    needed = 10 * widest

    [note] = compression.compress(base, f"{method}{FEW})", calibration="random").notes

    assert f"up to {widest:,} inputs to 48 tokens" in note and f"give samples={-(-needed // 12)} or more" in note
    enough = f"{method}samples={-(-needed // 12)},sequence_length=12)"
    assert () == compression.compress(base, enough, calibration="random").notes


@pytest.mark.parametrize("text", [f"awq(group_size=16,{FEW})", f"wanda({FEW})", "rtn(group_size=16)"])
def test_a_method_that_fits_none_says_nothing(base, text):
    assert () == compression.compress(base, text, calibration="random").notes


def test_layers_that_are_left_alone_do_not_count(base):
    recipe = f'gptq(group_size=16,{FEW},layers={{"*":null}})'

    assert () == compression.compress(base, recipe, calibration="random").notes


def test_what_has_to_be_known_is_stored_whether_written_whole_or_block_by_block(tmp_path):
    base = deep_checkpoint(tmp_path / "base")
    recipe = f"gptq(group_size=8,{FEW})"
    whole = compression.compress(str(base), recipe, calibration="random")
    whole.save(tmp_path / "whole")
    write(tmp_path / "blocks", base, recipe)

    assert whole.notes
    assert whole.notes == compression.load(tmp_path / "whole").notes == compression.load(tmp_path / "blocks").notes


def test_a_folder_of_an_earlier_version_has_no_notes_and_keeps_what_its_recipe_meant(base, tmp_path):
    recipe = f"gptq(group_size=16,symmetric=true,act_order=false,static_groups=false,{FEW})"
    out = compression.compress(base, recipe, calibration="random").save(tmp_path / "out")
    manifest = json.loads((out / "compression.json").read_text())
    step = {"method": "gptq", "group_size": 16, "samples": 4, "sequence_length": 12}
    for later in ("notes", "files", "digest"):
        del manifest[later]
    manifest |= {"schema": 1, "recipe": {"schema": 1, "steps": [step]}}  # as written when these were the defaults
    manifest["layers"] = {name: of_schema_1(layer) for name, layer in manifest["layers"].items()}
    (out / "compression.json").write_text(json.dumps(manifest))
    tensors_of_schema_1(out / "compressed.safetensors", out / "model.safetensors")

    again = compression.load(out)

    assert (Recipe.parse(recipe), ()) == (again.recipe, again.notes)


@pytest.mark.parametrize(("options", "words"), [
    ("", "symmetric=true alone"),
    ("symmetric=true,static_groups=false,", "activation order"),
    ("symmetric=true,", None),
])  # fmt: skip
def test_the_written_format_needs_no_gather_and_vllm_wants_it_symmetric(base, tmp_path, options, words):
    result = compression.compress(base, f"gptq(group_size=16,{options}{FEW})", calibration="random")
    gathers = "static_groups=false" in options

    result.save(tmp_path / "out", "gptq")
    quantization = json.loads((tmp_path / "out" / "quantize_config.json").read_text())

    assert gathers == quantization["desc_act"]
    assert {gathers} == {
        layer.weight_part.permutation is not None for layer in decoder.stored_layers(result.model).values()
    }
    refusal = GPTQ.refusal_of_model("vllm", result.model)
    assert words in refusal if words else refusal is None


def test_one_group_to_a_channel_needs_no_gather_in_any_order(base):
    result = compression.compress(base, f"gptq(group_size=-1,static_groups=false,{FEW})", calibration="random")

    assert {None} == {layer.weight_part.permutation for layer in decoder.stored_layers(result.model).values()}


def _linears(model):
    return [pair for block in decoder.decoder_blocks(model) for pair in block.linears()]


def test_a_run_says_it_in_the_row_of_perplexity_and_in_its_summary(tmp_path):
    small_runs.make_base(tmp_path)
    recipe = f"gptq(group_size=8,{FEW})"
    workbench = Workbench(small_runs.options(tmp_path, recipe, calibration="random"))

    failing = small_runs.measured(workbench)

    [note] = workbench.notes[recipe]
    assert [] == failing
    assert {note} == {row.reason for row in workbench.rows.values() if row.metric == "quality.perplexity"}
    said = list(summary.lines(workbench, verbose=True))
    assert 1 == sum(note in line for line in said)
    assert f"grids: {recipe} 4 bits in groups of 8, asymmetric" in said
