"""The contract of every registered method: the same checks for each of its rows, which broken methods fail.

Rows run on one shape that has what is hard: biases, tied embeddings, bf16; one row for each kind of stored tensors on a
second one without any of it. Methods that train do so on a model of one layer.
"""

import functools
import json
import re
import tempfile
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from contract_rows import CASES, CHEAPEST, EXPECTED, EXPECTED_FAILURES, REFUSED_GROUPS, Row, needs, rtn_bytes
from packed_layers import holds
from saboteurs import BROKEN_METHODS
from safetensors.torch import load_file
from strategies import gaussian
from tiny_models import TASK, fresh_base, linears, logits
from torch.utils._python_dispatch import TorchDispatchMode

import compression
from compression import LayerError, Recipe, Step
from compression.architectures import decoder
from compression.architectures.decoder import copy_sharing_tensors
from compression.engine.shapes import outcome
from compression.methods.cached import CacheMethod
from compression.recipes.registry import METHODS, built_in, method

pytestmark = pytest.mark.usefixtures("tiny_shapes")

FIRST, SECOND, ONE_LAYER = "tiny-qwen2-bf16", "tiny-llama-fp32", "tiny-qwen2-one-layer"
CONSTANT = -0.03
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def is_packed(layer):
    return holds(layer, "codes") or holds(layer, "ggml")


def weight_of(layer):
    return layer.dequantize() if is_packed(layer) else layer.weight


def stored_bytes_of(layer):
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def difference(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def constant(weight):
    return torch.full_like(weight, CONSTANT)


class Work(TorchDispatchMode):
    """Notes what is computed that holds values; shapes alone, as on the meta device, are no work."""

    VIEWS = ("detach", "alias", "view", "t")

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
        if isinstance(found, torch.Tensor) and not found.is_meta and name not in self.VIEWS:
            self.done.append(name)
        return found


class Compressed:
    """A recipe on a tiny model; compressed once, since all checks only read."""

    def __init__(self, row, recipe, shape):
        self.row, self.recipe, self.shape = row, recipe, shape
        self.base, self.before = fresh_base(shape)

    @functools.cached_property
    def result(self):
        return self.compress(self.base)

    @property
    def last(self):
        """The name of the last block."""
        return f"model.layers.{len(self.base.model.model.layers) - 1}"

    @property
    def head(self):
        """The weight that the row gives a head that had none of its own; without any it is empty."""
        model = self.base.model
        unties = self.row.unties and model.lm_head.weight is model.model.embed_tokens.weight
        return model.lm_head.weight if unties else torch.empty(0)

    def compress(self, base):
        """Anew: what training has left elsewhere is not looked at."""
        return compression.compress(
            base, self.recipe, teacher="self", downstream=TASK, cache=tempfile.mkdtemp(dir=self.folder)
        )

    def taken(self, result):
        """The layers of a result by the names that they had in the base; those that went are not there."""
        told, found = {entry.name: entry for entry in result.report}, linears(result.model)
        stayed = [name for name in linears(self.base.model) if not (self.row.cuts and told[name].outcome == "removed")]
        return {
            name: found[(told[name].detail.partition("; now ")[2] if self.row.cuts else "") or name] for name in stayed
        }

    def edited(self, edits):
        """The base with weights changed, each by the function that stands for its layer, in a model of its own."""
        model = copy_sharing_tensors(self.base.model)
        for name, edit in edits.items():
            linear = torch.nn.Linear(1, 1, device="meta")
            linear.__dict__.update(model.get_submodule(name).__dict__)
            linear._parameters = dict(linear._parameters)
            linear.weight = torch.nn.Parameter(edit(linear.weight.clone()), requires_grad=False)
            model.set_submodule(name, linear)
        return replace(self.base, model=model)

    @functools.cached_property
    def planted(self):
        """A base whose last block has a layer of zeros, a constant one and one with an outlier, and what becomes of it;
        compressed once for the three checks."""
        base = self.edited({
            f"{self.last}.self_attn.q_proj": torch.zeros_like,
            f"{self.last}.mlp.down_proj": constant,
            f"{self.last}.mlp.gate_proj": self.with_an_outlier,
        })  # fmt: skip
        return base, self.compress(base)

    @property
    def outlier(self):
        return 40 * float(self.before[f"{self.last}.mlp.gate_proj.weight"].abs().max())

    def with_an_outlier(self, weight):
        weight[5, 7] = self.outlier
        return weight


class TestContract:
    """What every method promises; each check takes a case and nothing else, so that broken methods can be sent too."""

    def test_every_linear_is_reported_and_the_report_is_true(self, case):
        expected = linears(case.base.model)
        entries = [entry for entry in case.result.report if entry.name in expected]
        after = case.taken(case.result)

        assert list(expected) == [entry.name for entry in entries]
        assert list(map(id, after.values())) == list(map(id, linears(case.result.model).values()))
        for entry in entries:
            if entry.name not in after:
                assert ("removed", True) == (entry.outcome, bool(entry.detail)), entry
                continue
            stored = (
                not isinstance(after[entry.name], torch.nn.Linear) if case.row.whole else is_packed(after[entry.name])
            )
            kept = not stored and torch.equal(after[entry.name].weight, expected[entry.name].weight)
            assert ("kept" if kept else "replaced", True) == (entry.outcome, bool(entry.detail)), entry
        assert {"model.embed_tokens", "lm_head", "norms"} == {e.name for e in case.result.report} - expected.keys()

    def test_outputs_and_weights_are_as_near_as_the_row_says(self, case):
        dense = linears(case.base.model)
        if case.row.whole:
            assert 0 < difference(logits(case.result.model), logits(case.base.model)) <= case.row.error
            return
        for name, layer in case.taken(case.result).items():
            if case.row.cuts:
                assert torch.isin(layer.weight.float(), dense[name].weight.float()).all(), name
                continue
            x = gaussian(9, layer.in_features, seed=3, std=1, dtype=dense[name].weight.dtype)
            assert 0 < difference(layer(x), dense[name](x)) <= case.row.error, name
            weight = weight_of(layer)
            assert 0 < difference(weight, dense[name].weight) <= case.row.error, name
            if case.row.zeros is not None:
                assert case.row.zeros(*weight.shape) == int((weight == 0).sum()), name

    def test_shapes_and_dtypes_are_kept(self, case):
        before, after = logits(case.base.model), logits(case.result.model)

        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert torch.isfinite(after).all()
        whole = sum(p.numel() for p in case.base.model.parameters()) + case.head.numel()
        fewer = case.row.cuts or case.row.kept is not None
        assert case.result.parameters < whole if fewer else case.result.parameters == whole

    def test_the_same_seed_gives_the_same_bytes(self, case):
        first, second = (r.model.state_dict() for r in (case.result, case.compress(case.base)))

        assert first.keys() == second.keys()
        assert [] == [name for name in first if not torch.equal(first[name], second[name])]

    def test_the_base_keeps_every_bit(self, case):
        logits(case.result.model)

        after = case.base.model.state_dict()
        changed = [name for name in after if not torch.equal(case.before[name], after[name])]
        if changed:  # others share this base
            case.base.model.load_state_dict(case.before)
        assert ([], case.before.keys()) == (changed, after.keys())

    def test_a_weight_of_zero_gives_the_bias_alone(self, case):
        name = f"{case.last}.self_attn.q_proj"
        layer = case.taken(case.planted[1])[name]
        bias = layer.bias if case.row.cuts else linears(case.base.model)[name].bias

        y = layer(gaussian(3, layer.in_features, std=1, dtype=case.before["model.embed_tokens.weight"].dtype))

        assert (weight_of(layer) == 0).all()
        expected = torch.zeros_like(y) if bias is None else bias.expand_as(y)
        torch.testing.assert_close(y, expected, rtol=0, atol=5e-5)  # a kernel may sum s * T[q] and s * z apart

    def test_a_constant_weight_stays_near_constant(self, case):
        name = f"{case.last}.mlp.down_proj"
        if case.row.whole:  # of which the outlier beside it would be seen too
            base = case.edited({name: constant})
            assert difference(logits(case.compress(base).model), logits(base.model)) <= case.row.error
            return
        weight = weight_of(case.taken(case.planted[1])[name])

        pruned = 0 if case.row.zeros is None else case.row.zeros(*weight.shape) / weight.numel()
        assert difference(weight, constant(weight)) <= case.row.error + pruned**0.5

    def test_one_outlier_survives_and_spoils_no_other_row(self, case):
        name, outlier = f"{case.last}.mlp.gate_proj", case.outlier
        base, result = case.planted
        if case.row.whole:
            assert difference(logits(result.model), logits(base.model)) <= 2 * case.row.error
            return
        weight = weight_of(case.taken(result)[name])

        if case.row.cuts:
            large = weight.abs() > outlier / 2
            assert [linears(base.model)[name].weight[5, 7]] == weight[large].tolist()
            assert torch.isin(weight[~large].float(), case.before[f"{name}.weight"].float()).all()
            return
        others = torch.arange(len(weight)) != 5
        assert abs(float(weight[5, 7]) - outlier) <= case.row.error * outlier
        assert difference(weight[others], case.before[f"{name}.weight"][others]) <= 1.5 * case.row.error

    def test_a_weight_that_is_not_finite_is_refused_naming_the_layer(self, case):
        def edit(weight):
            weight[3, 4] = float("nan")
            return weight

        name = f"{case.last}.mlp.up_proj"
        base = case.edited({name: edit})
        with pytest.raises(LayerError, match=rf"{re.escape(name)}.*NaN"):
            case.compress(base)

    def test_the_recipe_survives_text_and_json(self, case):
        assert case.recipe == Recipe.parse(case.recipe.text)
        assert case.recipe == Recipe.from_json(json.loads(json.dumps(case.recipe.to_json())))

    def test_what_is_stored_is_what_the_formula_adds_up_to(self, case):
        itemsize = case.before["model.embed_tokens.weight"].element_size()
        dense, taken = linears(case.base.model), case.taken(case.result)
        for name, layer in taken.items():
            expected = case.row.stored(layer.out_features, layer.in_features, itemsize)
            expected += 0 if dense[name].bias is None else itemsize * layer.out_features
            assert expected == stored_bytes_of(layer), name
        gone = tuple({name.split("self_attn")[0].split("mlp")[0] for name in dense.keys() - taken.keys()})
        packed = EMBEDDINGS if getattr(case.recipe.steps[-1].method, "embeddings", 16) == 8 else ()
        rest = {p.data_ptr(): p.numel() + itemsize * len(p) if n in packed else p.numel() * itemsize
                for n, p in case.base.model.named_parameters()
                if n.rsplit(".", 1)[0] not in dense and not n.startswith(gone)}  # fmt: skip
        if case.row.kept is not None:
            rest = {None: case.row.kept(case.base.model.config, itemsize)}
        rest["head"] = case.head.nbytes
        assert sum(rest.values()) + sum(map(stored_bytes_of, taken.values())) == case.result.stored_bytes

    def test_what_is_saved_and_opened_again_computes_the_same_bits(self, case):
        expected = logits(case.result.model)
        folder = case.folder / "saved"
        case.result.save(folder)

        opened = compression.load(folder)

        assert torch.equal(expected, logits(opened.model))
        (path,) = folder.glob("*.safetensors")
        sizes = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(sizes) == opened.stored_bytes == case.result.stored_bytes
        for attribute in ("recipe", "report", "executed", "base", "cost", "portable", "parameters"):
            assert getattr(case.result, attribute) == getattr(opened, attribute), attribute

    def test_every_format_that_takes_it_gives_the_same_weights_back(self, case):
        for format in case.result.published_formats:
            opened = compression.load(case.result.save(case.folder / format, format))

            assert case.result.recipe == opened.recipe
            for name, layer in decoder.stored_layers(case.result.model).items():
                assert torch.equal(layer.dequantize(), opened.model.get_submodule(name).dequantize()), (format, name)

    def test_groups_that_do_not_divide_are_refused_before_any_work(self, case):
        base, _ = fresh_base("tiny-odd")
        (step,) = case.recipe.steps
        group = 32 if step.name in REFUSED_GROUPS else getattr(step.method, "group_size", -1)
        group = -1 if isinstance(step.method, CacheMethod) else group  # of tokens, or of the channels of a head
        if group == -1 or all(linear.in_features % group == 0 for linear in linears(base.model).values()):
            case.compress(base)
            return
        with Work() as work, pytest.raises(LayerError) as refused:
            case.compress(base)
        assert [] == work.done
        divides = (f"={group} does not divide the 200 inputs", "near it: ")
        for each in ("model.layers.0.mlp.down_proj", *REFUSED_GROUPS.get(step.name, divides)):
            assert each in str(refused.value)


ON_SHAPES = [(FIRST, each) for each in CASES] + [(SECOND, each) for each in CASES if each.row.second]


@pytest.fixture(params=ON_SHAPES, ids=lambda each: f"{each[0]}-{each[1]}")
def case(request, tmp_path):
    shape, row = request.param
    needed = needs(row.recipe)
    if "bitsandbytes" in needed:
        pytest.importorskip("bitsandbytes")
    if reason := EXPECTED_FAILURES.get((row.method, request.function.__name__)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError))
    found = compressed(row, ONE_LAYER if "training" in needed and shape == FIRST else shape)
    found.folder = tmp_path
    return found


@functools.cache
def compressed(row, shape):
    return Compressed(row.row, Recipe.parse(row.recipe), shape)


def test_every_registered_method_has_a_row_and_every_row_is_of_one():
    assert {name for name, cls in built_in().items() if cls.engine is None} == set(EXPECTED)  # others: test_on_load.py
    assert set(CHEAPEST) | {name for name, _ in EXPECTED_FAILURES} <= set(EXPECTED)
    assert {check for _, check in EXPECTED_FAILURES} <= set(vars(TestContract))


def test_each_kind_of_stored_tensors_is_checked_on_both_shapes():
    base, _ = fresh_base(SECOND)

    def kind(row):
        stored = outcome(Recipe.parse(row.recipe), base.model)
        return frozenset((type(module).__name__, name, tensor.dtype) for module in stored.modules()
                         for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name)  # fmt: skip

    kinds = {row: kind(row) for row in CASES if "bitsandbytes" not in needs(row.recipe)}
    twice = {found for row, found in kinds.items() if row.row.second}

    assert [] == [row.recipe for row, found in kinds.items() if found not in twice]


WITH_BITS = [
    name
    for name, cls in compression.list_methods().items()
    if "bits" in cls.__annotations__ and not issubclass(cls, CacheMethod)
]


@pytest.mark.parametrize("name", WITH_BITS)
def test_fewer_bits_are_stored_in_fewer_bytes(name):
    base, _ = fresh_base("tiny-llama")
    widths = get_args(get_type_hints(METHODS[name])["bits"])

    cheap = "".join(f",{each}" for each in [CHEAPEST.get(name)] if each)

    sizes = [compression.compress(base, f"{name}(bits={bits}{cheap})").stored_bytes for bits in widths]

    assert list(widths) == sorted(widths)
    assert sizes == sorted(set(sizes))


# --- Negative controls ------------------------------------------------------------------------------------------------

AS_IF = Row(0.13, rtn_bytes(4, 32))


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield lambda cls: method("broken")(cls)
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("broken", BROKEN_METHODS, ids=lambda cls: cls.__name__)
def test_the_contract_catches_a_broken_method(registered, broken, tmp_path):
    registered(broken)
    case = Compressed(AS_IF, Recipe((Step(broken(group_size=32)),)), "tiny-qwen2")
    case.folder = tmp_path

    missed = pytest.fail.Exception if broken.__name__ == "MendsWhatIsNotFinite" else AssertionError  # no refusal came
    with pytest.raises(missed):
        getattr(TestContract(), BROKEN_METHODS[broken])(case)


@pytest.mark.parametrize("check", [name for name in vars(TestContract) if name.startswith("test_")])
def test_the_contract_passes_the_method_that_the_broken_ones_are_made_of(check, tmp_path):
    case = Compressed(AS_IF, Recipe.parse("rtn(group_size=32)"), "tiny-qwen2")
    case.folder = tmp_path

    getattr(TestContract(), check)(case)
