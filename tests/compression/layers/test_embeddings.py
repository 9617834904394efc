"""Embeddings and head in 8 bits, a setting of every quantizer: stored, opened, streamed, cut, trained, refused."""

import json

import pytest
import torch
from block_by_block import interrupt, same, tensors, write
from checkpoints import logits, rewrite, transformers_model

import compression
from bench.measure import decode_step
from bench.metrics import compute, size
from compression import LayerError, Recipe, RecipeError, list_methods
from compression.architectures import embeddings
from compression.layers.embedding import Embedding
from compression.methods.base import Quantizer
from compression.numeric import grouping
from compression.training import adapters
from compression.training.settings import LoraSettings, Objective, Settings
from compression.training.trainer import train

CALIBRATED = "samples=4,sequence_length=12"
QUANTIZERS = {
    "rtn": "group_size=16", "nf4": "group_size=32", "hqq": "group_size=16", "llm_int8": "",
    "rtn_fp": "group_size=16", "gguf": "type=q4_0",
    "int8": "", "fp8": "", "mxfp4": "", "nvfp4": CALIBRATED, "olive": CALIBRATED,
    "gptq": f"group_size=16,{CALIBRATED}", "awq": f"group_size=16,{CALIBRATED}",
}  # fmt: skip


def spelled(name, *more):
    return f"{name}({','.join(filter(None, ('embeddings=8', QUANTIZERS[name], *more)))})"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "base"
    model = transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64,
                               tied=request.param)  # fmt: skip
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(folder):
    return compression.open_base(str(folder))


def packed(base, recipe, **given):
    return compression.compress(base, recipe, calibration="random", **given)


def test_every_quantizer_has_the_setting():
    assert QUANTIZERS.keys() == {name for name, method in list_methods().items() if issubclass(method, Quantizer)}
    assert QUANTIZERS.keys() == {name for name, method in list_methods().items() if method.info.leaves == "packed"
                                 and method.unit == "layer"}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_saved_and_what_is_streamed_open_with_the_same_bits(folder, base, tmp_path, name):
    recipe = spelled(name)
    result = packed(base, recipe)
    result.save(tmp_path / "saved")
    write(tmp_path / "streamed", folder, recipe)

    first, second = (compression.load(tmp_path / each) for each in ("saved", "streamed"))

    assert Recipe.parse(recipe) == first.recipe
    assert torch.equal(logits(result.model), logits(first.model))
    assert torch.equal(logits(result.model), logits(second.model))
    assert result.report == first.report == second.report
    whole, parts = tensors(tmp_path / "saved"), tensors(tmp_path / "streamed")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert result.stored_bytes == first.stored_bytes == sum(tensor.nbytes for tensor in whole.values())


def test_a_row_is_8_bits_and_a_scale_and_tied_ones_are_stored_once(base):
    plain, result = packed(base, "rtn(group_size=16)"), packed(base, spelled("rtn"))
    rows, cols = base.model.model.embed_tokens.weight.shape
    tables = 1 if base.model.config.tie_word_embeddings else 2

    assert tables * rows * (cols * 2 - (cols + 2)) == plain.stored_bytes - result.stored_bytes
    assert size.stored(result.model) == result.stored_bytes
    assert base.model.num_parameters() == result.parameters
    assert {"model.embed_tokens", "lm_head"} <= {e.name for e in result.report if e.outcome == "replaced"}


def test_rows_are_those_of_the_rounded_table_before_and_after_a_product(base):
    model = packed(base, spelled("rtn")).model
    weight = base.model.model.embed_tokens.weight.detach()
    expected = grouping.decode(embeddings.GRID, *grouping.quantize(embeddings.GRID, weight), torch.bfloat16)
    ids = torch.tensor([[3, 0, 3], [47, 5, 9]])

    before = model.model.embed_tokens(ids)
    logits(model)  # the head takes the layout of its kernel

    assert "int8" == model.lm_head.kernel_name()
    assert torch.equal(expected[ids], before)
    assert torch.equal(expected[ids], model.model.embed_tokens(ids))


def test_without_the_setting_nothing_around_the_blocks_is_touched(base):
    result = packed(base, "rtn(group_size=16)")

    assert result.model.model.embed_tokens.weight.data_ptr() == base.model.model.embed_tokens.weight.data_ptr()
    assert isinstance(result.model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("text", [
    f"{spelled('rtn')}-gptq(group_size=16,{CALIBRATED})",
    f"rtn(group_size=16)-{spelled('gptq', 'bits=3')}",
])  # fmt: skip
def test_steps_read_what_steps_before_made_of_the_embeddings_streamed_or_not(folder, base, tmp_path, text):
    packed(base, text).save(tmp_path / "saved")
    write(tmp_path / "streamed", folder, text)

    whole, parts = tensors(tmp_path / "saved"), tensors(tmp_path / "streamed")

    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_made_dense_again_embeddings_are_tied_as_they_were(base):
    model = packed(base, f"{spelled('rtn')}-magnitude(sparsity=0.0)-rtn(group_size=16)").model

    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert base.model.config.tie_word_embeddings == tied


@pytest.mark.parametrize(
    "step", ["structured(keep_layers=1,keep_kv_heads=none)", "p(ratio=0.5,round_to=32,samples=4,sequence_length=12)"]
)
def test_a_packed_model_is_cut_with_its_embeddings(base, tmp_path, step):
    result = packed(base, f"rtn(embeddings=8,group_size=32)-{step}")

    again = compression.load(result.save(tmp_path / "out"))

    assert isinstance(again.model.model.embed_tokens, Embedding)
    assert torch.equal(logits(result.model), logits(again.model))


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_run_with_packed_embeddings_goes_on(folder, tmp_path, after):
    recipe = spelled("gptq")
    interrupt(tmp_path / "out", folder, recipe, after=after)

    write(tmp_path / "out", folder, recipe)

    assert same(tensors(write(tmp_path / "whole", folder, recipe)), tensors(tmp_path / "out"))
    reports = [compression.load(tmp_path / name).report for name in ("whole", "out")]
    assert reports[0] == reports[1]


def test_adapters_are_trained_below_a_packed_head(base, tmp_path):
    model = packed(base, spelled("rtn")).model
    head = {name: tensor.clone() for name, tensor in model.lm_head.state_dict().items()}
    adapters.attach(model, LoraSettings(rank=2, seed=0), keep_zeros=False)
    ids = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))
    settings = Settings(epochs=8, learning_rate=1e-2, batch=8, accumulation=1, clip=1.0)

    losses = train(model, ids, Objective(alpha=0, temperature=1), settings, tmp_path / "runs").losses

    assert losses[-1] < losses[0]
    assert all(torch.equal(head[name], tensor) for name, tensor in model.lm_head.state_dict().items())


def test_the_decode_step_and_the_operations_are_those_of_the_model(base):
    model = packed(base, spelled("rtn")).model

    assert compute.model_flops_per_token(base.model, 8) == compute.model_flops_per_token(model, 8)
    assert decode_step.lean_step(model, 8) is not None


def test_formats_that_cannot_hold_it_and_values_that_cannot_be_are_refused(base, tmp_path):
    result = packed(base, spelled("rtn"))

    for format in ("gptq", "awq"):
        with pytest.raises(
            LayerError, match=f"format {format} cannot hold model.embed_tokens: .*leave embeddings=8 out"
        ):
            result.save(tmp_path / "out", format)
    assert () == result.published_formats == result.portable
    with pytest.raises(RecipeError, match="allowed are 16, 8"):
        Recipe.parse("rtn(embeddings=4)")
    with pytest.raises(RecipeError, match="cannot have embeddings of its own"):
        packed(base, 'rtn(group_size=16,layers={"*.0.*":{"embeddings":8}})')


@pytest.mark.parametrize("damage", ["tied", "missing"])
def test_a_folder_whose_description_does_not_fit_is_refused(base, tmp_path, damage):
    path = packed(base, spelled("rtn")).save(tmp_path / "out")
    manifest = json.loads((path / "compression.json").read_text())
    if damage == "tied":
        other = manifest["layers"]["lm_head"] if base.model.config.tie_word_embeddings else "tied"
        manifest["layers"]["model.embed_tokens"] = {"embedding": other}
    else:
        del manifest["layers"]["lm_head"]
    rewrite(path / "compression.json", layers=manifest["layers"])

    with pytest.raises(compression.CheckpointError, match="packed embeddings are those of"):
        compression.load(path)
