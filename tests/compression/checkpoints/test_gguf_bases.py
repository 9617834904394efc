"""GGUF files as bases: plain ones compress as their weights in a folder do, quantized ones are measured as they are."""

import pytest
import small_runs
import torch
from checkpoints import logits, says, transformers_model
from gguf_files import SIZES, tokenizer_of, write

import compression
from compression import CheckpointError, RecipeError
from compression.architectures import decoder
from compression.checkpoints.formats import recipes


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_plain_file_is_the_base_that_its_weights_are(tmp_path, kind):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    write(tmp_path / "a.gguf", kind)
    transformers_model("LlamaForCausalLM", tied=True, dtype=dtype, **SIZES).save_pretrained(tmp_path / "folder")

    file, folder = compression.open_base(str(tmp_path / "a.gguf")), compression.open_base(str(tmp_path / "folder"))

    assert ("a.gguf", dtype) == (file.text, file.model.dtype) and file.source.published is None
    assert file.digest == compression.locate(str(tmp_path / "a.gguf")).digest
    assert torch.equal(logits(file.model), logits(folder.model))
    steps = "rtn(group_size=16)"
    mine, theirs = (compression.compress(str(tmp_path / each), steps) for each in ("a.gguf", "folder"))
    assert torch.equal(logits(mine.model), logits(theirs.model))
    written = compression.compress_to(tmp_path / "out", str(tmp_path / "a.gguf"), steps)  # block by block
    assert torch.equal(logits(mine.model), logits(compression.load(written).model))


def test_a_folder_with_one_file_is_that_base(tmp_path):
    write(tmp_path / "a.gguf", "BF16")

    assert "a.gguf" == compression.open_base(str(tmp_path)).text
    write(tmp_path / "b.gguf", "BF16")
    with pytest.raises(CheckpointError, match=says("2 GGUF files", "a.gguf")):
        compression.locate(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_1"])
def test_a_quantized_file_is_refused_unless_dequantized(tmp_path, kind, tied):
    path = tmp_path / "a.gguf"
    write(path, kind, tied)

    for refused in (lambda: compression.open_base(str(path)),
                    lambda: compression.compress(str(path), "rtn(group_size=16)"),
                    lambda: compression.compress_to(tmp_path / "out", str(path), "rtn(group_size=16)")):  # fmt: skip
        with pytest.raises(CheckpointError, match=says("a.gguf is already quantized (gguf)", "dequantize=True")):
            refused()
    dense, stored = compression.open_base(str(path), dequantize=True), compression.load(path)
    assert not decoder.stored_layers(dense.model) and decoder.stored_layers(stored.model)
    assert torch.equal(logits(dense.model), logits(stored.model))
    assert not (tmp_path / "out").exists()


def test_a_file_is_measured_by_its_own_recipe_and_no_other(tmp_path):
    for kind, own in (("Q8_0", "gguf(type=q8_0)"), ("Q5_1", "gguf(type=q5_1)")):
        write(tmp_path / f"{kind}.gguf", kind)
        source = compression.locate(str(tmp_path / f"{kind}.gguf"))
        assert source.published.quant_method == "gguf" and own == recipes.recipe_of(source.published).text
        for text in ("fp16", "gguf", own):
            recipes.check_recipe(source.published, compression.Recipe.parse(text))
        with pytest.raises(RecipeError, match=says("by gguf", own, "not by rtn")):
            recipes.check_recipe(source.published, compression.Recipe.parse("rtn"))


def test_a_run_measures_a_file_as_it_measures_a_folder(tmp_path):
    small_runs.make_base(tmp_path, hidden_size=64, intermediate_size=96, vocab_size=320)
    tokenizer_of("gpt-2").save_pretrained(tmp_path / "tiny")
    base = str(tmp_path / "tiny")
    compression.compress(base, "fp16").save(tmp_path / "plain", "gguf")
    compression.compress(base, "gguf(type=q8_0)").save(tmp_path / "stored", "gguf")
    recipes = ("fp16", "gguf(type=q8_0)")

    runs = [small_runs.one_run(tmp_path, *recipes, base=str(given)) for given in
            (base, tmp_path / "plain" / "model.gguf", tmp_path / "stored" / "model.gguf")]  # fmt: skip

    folder, plain, stored = (
        {(row.recipe, row.metric): row.value for row in run.rows.values() if row.metric.startswith("quality")}
        for run in runs
    )
    assert [] == runs[0].failing == runs[1].failing == runs[2].failing
    assert folder and folder == plain
    (value,) = {stored[recipe, "quality.perplexity"] for recipe in recipes}
    assert folder[recipes[1], "quality.perplexity"] == value and stored[recipes[1], "quality.kl_to_base"] == 0
