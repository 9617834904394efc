"""A plan: made once, read by all that run, stream, estimate or bench a recipe, and true of what comes out."""

import sys
from dataclasses import dataclass

import pytest
import torch
from checkpoints import says, transformers_model
from small_runs import make_base, options

import compression
from bench.session.plan import plan as said
from bench.session.session import Workbench
from compression import CheckpointError, CompressionError, LayerError, Recipe, RecipeError
from compression.checkpoints import base as _checkpoint
from compression.methods.quantization.weight_only.rtn import RTN
from compression.recipes import registry

LINEARS = 2 * 7  # of the tiny models
IDS = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a student and of a teacher of its tokenizer."""
    found = []
    for name, sizes in (("student", {}), ("teacher", {"hidden_size": 64})):
        folder = tmp_path_factory.mktemp("bases") / name
        transformers_model("LlamaForCausalLM", **{"vocab_size": 258} | sizes).save_pretrained(folder)
        _checkpoint.byte_tokenizer().save_pretrained(folder)
        found.append(str(folder))
    return found


# --- Once -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch):
    """The shapes that a quantizer, `counted_test`, was asked about."""
    found = []
    monkeypatch.setattr(registry, "METHODS", dict(registry.discover()))

    @registry.method("counted_test")
    @dataclass(frozen=True, kw_only=True)
    class Counted(RTN):
        """Rounds to nearest."""

        group_size: int = 8

        def check_layer(self, in_features, out_features):
            found.append((in_features, out_features))
            super().check_layer(in_features, out_features)

    return found


@pytest.mark.parametrize("into", [False, True], ids=["in memory", "into a folder"])
def test_every_layer_is_looked_at_once_for_a_recipe(bases, tmp_path, looked_at, into):
    compression.compress(bases[0], "counted_test", into=tmp_path / "out" if into else None)

    assert LINEARS == len(looked_at)


def test_and_once_in_a_whole_run_of_the_benchmarks(tmp_path, looked_at):
    make_base(tmp_path)
    workbench = Workbench(options(tmp_path, "counted_test"))
    workbench.compressed(Recipe.parse("counted_test"))
    workbench.close()

    assert LINEARS == len(looked_at)


opened = []  # files that were, while `counting`


def _note(event, arguments):
    if opened and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(_note)  # one cannot be taken back


def opens(work, place):
    """How many files below a place are opened."""
    opened[:] = ["counting"]
    try:
        work()
        return sum(path.startswith(str(place)) for path in opened)
    finally:
        opened.clear()


def test_texts_tasks_and_teachers_are_read_once_for_any_number_of_recipes(bases, tmp_path):
    for name, line in (("texts/a.jsonl", '{"text": "words"}'), ("tasks/a.jsonl", '{"prompt": "a", "answer": "b"}')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{line}\n" * 9)
    given = {"calibration": tmp_path / "texts", "downstream": tmp_path / "tasks", "teacher": bases[1]}

    def planned(*texts):
        planner = compression.Planner(bases[0], **given)
        plans, refused = planner.plan_all(map(Recipe.parse, texts))
        assert {} == refused
        for plan in plans.values():
            for source in (plan.calibration, plan.downstream):
                assert source is None or source.digest

    several = ("kd", "kd(alpha=0.5)-recover", "gptq(group_size=8)-recover", "distilled(epochs=1)")
    for place in (tmp_path, bases[1]):
        once = opens(lambda: planned("kd-recover"), place)
        assert 0 < once == opens(lambda: planned(*several), place)


def test_no_weight_is_read(bases, tmp_path):
    (tmp_path / "base").mkdir()
    for path in _checkpoint.locate(bases[0]).folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())

    assert ("nf4(group_size=32)",) == compression.plan(str(tmp_path / "base"), "nf4(group_size=32)").executed
    with pytest.raises(CheckpointError, match="safetensors"):
        compression.compress(str(tmp_path / "base"), "nf4(group_size=32)")


# --- True -------------------------------------------------------------------------------------------------------------

RECIPES = (
    "fp16", "nf4(group_size=32)", "nf4(group_size=32,compute_dtype=bfloat16)", "rtn(group_size=8)",
    "rtn(bits=8,group_size=-1,symmetric=true)", "rtn(group_size=32,embeddings=8)", "hqq(group_size=32,backend=torch)",
    "llm_int8", "llm_int8(threshold=2)", 'rtn(group_size=32,layers={"*.down_proj":{"bits":8},"*.q_proj":null})',
    "gptq(group_size=8,samples=4,sequence_length=12)", "awq(group_size=8,samples=4,sequence_length=12)",
    "p(samples=8,sequence_length=10,round_to=32)-nf4(group_size=32)", "nf4(group_size=32)-magnitude",
    "nf4(group_size=32)-recover(rank=2,sequence_length=64,batch=1,warmup=0)",
)  # fmt: skip


@pytest.mark.parametrize("text", RECIPES)
def test_kernels_bytes_and_steps_are_those_of_the_result(bases, tmp_path, text):
    base = compression.open_base(bases[0])
    given = {"calibration": IDS, "downstream": [("a", "b")] * 8}

    plan = compression.plan(base, text, **given)
    result = compression.compress(base, plan, cache=tmp_path)

    assert (plan.executed, plan.stored_bytes) == (result.executed, result.stored_bytes)
    assert plan.kernels("cpu") == result.kernels()


def test_a_plan_gives_what_its_recipe_gives(bases, tmp_path):
    text = "gptq(group_size=8,samples=4,sequence_length=12)"
    by_text = compression.compress(bases[0], text, calibration=IDS)
    plan = compression.plan(bases[0], text, calibration=IDS)
    by_plan = compression.compress(bases[0], plan)
    written = compression.compress(bases[0], plan, into=tmp_path / "out")

    for model in (by_plan.model, compression.load(tmp_path / "out").model):
        ours, theirs = model.state_dict(), by_text.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert by_text.report == by_plan.report == written.report
    assert all(tensor.is_meta for tensor in written.model.state_dict().values())
    assert by_text.stored_bytes == written.stored_bytes


def test_what_a_run_would_take_names_the_kernels_of_the_run(tmp_path):
    make_base(tmp_path)
    workbench = Workbench(options(tmp_path, "llm_int8", "nf4(group_size=32)"))
    for recipe in workbench.options.recipes:
        workbench.compressed(recipe)
    workbench.close()

    text = said(workbench.options, [])
    for recipe, kernels in workbench.kernels.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(recipe)]
        assert all(kernel in line for kernel in kernels)
        assert kernels == workbench.plans[recipe].kernels("cpu")


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "more", "words"),
    [
        (1, {}, ["the plan is of the base", "make one of this base"]),
        (0, {"calibration": "random"}, ["calibration is settled by the plan", "give it to `plan`"]),
        (0, {"teacher": "self"}, ["teacher is settled by the plan"]),
    ],
)
def test_a_plan_is_of_its_base_and_of_what_it_read(bases, base, more, words):
    plan = compression.plan(bases[0], "rtn(group_size=8)")

    with pytest.raises(RecipeError, match=says(*words)):
        compression.compress(bases[base], plan, **more)


def test_an_opened_base_is_not_read_block_by_block(bases, tmp_path):
    with pytest.raises(RecipeError, match=says("reads the base block by block", f"give the text {bases[0]!r}")):
        compression.compress(compression.open_base(bases[0]), "rtn(group_size=8)", into=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_why_recipes_of_a_list_cannot_be_is_what_each_would_be_refused_with(bases):
    texts = ["rtn(group_size=8)", "rtn(group_size=24)", "kd", "magnitude-hqq(group_size=8)"]

    plans, refused = compression.Planner(bases[0], calibration=IDS).plan_all(map(Recipe.parse, texts))

    assert ([texts[0]], texts[1:]) == (list(plans), list(refused))
    for text, words in refused.items():
        with pytest.raises(CompressionError) as error:
            compression.plan(bases[0], text, calibration=IDS)
        assert words == str(error.value)


@pytest.mark.parametrize(
    ("text", "format", "words"),
    [
        ("nf4(group_size=32)", "gptq", "format gptq cannot hold model.layers.0"),
        ("rtn(group_size=32,symmetric=true,embeddings=8)", "gptq", "cannot hold model.embed_tokens"),
        ("rtn(group_size=32,symmetric=true)", "exl2", "format 'exl2' cannot be written"),
    ],
)
def test_a_format_that_cannot_hold_the_result_is_refused_from_shapes(bases, text, format, words):
    with pytest.raises(LayerError, match=words):
        compression.plan(bases[0], text).check_format(format)


def test_a_recipe_that_needs_the_whole_model_says_so(bases):
    assert "magnitude(scope=global) works on the whole model at once" == compression.plan(
        bases[0], "rtn(group_size=8)-magnitude(scope=global)").whole_model  # fmt: skip
    assert None is compression.plan(bases[0], "rtn(group_size=8)-magnitude").whole_model


def test_what_the_code_of_a_method_raises_without_weights_is_told_with_its_place(bases, monkeypatch):
    def explode(self, linear, context):
        raise ZeroDivisionError("no groups")

    monkeypatch.setattr(RTN, "compress_linear", explode)
    words = says("rtn(group_size=8) cannot be planned: RTN raised ZeroDivisionError", "no groups", "test_plan.py:")
    with pytest.raises(RecipeError, match=words) as told:
        compression.plan(bases[0], "rtn(group_size=8)")
    assert isinstance(told.value.__cause__, ZeroDivisionError)
