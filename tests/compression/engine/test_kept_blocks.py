"""keep=: blocks at either end of a model that a step leaves as they are, for methods on layers and on blocks alike."""

import pytest
import torch
from block_by_block import deep_checkpoint, same, tensors, write
from checkpoints import logits

import compression
from compression import RecipeError
from compression.architectures.decoder import stored_layers

FEW = "samples=4,sequence_length=12"
RECIPES = ["int8(keep=1)", f"smoothquant({FEW},keep=1)", f"mxfp4(rounding=gptq,{FEW},keep=1)",
           f"gptq(group_size=8,{FEW},keep=1)"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return deep_checkpoint(tmp_path_factory.mktemp("kept") / "base")


def numbers(names):
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


@pytest.mark.parametrize("steps", RECIPES)
def test_the_first_and_the_last_block_stay_and_the_report_says_so(folder, steps):
    base = compression.open_base(str(folder))
    result = compression.compress(base, steps, calibration="random")

    assert {1, 2} == numbers(stored_layers(result.model))
    for number in (0, 3):
        before, after = (each.model.model.layers[number].state_dict() for each in (base, result))
        assert same(before, after)
    assert {0, 3} == numbers(entry.name for entry in result.report if entry.outcome == "kept")
    assert steps == result.recipe.text


@pytest.mark.parametrize("steps", RECIPES[:2])
def test_what_is_written_block_by_block_and_what_is_planned_are_the_same(folder, tmp_path, steps):
    whole = compression.compress(str(folder), steps, calibration="random")
    plan = compression.plan(compression.open_base(str(folder)), steps, calibration="random")
    whole.save(tmp_path / "whole")
    write(tmp_path / "blocks", folder, steps)

    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "blocks"))
    assert whole.stored_bytes == plan.stored_bytes
    assert torch.equal(logits(whole.model), logits(compression.load(tmp_path / "blocks").model))


def test_it_is_counted_on_the_blocks_that_are_there(folder):
    """A step that takes two blocks out leaves the second with the first and the last of what is left."""
    result = compression.compress(str(folder), "structured(keep_layers=3,keep_kv_heads=none)-int8(keep=1)")

    assert {1} == numbers(stored_layers(result.model))


def test_layers_of_the_blocks_between_may_be_kept_besides(folder):
    result = compression.compress(str(folder), 'int8(keep=1,layers={"*.down_proj":null})')

    assert not any("down_proj" in name for name in stored_layers(result.model))
    assert {1, 2} == numbers(stored_layers(result.model))


def test_an_export_names_what_was_kept(folder, tmp_path):
    result = compression.compress(str(folder), "int8(keep=1)")

    again = compression.load(result.save(tmp_path / "out", "compressed-tensors"))

    assert stored_layers(result.model).keys() == stored_layers(again.model).keys()
    assert torch.equal(logits(result.model), logits(again.model))


def test_what_would_leave_no_block_is_refused_before_any_work(folder):
    with pytest.raises(RecipeError, match=r"int8\(keep=2\): keep=2 at either end leaves none of 4 blocks"):
        compression.plan(str(folder), "int8(keep=2)")
