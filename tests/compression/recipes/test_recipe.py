"""Recipes: what can be written, what it means, how it prints, and what is refused in which words."""

import dataclasses
import json
import sys
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from processes import REPOSITORY, completed
from strategies import recipe_texts, recipes

from compression import Recipe, RecipeError, Step, list_methods, split_recipes
from compression.engine.schedule import make_schedule
from compression.methods.base import BlockMethod, LayerMethod, ModelMethod
from compression.methods.quantization.weight_activation.llm_int8 import LLMInt8
from compression.methods.quantization.weight_only.nf4 import NF4
from compression.methods.quantization.weight_only.rtn import RTN
from compression.recipes.recipe import slug
from compression.recipes.registry import _ALIASES, METHODS, Method, method


def one(text):
    """The only step of a recipe."""
    (step,) = Recipe.parse(text).steps
    return step


# --- Grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nf4", [NF4()]),
        ("rtn", [RTN()]),
        ("rtn()", [RTN()]),
        ("rtn(bits=3)", [RTN(bits=3)]),
        ("rtn:bits=3:group_size=64", [RTN(bits=3, group_size=64)]),
        ("rtn(bits=3):group_size=64", [RTN(bits=3, group_size=64)]),
        ("rtn(group_size=-1)", [RTN(group_size=-1)]),
        ("rtn:group_size=-1-nf4", [RTN(group_size=-1), NF4()]),
        ("rtn(symmetric=true,backend=torch)", [RTN(symmetric=True, backend="torch")]),
        ('rtn(backend="torch")', [RTN(backend="torch")]),
        ("nf4(double_quant=false)", [NF4(double_quant=False)]),
        ("llm_int8(threshold=5)", [LLMInt8(threshold=5.0)]),
        ("llm_int8(threshold=.5)", [LLMInt8(threshold=0.5)]),
        ("llm_int8(threshold=1e-3)", [LLMInt8(threshold=0.001)]),
        ("rtn(bits=8)-nf4-llm_int8", [RTN(bits=8), NF4(), LLMInt8()]),
        ("fp16", []),
        ("fp16-nf4", [NF4()]),
        ("  nf4\n", [NF4()]),
        ("q", [NF4()]),
    ],
)
def test_a_text_means_its_methods_with_their_parameters(text, expected):
    assert expected == [step.method for step in Recipe.parse(text).steps]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fp16", "fp16"),
        ("q", "nf4"),
        ("rtn(bits=4,group_size=128)", "rtn"),
        ("rtn:group_size=64:bits=3", "rtn(bits=3,group_size=64)"),
        ("q-rtn(symmetric=true)-q", "nf4-rtn(symmetric=true)-nf4"),
        ("llm_int8(threshold=5)", "llm_int8(threshold=5.0)"),
        ('rtn(layers={ "*.down_proj": {"bits": 8} })', 'rtn(layers={"*.down_proj":{"bits":8}})'),
        ('rtn(bits=3,layers={"a":null,"b":{"bits":3}})', 'rtn(bits=3,layers={"a":null,"b":{}})'),
    ],
)
def test_the_canonical_text_has_no_alias_and_no_default(text, canonical):
    assert canonical == Recipe.parse(text).text == str(Recipe.parse(text))


def test_every_alias_means_its_method():
    list_methods()
    assert "nf4" == _ALIASES["q"]
    for alias, name in _ALIASES.items():
        assert METHODS[name] is type(one(alias).method)


@given(recipes)
def test_a_recipe_prints_as_text_that_means_the_same(recipe):
    assert recipe == Recipe.parse(recipe.text)


@given(recipes)
def test_a_recipe_survives_json(recipe):
    text = json.dumps(recipe.to_json(), allow_nan=False)

    assert recipe == Recipe.from_json(json.loads(text))


@given(recipe_texts)
@example('rtn(layers={"\ud800\\udc00":null})')  # read again, its two halves would be one letter
@settings(max_examples=300)
def test_any_text_is_a_recipe_that_prints_back_or_a_recipe_error(text):
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert recipe == Recipe.parse(recipe.text)
    assert recipe.text == Recipe.parse(recipe.text).text


@given(recipe_texts)
@settings(max_examples=100)
def test_splitting_any_text_loses_nothing_or_is_a_recipe_error(text):
    try:
        parts = split_recipes(text)
    except RecipeError:
        return
    assert "".join(text.split()) == "".join(",".join(parts).split())


@given(recipes, recipes)
def test_recipes_that_differ_have_file_names_that_differ(a, b):
    assert (a == b) == (a.slug == b.slug) == (hash(a) == hash(b))
    assert a.slug == slug(a.text)
    assert set(a.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert len(a.slug) <= 100
    assert a.slug[0] not in ".-"


@given(recipes, recipes)
def test_a_list_of_recipes_splits_into_them(a, b):
    assert [a.text, "fp16", b.text] == split_recipes(f"{a.text}, fp16,{b.text}")


@pytest.mark.parametrize("text", ["", ",", "nf4,", "nf4,,rtn", " "])
def test_an_empty_recipe_in_a_list_is_refused(text):
    with pytest.raises(RecipeError, match="empty recipe"):
        split_recipes(text)


# --- Per-layer settings and files -------------------------------------------------------------------------------------


def test_layers_take_the_settings_of_the_first_pattern_that_matches():
    step = one('rtn(bits=3,layers={"model.layers.0.*":null,"*.down_proj":{"bits":8},"*_proj":{"group_size":64}})')

    assert step.for_layer("model.layers.0.mlp.down_proj") is None
    assert RTN(bits=8) == step.for_layer("model.layers.1.mlp.down_proj")
    assert RTN(bits=3, group_size=64) == step.for_layer("model.layers.1.mlp.up_proj")
    assert RTN(bits=3) == step.for_layer("model.layers.1.mlp.other")


def test_a_recipe_file_is_what_to_json_gives(tmp_path):
    recipe = Recipe.parse('rtn(bits=3,layers={"*.down_proj":{"bits":8}})-nf4')
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(recipe.to_json()))

    assert recipe == Recipe.parse(str(path)) == Recipe.parse(f" {path}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"schema": 1, "schema": 1, "steps": []}', "'schema' is there twice"),
        ('{"schema": 1, "steps": [{"method": "llm_int8", "threshold": NaN}]}', "NaN is not a finite number"),
        ("[]", 'a recipe in JSON is {"schema": 2'),
        ('{"schema": 3, "steps": []}', 'a recipe in JSON is {"schema": 2'),
        ('{"schema": true, "steps": []}', 'a recipe in JSON is {"schema": 2'),
        ('{"schema": 1}', 'a recipe in JSON is {"schema": 2'),
        ('{"schema": 1, "steps": [], "layer": {}}', 'a recipe in JSON is {"schema": 2'),
        ('{"schema": 1, "steps": ["nf4"]}', 'needs a "method"'),
        ('{"schema": 1, "steps": [{"method": "nf5"}]}', "did you mean nf4"),
        ('{"schema": 1, "steps": [{"method": "rtn", "bit": 3}]}', "did you mean bits"),
    ],
)
def test_a_recipe_file_that_cannot_be_is_refused(tmp_path, content, words):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(RecipeError) as caught:
        Recipe.parse(str(path))
    assert words in str(caught.value)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nf5", ["unknown method 'nf5'", "did you mean nf4", "fp16, ", "rtn", "q = nf4"]),
        ("fp61", ["did you mean fp16"]),
        ("rtn(bit=3)", ["rtn has no parameter 'bit'", "did you mean bits", "group_size=128", "bits=4 (2|3|4|5|6|7|8)"]),
        ("rtn(bits=9)", ["rtn(bits=9)", "allowed are 2, 3, 4, 5, 6, 7, 8"]),
        ("rtn(bits=4.0)", ["rtn(bits=4.0)", "allowed are 2, 3, 4, 5, 6, 7, 8"]),
        ("rtn(group_size=4)", ["rtn(group_size=4)", "allowed are -1 (per channel) and 8 or more"]),
        ("rtn(group_size=0)", ["allowed are -1"]),
        ("rtn(group_size=true)", ["expected int, got bool"]),
        ("rtn(symmetric=1)", ["expected bool, got int"]),
        ("rtn(backend=bitsandbytes)", ["allowed are auto, native, torch"]),
        ("nf4(group_size=96)", ["nf4(group_size=96)", "32, 64, 128"]),
        ("nf4(compute_dtype=fp16)", ["allowed are stored, float16, bfloat16, float32"]),
        ("llm_int8(threshold=0)", ["threshold=0.0", "must be above 0"]),
        ("llm_int8(threshold=-1)", ["must be above 0"]),
        ("llm_int8(threshold=1e999)", ["finite"]),
        (f"llm_int8(threshold={10**400})", ["must be a finite number"]),
        (f"rtn(bits={'1' * 5000})", ["Exceeds the limit"]),
        ("llm_int8(threshold=word)", ["expected float, got str"]),
        ("", ["at character 1", "the name of a method"]),
        ("NF4", ["at character 1", "lower case"]),
        ("rtn(bits=3", ["at character 11", "expected ',' or ')'"]),
        ("rtn(bits=3))", ["at character 12", "expected '-' and another step"]),
        ("rtn(bits)", ["expected '=' after 'bits'"]),
        ("rtn(bits=)", ["expected a value"]),
        ("rtn(bits=3,bits=4)", ["'bits' is given twice"]),
        ("nf4-", ["at character 5", "the name of a method"]),
        ("nf4--rtn", ["at character 5"]),
        ("nf4 - rtn", ["at character 4"]),
        ("nf4-fp16", ["stands first"]),
        ("fp16(bits=4)", ["takes no parameters"]),
        ("fp16-" * 5000 + "nf4", ["stands first"]),
        ("rtn(keep=-1)", ["keep=-1", "a whole number", "at either end"]),
        ("rtn(keep=true)", ["keep=true", "a whole number"]),
        ("slicegpt(keep=1)", ["slicegpt works on the whole model", "keeps no blocks"]),
        ("rtn(layers=3)", ["must map patterns to parameters"]),
        ('rtn(layers={"*":8})', ["'*' must map to parameters or none"]),
        ('rtn(layers={"*":{"bits":9}})', ["allowed are 2, 3, 4, 5, 6, 7, 8"]),
        ('rtn(layers={"*":{"layers":{}}})', ["rtn has no parameter 'layers'"]),
        ('rtn(layers={"a":null,"a":null})', ["'a' is there twice"]),
        ("rtn(layers=" + '{"a":' * 50_000, ["not JSON"]),
        ("rtn(layers={)", ["not JSON"]),
    ],
)
def test_what_cannot_be_is_refused_with_what_is_allowed(text, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    for word in words:
        assert word in str(caught.value)


# --- Registry ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry():
    """The registry, put back as it was afterwards."""
    list_methods()
    before, aliases = dict(METHODS), dict(_ALIASES)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)
    _ALIASES.clear()
    _ALIASES.update(aliases)


def declare(name, module="elsewhere.methods", kind="layer", **facts):
    """Register a method of that name as if `module` declared it."""
    body = {"__module__": module, "__doc__": f"Fake {name}."}
    work, base = ("compress_linear", LayerMethod) if kind == "layer" else ("apply", ModelMethod)
    body[work] = lambda self, *arguments: None
    return method(name, **facts)(dataclass(frozen=True, kw_only=True)(type("Fake", (base,), body)))


@pytest.mark.parametrize("reserved", ["layers", "keep"])
def test_a_parameter_that_every_step_has_is_no_parameter_of_a_method(registry, reserved):
    body = {"__module__": "elsewhere.methods", "__annotations__": {reserved: int}, reserved: 0,
            "compress_linear": lambda self, *arguments: None}  # fmt: skip

    with pytest.raises(RecipeError, match=f"every step has a parameter {reserved} already"):
        method("other")(type("Other", (LayerMethod,), body))


@pytest.mark.parametrize("spelling", ["nf4", "q"])
@pytest.mark.parametrize("as_alias", [False, True], ids=["name", "alias"])
def test_a_name_that_is_taken_is_refused_naming_both_modules(registry, spelling, as_alias):
    before = dict(registry)

    with pytest.raises(RecipeError, match=f"{spelling!r} is declared twice") as caught:
        declare("fake", aliases=(spelling,)) if as_alias else declare(spelling)
    assert "compression.methods.quantization.weight_only.nf4" in str(caught.value)
    assert "elsewhere.methods" in str(caught.value)
    assert before == registry


@pytest.mark.parametrize("name", ["fp16", "Nf4", "nf-4", "4bit", "", "n f"])
def test_a_name_that_no_recipe_could_spell_is_refused(registry, name):
    with pytest.raises(RecipeError, match="must be lower case letters"):
        declare(name)


def test_a_class_that_is_no_frozen_dataclass_or_does_nothing_is_refused(registry):
    with pytest.raises(RecipeError, match="must be a frozen, keyword-only dataclass"):
        method("fake")(type("Fake", (), {}))
    with pytest.raises(RecipeError, match="must be a frozen, keyword-only dataclass"):
        method("fake")(dataclass(kw_only=True)(type("Fake", (ModelMethod,), {})))
    with pytest.raises(RecipeError, match="no unit of work"):
        method("fake")(dataclass(frozen=True, kw_only=True)(type("Fake", (Method,), {})))
    with pytest.raises(RecipeError, match="lacks compress_linear"):
        method("fake")(type("Fake", (LayerMethod,), {}))
    with pytest.raises(RecipeError, match="lacks compress_block"):
        method("fake")(type("Fake", (BlockMethod,), {}))


def test_a_class_that_is_no_dataclass_is_made_one(registry):
    fake = method("fake")(type("Fake", (ModelMethod,), {"__annotations__": {"share": float}, "share": 0.25}))

    assert "fake(share=0.5)" == Recipe.parse("fake(share=0.5)").text
    with pytest.raises(dataclasses.FrozenInstanceError):
        fake().share = 1.0


def test_a_method_on_the_whole_model_has_no_settings_per_layer(registry):
    declare("fake", kind="model")

    with pytest.raises(RecipeError, match="works on the whole model"):
        Recipe.parse('fake(layers={"*":null})')


def test_every_method_declares_what_the_runner_must_know():
    for name, cls in list_methods().items():
        assert name == cls.info.name == one(name).name
        assert cls.__module__.split(".")[2] == cls.info.family
        assert cls.info.summary.endswith("."), name


# --- Order of the steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nf4", ["nf4"]),
        ("fp16", []),
        ("prune", ["prune"]),
        ("prune-train-nf4", ["prune", "train", "nf4"]),
        ("prune-nf4-train", ["prune", "nf4", "dequantize", "train", "nf4"]),
        ("nf4-prune-train", ["nf4", "dequantize", "prune", "train", "nf4"]),
        ("nf4-train-rtn(bits=3)", ["nf4", "dequantize", "train", "rtn(bits=3)"]),
        ("nf4-train-rtn-prune", ["nf4", "dequantize", "train", "rtn", "dequantize", "prune", "rtn"]),
        ("nf4-rtn", ["nf4", "dequantize", "rtn"]),
        ("nf4-edit", ["nf4", "edit"]),
        ("nf4-edit-prune", ["nf4", "edit", "dequantize", "prune", "nf4"]),
        ("nf4-cut", ["nf4", "cut"]),
        ("cut-train-nf4", ["cut", "train", "nf4"]),
        ("nf4-cut-train", ["nf4", "cut", "dequantize", "train", "nf4"]),
    ],
)
def test_packed_weights_are_dequantized_for_a_step_and_quantized_again_at_the_end(registry, text, expected):
    declare("prune", leaves="sparse")
    declare("train", kind="model", takes=("dense", "sparse"), leaves="dense")
    declare("edit", takes=("dense", "packed"), leaves="packed")
    declare("cut", kind="model", takes=("dense", "packed"), leaves=None)

    schedule = make_schedule(Recipe.parse(text).steps)

    assert expected == [what for _, what in schedule]
    assert all((step is None) == (what == "dequantize") and (step is None or isinstance(step, Step))
               for step, what in schedule)  # fmt: skip


# --- Imports ----------------------------------------------------------------------------------------------------------


def test_recipes_are_parsed_without_importing_torch():
    program = (
        "import sys, compression; compression.Recipe.parse('rtn(bits=3)-nf4-llm_int8').to_json();"
        "compression.list_methods(); compression.locate('random:mistral-7b');"
        "print([m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'bitsandbytes') if m in sys.modules])"
    )

    done = completed([sys.executable, "-c", program], cwd=REPOSITORY)

    assert ("[]", "") == (done.stdout.strip(), done.stderr)
