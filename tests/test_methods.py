"""The contract of every method: one row for each recipe, and the same checks for all of them.

A new method adds its row to ROWS; without one, `test_every_registered_method_has_a_row` fails.
"""

import functools
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import pytest
import torch
from saboteurs import BROKEN_METHODS
from safetensors import safe_open
from strategies import gaussian

import compression
from compression import LayerError, Recipe, RecipeError, Step
from compression._blocks import copy_sharing_tensors, decoder_blocks
from compression._downstream import Downstream, Texts
from compression._linear import PackedLinear
from compression._registry import METHODS, CalibratedMethod, CalibratedQuantizer, method
from compression._shapes import SHAPES

COMMON = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
TINY = {
    "tiny-llama": COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "tiny-qwen2": COMMON | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "dtype": "float32",
    },
    "tiny-odd": COMMON | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "float32",
        "hidden_size": 104, "intermediate_size": 200,
    },
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 64


def rtn_bytes(bits, group, *, zeros=True):
    """Codes, one scale and one zero point to a group; every row rounded up to whole bytes."""

    def count(rows, cols, itemsize):
        groups = 1 if group == -1 else cols // group
        return rows * (math.ceil(cols * bits / 8) + groups * itemsize + zeros * math.ceil(groups * bits / 8))

    return count


def hqq_bytes(bits, group):
    """Zero points are real numbers, as large as scales."""

    def count(rows, cols, itemsize):
        groups = 1 if group == -1 else cols // group
        return rtn_bytes(bits, group, zeros=False)(rows, cols, itemsize) + rows * groups * itemsize

    return count


def act_order_bytes(bits, group):
    """The same without zero points, and 4 bytes to a column for its place."""
    return lambda rows, cols, itemsize: rtn_bytes(bits, group, zeros=False)(rows, cols, itemsize) + 4 * cols


def nf4_bytes(group, *, double=True):
    """Half a byte to a weight; absmax in 8 bits, with one fp32 scale to 256 of them and one mean, or in fp32."""

    def count(rows, cols, itemsize):
        n = rows * cols // group
        return rows * cols // 2 + (n + 4 * math.ceil(n / 256) + 4 if double else 4 * n)

    return count


def dense_bytes(rows, cols, itemsize):
    return rows * cols * itemsize


def half(rows, cols):
    return rows * cols // 2


def thirds_of_rows(rows, cols):
    """0.3 of each row."""
    return rows * (cols * 3 // 10)


def bitmask_bytes(zeros):
    """A bit to a weight, rows rounded up to whole bytes, and the values that are not zero."""
    return lambda rows, cols, itemsize: rows * math.ceil(cols / 8) + itemsize * (rows * cols - zeros(rows, cols))


def nm_bytes(n, m, bits):
    """n values of m, and the place of each in `bits` bits."""
    return lambda rows, cols, itemsize: rows * (itemsize * cols * n // m + math.ceil(cols * n // m * bits / 8))


@dataclass(frozen=True)
class Row:
    """A recipe, the relative error of outputs and weights that a Gaussian layer may have under it, and its size.

    Attributes:
        error: |y - y_dense| / |y_dense|, Frobenius, for Gaussian weights and inputs. (Calibrated methods are worse on
            these than rounding to nearest: they trade them for the inputs that they have seen. `awq` scales weights
            besides, which counts as error here; `test_scaling.py` compares what the whole block computes.)
        stored: bytes of a layer without its bias, from (rows, cols, bytes of the base's dtype).
        zeros: how many weights of a layer are zero, from (rows, cols); None where nothing is promised of one layer.
        cuts: whether layers, or rows and columns of them, are taken out; what is left keeps its bits.
    """

    recipe: str
    error: float
    stored: Callable[[int, int, int], int]
    zeros: Callable[[int, int], int] | None = None
    cuts: bool = False

    def __str__(self):
        return self.recipe


ROWS = (
    Row("nf4", 0.11, nf4_bytes(64)),
    Row("nf4(double_quant=false,group_size=32)", 0.10, nf4_bytes(32, double=False)),
    Row("nf4(compute_dtype=bfloat16)", 0.11, nf4_bytes(64)),
    Row("nf4(compute_dtype=float16,backend=bitsandbytes)", 0.11, nf4_bytes(64)),
    Row("llm_int8", 0.02, lambda rows, cols, itemsize: rows * cols + 4 * rows),
    Row("rtn(bits=8)", 0.012, rtn_bytes(8, 128)),
    Row("rtn(bits=8,group_size=-1,symmetric=true)", 0.015, rtn_bytes(8, -1, zeros=False)),
    Row("rtn", 0.12, rtn_bytes(4, 128)),
    Row("rtn(group_size=32,symmetric=true,backend=torch)", 0.11, rtn_bytes(4, 32, zeros=False)),
    Row("rtn(bits=3,group_size=64)", 0.25, rtn_bytes(3, 64)),
    Row("rtn(bits=2,group_size=8)", 0.35, rtn_bytes(2, 8)),
    Row("rtn(bits=2)", 0.65, rtn_bytes(2, 128)),
    Row("hqq", 0.11, hqq_bytes(4, 64)),
    Row("hqq(bits=3,group_size=32,backend=torch)", 0.25, hqq_bytes(3, 32)),
    Row("hqq(bits=2,group_size=32)", 0.55, hqq_bytes(2, 32)),
    Row("hqq(bits=8,group_size=-1)", 0.015, hqq_bytes(8, -1)),
    Row("gptq(samples=8,sequence_length=32)", 0.22, rtn_bytes(4, 128, zeros=False)),
    Row("gptq(bits=3,group_size=32,symmetric=false,samples=8,sequence_length=32)", 0.35, rtn_bytes(3, 32)),
    Row("gptq(bits=8,group_size=-1,act_order=true,samples=8,sequence_length=32)", 0.02, act_order_bytes(8, -1)),
    Row("gptq(group_size=32,act_order=true,samples=8,sequence_length=32)", 0.21, act_order_bytes(4, 32)),
    Row(
        "gptq(bits=2,group_size=32,act_order=true,static_groups=true,samples=8,sequence_length=32)",
        1.0,
        rtn_bytes(2, 32, zeros=False),
    ),
    Row("awq(n_grid=1,clip=false,samples=8,sequence_length=32)", 0.12, rtn_bytes(4, 128)),
    Row("awq(samples=8,sequence_length=32)", 0.35, rtn_bytes(4, 128)),
    Row("awq(bits=3,group_size=32,symmetric=true,duo_scaling=true,samples=8,sequence_length=32)", 0.5,
        rtn_bytes(3, 32, zeros=False)),
    Row("awq(bits=8,group_size=-1,rounding=gptq,samples=8,sequence_length=32)", 0.35, rtn_bytes(8, -1)),
    Row("magnitude", 0.29, dense_bytes, half),
    Row("magnitude(sparsity=0.3,scope=row,store=bitmask)", 0.15, bitmask_bytes(thirds_of_rows), thirds_of_rows),
    Row("magnitude(sparsity=0.4,scope=global)", 0.29, dense_bytes),
    Row("wanda(pattern=4:8,store=bitmask,samples=8,sequence_length=32)", 0.36, bitmask_bytes(half), half),
    Row("sparsegpt(samples=8,sequence_length=32)", 0.8, dense_bytes, half),
    Row("sparsegpt(pattern=2:4,store=nm,damp=1.0,samples=8,sequence_length=32)", 0.5, nm_bytes(2, 4, 2), half),
    Row("structured", 0.0, dense_bytes, cuts=True),
    Row("structured(keep_layers=none,keep_kv_heads=1,heads=importance,samples=4)", 0.0, dense_bytes, cuts=True),
    Row("p(samples=8,sequence_length=32)", 0.0, dense_bytes, cuts=True),
    Row("kd(samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2,learning_rate=0.001)", 0.06, dense_bytes),
    Row("distilled(targets=all,samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2,warmup=0,learning_rate=0.005)",
        0.06, dense_bytes),
    Row("recover(rank=4,learning_rate=0.003,warmup=0)", 0.3, dense_bytes),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny_shapes():
    with pytest.MonkeyPatch.context() as patch:
        for name, config in TINY.items():
            patch.setitem(SHAPES, name, config)
        yield
    fresh_base.cache_clear()


class Numbered(Downstream):
    """A task in token ids: the tokenizer of bytes has more than the vocabulary of the tiny shapes."""

    def texts(self, tokenizer, *, samples, length, seed):
        ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(seed))
        every = torch.ones_like(ids, dtype=torch.bool)
        return Texts(ids, every, every, len(ids))


TASK = Numbered("numbered", lambda: [("numbers", "numbers")])


@functools.cache
def fresh_base(shape):
    base = compression.open_base(f"random:{shape}")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.02, generator=generator)
    return base, {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def linears(model):
    return dict(pair for block in decoder_blocks(model) for pair in block.linears())


def logits(model):
    return model(TOKENS, use_cache=False).logits


def weight_of(layer):
    return layer.dequantize() if isinstance(layer, PackedLinear) else layer.weight


def stored_bytes_of(layer):
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def difference(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


class Case:
    """A recipe on a tiny model; compressed once, since all checks only read."""

    def __init__(self, row, recipe, shape):
        self.row, self.recipe, self.shape = row, recipe, shape
        self.base, self.before = fresh_base(shape)

    @functools.cached_property
    def result(self):
        return self.compress(self.base)

    @property
    def trains(self):
        return any(step.method.trains for step in self.recipe.steps)

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

    def edited(self, name, edit):
        """The base with one weight changed, in a model of its own."""
        model = copy_sharing_tensors(self.base.model)
        linear = torch.nn.Linear(1, 1, device="meta")
        linear.__dict__.update(model.get_submodule(name).__dict__)
        linear._parameters = dict(linear._parameters)
        linear.weight = torch.nn.Parameter(edit(linear.weight.clone()), requires_grad=False)
        model.set_submodule(name, linear)
        return replace(self.base, model=model)


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
            kept = not isinstance(after[entry.name], PackedLinear) and torch.equal(
                after[entry.name].weight, expected[entry.name].weight
            )
            assert ("kept" if kept else "replaced", True) == (entry.outcome, bool(entry.detail)), entry
        assert {"model.embed_tokens", "lm_head", "norms"} == {e.name for e in case.result.report} - expected.keys()

    def test_outputs_and_weights_are_as_near_as_the_row_says(self, case):
        dense = linears(case.base.model)
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
        whole = sum(p.numel() for p in case.base.model.parameters())
        assert case.result.parameters < whole if case.row.cuts else case.result.parameters == whole

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
        if case.trains:
            pytest.skip("training fills zeros that no step before it has pruned")
        name = "model.layers.1.self_attn.q_proj"
        layer = case.taken(case.compress(case.edited(name, torch.zeros_like)))[name]
        bias = layer.bias if case.row.cuts else linears(case.base.model)[name].bias

        y = layer(gaussian(3, layer.in_features, std=1, dtype=case.before["model.embed_tokens.weight"].dtype))

        assert (weight_of(layer) == 0).all()
        expected = torch.zeros_like(y) if bias is None else bias.expand_as(y)
        torch.testing.assert_close(y, expected, rtol=0, atol=5e-5)  # a kernel may sum s * T[q] and s * z apart

    def test_a_constant_weight_stays_near_constant(self, case):
        name = "model.layers.1.mlp.down_proj"
        base = case.edited(name, lambda w: torch.full_like(w, -0.03))

        weight = weight_of(case.taken(case.compress(base))[name])

        pruned = 0 if case.row.zeros is None else case.row.zeros(*weight.shape) / weight.numel()
        assert difference(weight, torch.full_like(weight, -0.03)) <= case.row.error + pruned**0.5

    def test_one_outlier_survives_and_spoils_no_other_row(self, case):
        name = "model.layers.1.mlp.gate_proj"
        outlier = 40 * float(case.before[f"{name}.weight"].abs().max())

        def edit(weight):
            weight[5, 7] = outlier
            return weight

        base = case.edited(name, edit)
        weight = weight_of(case.taken(case.compress(base))[name])

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

        base = case.edited("model.layers.1.mlp.up_proj", edit)
        with pytest.raises(LayerError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
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
        rest = {p.data_ptr(): p.numel() * itemsize for n, p in case.base.model.named_parameters()
                if n.rsplit(".", 1)[0] not in dense and not n.startswith(gone)}  # fmt: skip
        assert sum(rest.values()) + sum(map(stored_bytes_of, taken.values())) == case.result.stored_bytes

    def test_what_is_saved_and_opened_again_computes_the_same_bits(self, case):
        expected = logits(case.result.model)
        folder = case.folder / "saved"
        case.result.save(folder)

        opened = compression.load(folder)

        assert torch.equal(expected, logits(opened.model))
        with safe_open(folder / "model.safetensors", "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 - not a mapping
        assert sum(sizes) == opened.stored_bytes == case.result.stored_bytes
        for attribute in ("recipe", "report", "executed", "base", "cost", "portable", "parameters"):
            assert getattr(case.result, attribute) == getattr(opened, attribute), attribute

    def test_groups_that_do_not_divide_are_refused_before_any_work(self, case):
        base, _ = fresh_base("tiny-odd")
        (step,) = case.recipe.steps
        group = getattr(step.method, "group_size", -1)
        if group == -1 or all(cols % group == 0 for cols in (104, 200)):
            case.compress(base)
            return
        worked = []
        with pytest.MonkeyPatch.context() as patch:
            name = "round" if isinstance(step.method, CalibratedQuantizer) else "compress_linear"
            work = getattr(type(step.method), name)
            patch.setattr(type(step.method), name, lambda *arguments: worked.append(1) or work(*arguments))
            with pytest.raises(LayerError) as refused:
                case.compress(base)
        assert [] == worked
        for words in ("model.layers.0.self_attn.q_proj", f"={group} does not divide the 104 inputs", "near it: "):
            assert words in str(refused.value)


CASES = [(row, shape) for shape in ("tiny-llama", "tiny-qwen2") for row in ROWS]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def case(request, tmp_path):
    row, shape = request.param
    if "bitsandbytes" in row.recipe or "bitsandbytes" in Recipe.parse(row.recipe).steps[0].method.info.needs:
        pytest.importorskip("bitsandbytes")
    found = cached_case(row, shape)
    found.folder = tmp_path
    return found


@functools.cache
def cached_case(row, shape):
    return Case(row, Recipe.parse(row.recipe), shape)


def test_every_registered_method_has_a_row():
    rows = {step.name for row in ROWS for step in Recipe.parse(row.recipe).steps}

    assert set(compression.methods()) == rows


WITH_BITS = [name for name, cls in compression.methods().items() if "bits" in cls.__annotations__]


@pytest.mark.parametrize("name", WITH_BITS)
def test_fewer_bits_are_stored_in_fewer_bytes(name):
    base, _ = fresh_base("tiny-llama")
    widths = get_args(get_type_hints(METHODS[name])["bits"])

    options = ",samples=2,sequence_length=16" if issubclass(METHODS[name], CalibratedMethod) else ""

    sizes = [compression.compress(base, f"{name}(bits={bits}{options})").stored_bytes for bits in widths]

    assert list(widths) == sorted(widths)
    assert sizes == sorted(set(sizes))


def test_fp16_is_the_base_itself():
    base, before = fresh_base("tiny-qwen2")

    result = compression.compress(base, "fp16")

    assert torch.equal(logits(base.model), logits(result.model))
    assert {id(p) for p in base.model.parameters()} == {id(p) for p in result.model.parameters()}
    assert ((), (), ("transformers",)) == (result.report, result.executed, result.portable)
    assert sum(t.nbytes for n, t in before.items() if n != "lm_head.weight") == result.stored_bytes


def test_layers_that_the_recipe_leaves_alone_or_sets_otherwise_are_reported_so():
    base, _ = fresh_base("tiny-llama")

    result = compression.compress(base, 'rtn(bits=3,layers={"model.layers.0.*":null,"*.down_proj":{"bits":8}})')

    after = linears(result.model)
    outcomes = {entry.name: (entry.outcome, entry.detail) for entry in result.report}
    assert ("kept", "the recipe leaves this layer alone") == outcomes["model.layers.0.mlp.up_proj"]
    assert after["model.layers.0.mlp.up_proj"].weight is linears(base.model)["model.layers.0.mlp.up_proj"].weight
    assert 8 == after["model.layers.1.mlp.down_proj"].grid.bits
    assert 3 == after["model.layers.1.mlp.up_proj"].grid.bits
    assert outcomes["model.layers.1.mlp.down_proj"][1].startswith("rtn(bits=8)")


def test_a_pattern_that_no_layer_matches_is_refused():
    base, _ = fresh_base("tiny-llama")

    with pytest.raises(RecipeError, match=r"no layer matches '\*.down'; layers are called e.g. model.layers.0"):
        compression.compress(base, 'rtn(layers={"*.down":{"bits":8}})')


def test_two_quantizers_in_a_row_are_run_with_a_dequantize_between_them():
    base, _ = fresh_base("tiny-llama")

    result = compression.compress(base, "rtn(bits=8)-nf4")

    assert ("rtn(bits=8)", "dequantize", "nf4") == result.executed
    assert {"nf4"} == {layer.grid.kind for layer in linears(result.model).values()}


# --- Negative controls ------------------------------------------------------------------------------------------------

AS_IF = Row("broken(group_size=32)", 0.13, rtn_bytes(4, 32))


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield lambda cls: method("broken")(cls)
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("broken", BROKEN_METHODS, ids=lambda cls: cls.__name__)
def test_the_contract_catches_a_broken_method(registered, broken, tmp_path):
    registered(broken)
    case = Case(AS_IF, Recipe((Step(broken(group_size=32)),)), "tiny-qwen2")
    case.folder = tmp_path

    missed = pytest.fail.Exception if broken.__name__ == "MendsWhatIsNotFinite" else AssertionError  # no refusal came
    with pytest.raises(missed):
        getattr(TestContract(), BROKEN_METHODS[broken])(case)


@pytest.mark.parametrize("check", [name for name in vars(TestContract) if name.startswith("test_")])
def test_the_contract_passes_the_method_that_the_broken_ones_are_made_of(check, tmp_path):
    case = Case(replace(AS_IF, recipe="rtn(group_size=32)"), Recipe.parse("rtn(group_size=32)"), "tiny-qwen2")
    case.folder = tmp_path

    getattr(TestContract(), check)(case)
