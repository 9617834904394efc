"""What engines quantize while they load: a step that this package hands on, and never measures as if it were done."""

import pytest
from checkpoints import says

import compression
from compression import Recipe, RecipeError
from compression.commands.listing import Opening, _kernels, holding
from compression.recipes.registry import built_in

ON_LOAD = [name for name, cls in built_in().items() if cls.engine is not None]


def test_there_is_one_for_vllm():
    assert ["vllm"] == ON_LOAD


@pytest.mark.parametrize("text", ["vllm(type=fp8_per_channel)", "magnitude-vllm(type=mxfp4)", "vllm-rtn"])
@pytest.mark.parametrize("take", [compression.plan, compression.compress])
def test_this_package_neither_plans_nor_compresses_it(text, take):
    step = str(Recipe.parse(text).on_load)

    with pytest.raises(RecipeError, match=says(f"{step} is what vllm makes", "pytest bench --runtime vllm")):
        take("reference", text)


def test_nothing_is_written_for_it(tmp_path):
    with pytest.raises(RecipeError, match="--runtime vllm"):
        compression.compress("reference", "vllm", into=tmp_path / "out")

    assert not (tmp_path / "out").exists() or [] == list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("text", "exported"),
    [("vllm", "fp16"), ("magnitude-vllm(type=mxfp8)", "magnitude"), ("fp16", "fp16"), ("rtn-recover", "rtn-recover")],
)
def test_what_is_exported_is_all_before_it(text, exported):
    assert exported == Recipe.parse(text).exported.text


def test_it_must_be_the_last_step():
    with pytest.raises(RecipeError, match=says("vllm-rtn: vllm must be the last step")):
        _ = Recipe.parse("vllm-rtn").exported


def test_a_type_that_vllm_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(RecipeError, match="allowed are fp8, fp8_per_channel"):
        Recipe.parse("vllm(type=int4)")


def test_the_listings_say_which_engine_does_it():
    on_gpu = {"own": {"vllm": Opening(on_gpu=True)}}
    assert on_gpu == holding("vllm") == holding("magnitude-vllm(type=fp8_per_block)")
    assert {"own": {"vllm": Opening()}} == holding("vllm(type=fp8_per_channel)")
    assert {"own": {}} == holding("rtn-vllm")  # vLLM opens no packed layers in our own format

    assert ["those of vllm, which does it while it loads a model"] == _kernels("vllm", built_in()["vllm"], "cpu")
