"""Pruning: exact counts, SparseGPT against its own arithmetic written plainly, zeros that stay, stored bytes."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from saboteurs import BROKEN_MASKS
from strategies import DTYPES, gaussian, seeds, weights
from test_rounding import hessian_of, inputs

import compression
from compression import LayerError, Recipe, RecipeError
from compression import _sparsity as sparsity
from compression._blocks import STACKS, Inputs, decoder_blocks
from compression._linear import PackedLinear
from compression._registry import METHODS, Method, method
from compression._rounding import Hessian, relative_error
from compression._schedule import make_schedule
from compression._shapes import SHAPES
from compression._sparse_linear import SparseLinear
from compression.pruning.magnitude import Magnitude
from compression.pruning.wanda import Wanda
from compression.quantization.awq import AWQ
from compression.quantization.gptq import GPTQ
from compression.quantization.hqq import HQQ
from compression.quantization.llm_int8 import LLMInt8
from compression.quantization.nf4 import NF4
from compression.quantization.rtn import RTN

TINY = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "dtype": "bfloat16",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
SMALL = "samples=4,sequence_length=24"
TOKENS = torch.arange(24).view(2, 12) * 7 % 256
PATTERNS = ((2, 4), (4, 8), (1, 4), (3, 4), (5, 16))
shares = st.one_of(st.sampled_from((0.0, 0.1, 0.29, 0.5, 0.7, 0.99)), st.floats(0, 1, exclude_max=True))


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny-pruned", TINY)
    return compression.open_base("random:tiny-pruned")


def linears(model):
    return dict(pair for block in decoder_blocks(model) for pair in block.linears())


def weight_of(layer):
    return layer.dequantize() if isinstance(layer, PackedLinear) else layer.weight


def with_ties(rows, cols, seed):
    """A weight of few values, as whole numbers of both signs and zero."""
    return gaussian(rows, cols, seed=seed, std=2).round()


# --- Masks ------------------------------------------------------------------------------------------------------------


def ranked(scores, count):
    """The mask of a list of scores, by sorting."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in set(order[:count]) for i in range(len(scores))]


def check_masks(choose, seed=0, share=0.5):
    """Both ways of counting, and patterns, against sorting; on weights with many ties."""
    scores = with_ties(5, 48, seed).abs()
    by_row = [ranked(row, sparsity.removed(share, 48)) for row in scores.tolist()]
    assert by_row == choose(scores, share, None, by_row=True).tolist()
    of_all = ranked(scores.flatten().tolist(), sparsity.removed(share, 240))
    assert of_all == choose(scores, share, None, by_row=False).flatten().tolist()
    for n, m in PATTERNS:
        expected = [ranked(group, m - n) for group in scores.view(-1, m).tolist()]
        assert expected == choose(scores, share, (n, m), by_row=False).view(-1, m).tolist()


@given(seeds, shares)
@example(0, 0.5)
def test_the_lowest_scores_go_and_of_equal_ones_the_first(seed, share):
    check_masks(sparsity.choose, seed, share)


@pytest.mark.parametrize("broken", BROKEN_MASKS, ids=lambda f: f.__name__)
def test_a_broken_mask_is_caught(broken):
    with pytest.raises(AssertionError):
        check_masks(broken)


@given(st.integers(0, 10**7), st.integers(0, 99))
def test_the_count_is_the_floor_of_the_share_as_it_is_written(count, hundredths):
    assert count * hundredths // 100 == sparsity.removed(hundredths / 100, count)


@given(seeds, shares, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(DTYPES), st.booleans())
def test_over_all_layers_the_smallest_weights_go(seed, share, rows, dtype, ties):
    parts = [(with_ties if ties else gaussian)(r, 16, seed=seed + i).to(dtype) for i, r in enumerate(rows)]

    masks = sparsity.smallest_overall(parts, share)

    together = [w for part in parts for w in part.abs().flatten().tolist()]
    expected = ranked(together, sparsity.removed(share, len(together)))
    assert expected == [m for mask in masks for m in mask.flatten().tolist()]


@given(seeds, st.lists(st.integers(-20, 20), min_size=6, max_size=6), st.sampled_from((None, "2:4")))
def test_scaling_the_rows_of_a_weight_leaves_the_mask_of_magnitude_within_a_row(seed, exponents, pattern):
    method, weight = Magnitude(scope="layer" if pattern else "row", pattern=pattern), gaussian(6, 64, seed=seed)
    scaled = weight * torch.tensor(exponents).float().exp2()[:, None]

    assert torch.equal(method.magnitude_mask(weight), method.magnitude_mask(scaled))


@given(seeds, st.integers(-20, 20), st.sampled_from((None, "2:4")))
def test_scaling_the_activations_leaves_the_mask_of_wanda(seed, exponent, pattern):
    method, weight, x = Wanda(pattern=pattern), gaussian(6, 64, seed=seed), inputs(64, seed=seed, tokens=50)
    masks = []
    for scale in (1, 2.0**exponent):
        seen = method.observer(64, "cpu")
        seen.add(x * scale)
        masks.append(method.prune([weight], seen.value()).weights[0] == 0)

    assert torch.equal(*masks)
    assert (masks[0].sum(1) == 32).all()


def test_wanda_is_magnitude_where_all_inputs_are_of_one_size():
    weight, seen = gaussian(8, 64), Wanda().observer(64, "cpu")
    seen.add(torch.ones(5, 64))

    pruned = Wanda().prune([weight], seen.value()).weights[0]

    assert torch.equal(weight.masked_fill(Magnitude(scope="row").magnitude_mask(weight), 0), pruned)


# --- SparseGPT --------------------------------------------------------------------------------------------------------


def column_loop(weight, hessian, share, pattern, damp, block):
    """SparseGPT as the paper has it, eq. 3 and Algorithm 1, with the inverse for the columns to come made anew at every
    column."""
    rows, cols = weight.shape
    weight, mask = weight.clone(), torch.zeros(rows, cols, dtype=torch.bool)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(cols, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(cols)]
    step = block if pattern is None else pattern[1]
    for j in range(cols):
        if j % step == 0:
            part = range(j, min(j + step, cols))
            cost = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in part])  # (columns, rows)
            if pattern is None:
                chosen = ranked(cost.flatten().tolist(), sparsity.removed(share, cost.numel()))
                mask[:, list(part)] = torch.tensor(chosen).view(len(part), rows).t()
            else:
                chosen = [ranked(row, pattern[1] - pattern[0]) for row in cost.t().tolist()]
                mask[:, list(part)] = torch.tensor(chosen)
        error = (weight[:, j] * mask[:, j]) / inverses[j][0, 0]
        weight[:, j:] -= error[:, None] * inverses[j][0]
        weight[mask[:, j], j] = 0
    return weight


@given(seeds, st.sampled_from((96, 75)), st.sampled_from((0.0, 0.3, 0.5, 0.9)))
def test_sparsegpt_equals_the_column_loop_of_the_paper(seed, cols, share):
    weight, hessian = gaussian(5, cols, seed=seed).double(), hessian_of(inputs(cols, seed=seed)).double()

    expected = column_loop(weight, hessian, share, None, 0.01, sparsity.block_size(cols))

    torch.testing.assert_close(sparsity.sparsegpt([weight], hessian, share, None).weights[0], expected)


@given(seeds, st.sampled_from(PATTERNS))
def test_sparsegpt_in_a_pattern_equals_the_column_loop_of_the_paper(seed, pattern):
    weight, hessian = gaussian(5, 80, seed=seed).double(), hessian_of(inputs(80, seed=seed)).double()

    expected = column_loop(weight, hessian, 0.5, pattern, 0.01, 0)

    actual = sparsity.sparsegpt([weight], hessian, 0.5, pattern).weights[0]
    torch.testing.assert_close(actual, expected)
    assert ((actual.view(5, -1, pattern[1]) != 0).sum(-1) == pattern[0]).all()


@given(seeds, st.sampled_from((128, 100)), shares, st.booleans())
def test_sparsegpt_makes_as_many_zeros_of_every_block_of_every_layer_as_promised(seed, cols, share, ties):
    parts = [(with_ties if ties else gaussian)(rows, cols, seed=seed + rows) for rows in (3, 8)]
    hessian = torch.eye(cols) if ties else hessian_of(inputs(cols, seed=seed))

    pruned = sparsity.sparsegpt(parts, hessian, share, None).weights

    for before, after in zip(parts, pruned, strict=True):
        for was, block in zip(*(w.split(sparsity.block_size(cols), 1) for w in (before, after)), strict=True):
            promised = max(sparsity.removed(share, block.numel()), int((was == 0).sum()) if ties else 0)
            assert promised == int((block == 0).sum())


def test_two_layers_together_are_pruned_as_each_would_be_alone():
    hessian = hessian_of(inputs(96)).double()
    first, second = gaussian(8, 96).double(), gaussian(12, 96, seed=9).double()

    both = sparsity.sparsegpt([first, second], hessian, 0.5, None).weights

    for weight, part in ((first, both[0]), (second, both[1])):
        torch.testing.assert_close(sparsity.sparsegpt([weight], hessian, 0.5, None).weights[0], part)


def test_columns_that_no_input_reaches_go_first_and_cost_nothing():
    x, dead = inputs(64), torch.tensor([0, 5, 31, 63])
    x[:, dead] = 0
    weight = gaussian(8, 64)
    weight[:, dead] = 9.0

    pruned = sparsity.sparsegpt([weight], hessian_of(x), 0.5, None).weights[0]

    assert (pruned[:, dead] == 0).all()


def test_inputs_that_are_not_finite_are_refused():
    seen = Wanda().observer(32, "cpu")
    seen.add(torch.full((2, 32), float("nan")))

    with pytest.raises(LayerError, match="not finite"):
        Wanda().prune([gaussian(4, 32)], seen.value())
    with pytest.raises(LayerError, match="not finite"):
        sparsity.sparsegpt([gaussian(4, 32)], torch.full((32, 32), float("nan")), 0.5, None)


def errors(weight, x, share, pattern):
    """Relative output errors of sparsegpt, wanda and magnitude on the inputs that they were given."""
    hessian, seen, method = hessian_of(x), sparsity.Norms(x.shape[1], len(x)), Wanda(pattern=pattern)
    seen.add(x)
    answers = (
        sparsity.sparsegpt([weight], hessian, share, method.kept).weights[0],
        method.prune([weight], seen.value()).weights[0],
        weight.masked_fill(Magnitude(pattern=pattern).magnitude_mask(weight), 0),
    )
    return torch.tensor([relative_error(weight, answer, hessian) for answer in answers])


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_on_correlated_inputs_sparsegpt_is_nearest_and_magnitude_farthest(pattern, seed):
    x = inputs(256, seed=seed, tokens=1500)

    first, second, third = errors(gaussian(64, 256, seed=seed), x, 0.5, pattern)

    assert first < second < third


def test_a_pattern_costs_more_than_free_choice_and_a_wide_one_less_than_a_narrow_one():
    x, weight = inputs(256, tokens=1500), gaussian(64, 256)

    free, wide, narrow = (errors(weight, x, 0.5, pattern) for pattern in (None, "4:8", "2:4"))

    assert (free < wide).all() and (wide < narrow).all()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_on_the_reference_sparsegpt_is_nearest_and_magnitude_farthest(pattern):
    base = compression.open_base("reference")
    from bench.reference import world

    ids = base.tokenizer.encode("\n\n".join(world.texts("train", limit=60)), add_special_tokens=False, verbose=False)
    block = decoder_blocks(base.model)[0]
    seen = {stack: [] for stack in STACKS}
    reached = Inputs.of_first_block(base.model, torch.tensor(ids[: 4 * 512]).view(4, 512))
    reached.observe(block, lambda stack, x: seen[stack].append(x.float()[0]))

    found = torch.stack([
        errors(block.module.get_submodule(name).weight.detach().float(), torch.cat(seen[stack]), 0.5, pattern)
        for stack in STACKS for name in stack
    ])  # fmt: skip

    assert (found[:, 0] < found[:, 1]).all()
    assert found[:, 1].mean() < found[:, 2].mean()


# --- Quantizers keep the zeros ----------------------------------------------------------------------------------------

BITS = st.sampled_from((2, 3, 4, 8))
GROUPS = st.sampled_from((8, 32, -1))
KEEPING = st.one_of(
    st.builds(RTN, bits=BITS, group_size=GROUPS, symmetric=st.booleans()),
    st.builds(NF4, double_quant=st.booleans(), group_size=st.sampled_from((32, 64))),
    st.just(LLMInt8()),
    st.builds(GPTQ, bits=BITS, group_size=GROUPS, symmetric=st.booleans(), act_order=st.booleans(),
              static_groups=st.booleans()),
    st.builds(AWQ, bits=BITS, group_size=GROUPS, symmetric=st.booleans(), clip=st.booleans(),
              rounding=st.sampled_from(("nearest", "gptq"))),
)  # fmt: skip


def quantized(method, weight, hessian):
    if isinstance(method, GPTQ | AWQ):
        return method.round(weight.float(), hessian, weight.dtype).decode(method.grid())
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return method.compress_linear(linear, None).dequantize()


@given(KEEPING, weights(), seeds, st.sampled_from((None, (2, 4))))
def test_every_weight_that_was_pruned_is_zero_when_it_is_quantized(method, weight, seed, pattern):
    mask = sparsity.choose(gaussian(*weight.shape, seed=seed).abs(), 0.5, pattern, by_row=True)

    after = quantized(method, weight.masked_fill(mask, 0), hessian_of(inputs(64, seed=seed, tokens=100)))

    assert (after[mask] == 0).all()


def test_without_exact_zeros_or_their_level_the_zeros_are_lost():
    """What the law above would see of a quantizer that does not keep them."""
    mask = torch.arange(64).repeat(8, 1) % 2 == 0
    weight, hessian = gaussian(8, 64).masked_fill(mask, 0), hessian_of(inputs(64))
    nearly = weight.masked_fill(mask, 1e-30)

    assert not (quantized(GPTQ(group_size=32), nearly, hessian)[mask] == 0).all()
    few = torch.arange(64).repeat(8, 1) % 16 == 0
    assert not (quantized(HQQ(group_size=32), gaussian(8, 64).masked_fill(few, 0), hessian)[few] == 0).all()
    assert {"hqq"} == {name for name, cls in compression.methods().items() if not cls.info.keeps_zeros}


def test_gptq_of_a_pruned_weight_is_nearer_than_rounding_it_to_nearest():
    mask = sparsity.choose(gaussian(32, 128).abs(), 0.5, None, by_row=True)
    weight, hessian = gaussian(32, 128).masked_fill(mask, 0), hessian_of(inputs(128, tokens=1000))

    ours, nearest = (
        relative_error(weight, quantized(method, weight, hessian), hessian)
        for method in (GPTQ(bits=3, group_size=32), RTN(bits=3, group_size=32, symmetric=True))
    )

    assert ours < 0.9 * nearest


JOINT = (
    f"sparsegpt({SMALL})-gptq(group_size=32,{SMALL})",
    f"sparsegpt(pattern=2:4,store=nm,{SMALL})-gptq(bits=3,group_size=32,act_order=true,{SMALL})",
    f"wanda({SMALL})-nf4(group_size=32)",
    f"wanda(store=bitmask,{SMALL})-rtn(group_size=32)",
    f"magnitude(scope=global)-awq(group_size=32,{SMALL})",
)


@pytest.mark.parametrize("text", JOINT)
def test_a_recipe_of_pruning_and_quantizing_keeps_the_zeros_and_its_bytes_add_up(base, text, tmp_path):
    pruner, quantizer = text.split(")-")
    pruned = linears(compression.compress(base, f"{pruner})").model)

    result = compression.compress(base, text)

    for name, layer in linears(result.model).items():
        mask = pruned[name].weight == 0
        assert isinstance(layer, PackedLinear) and mask.float().mean() > 0.4
        assert (layer.dequantize()[mask] == 0).all(), name
    assert compression.compress(base, quantizer).stored_bytes == result.stored_bytes
    result.save(tmp_path / "joint")
    assert compression.load(tmp_path / "joint").stored_bytes == result.stored_bytes


@pytest.mark.parametrize("text", ["sparsegpt-hqq", "hqq-wanda", "magnitude-nf4-hqq"])
def test_a_quantizer_that_would_lose_the_zeros_is_refused_before_any_work(base, text):
    with pytest.raises(RecipeError, match=r"hqq would lose the zeros .* quantizers that keep them: .*gptq"):
        compression.compress(base, text)


# --- The order of steps -----------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsegpt-gptq", ["sparsegpt", "gptq"]),
        ("nf4-sparsegpt", ["nf4", "dequantize", "sparsegpt", "nf4"]),
        ("wanda-nf4-magnitude", ["wanda", "nf4", "dequantize", "magnitude", "nf4"]),
        ("wanda(store=bitmask)-nf4", ["wanda(store=bitmask)", "nf4"]),
        ("magnitude-edit", ["magnitude", "edit"]),
        ("magnitude(store=bitmask)-edit", ["magnitude(store=bitmask)", "densify", "edit"]),
        ("magnitude(store=bitmask)-magnitude(scope=global)", ["magnitude(store=bitmask)", "magnitude(scope=global)"]),
    ],
)
def test_pruned_weights_are_quantized_again_and_made_dense_for_a_step_on_the_whole_model(registered, text, expected):
    method("edit", leaves="dense")(
        dataclass(frozen=True, kw_only=True)(type("Edit", (Method,), {"apply": lambda self, model, context: model}))
    )

    assert expected == [what for _, what in make_schedule(Recipe.parse(text).steps)]


def test_layers_that_a_quantizer_leaves_alone_stay_as_pruning_stored_them(base, tmp_path):
    text = f'wanda(store=bitmask,{SMALL})-rtn(group_size=32,layers={{"*.down_proj":null}})'

    result = compression.compress(base, text)

    kinds = {name.endswith("down_proj"): type(layer) for name, layer in linears(result.model).items()}
    assert {True: SparseLinear, False: PackedLinear} == kinds
    assert 2 == result.kernels()["densify"]
    opened = compression.load(result.save(tmp_path / "mixed"))
    assert torch.equal(*(r.model(TOKENS, use_cache=False).logits for r in (result, opened)))


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [f"sparsegpt(sparsity=0,{SMALL})", f"wanda(sparsity=0,{SMALL})", "magnitude(sparsity=0)",
     "magnitude(sparsity=0,scope=global)"],
)  # fmt: skip
def test_no_sparsity_is_the_identity(base, text):
    result = compression.compress(base, text)

    before, after = base.model.state_dict(), result.model.state_dict()
    assert [] == [name for name in before if not torch.equal(before[name], after[name])]


def test_global_magnitude_has_the_promised_share_over_all_layers_and_one_threshold(base):
    result = compression.compress(base, 'magnitude(sparsity=0.3,scope=global,layers={"*.0.mlp.up_proj":null})')

    before, after = linears(base.model), linears(result.model)
    kept = after.pop("model.layers.0.mlp.up_proj")
    assert kept.weight is before["model.layers.0.mlp.up_proj"].weight
    zeros = sum(int((layer.weight == 0).sum()) for layer in after.values())
    assert sparsity.removed(0.3, sum(layer.weight.numel() for layer in after.values())) == zeros
    largest = max(float(before[n].weight[layer.weight == 0].abs().max()) for n, layer in after.items())
    smallest = min(float(layer.weight[layer.weight != 0].abs().min()) for layer in after.values())
    assert largest <= smallest


def test_global_magnitude_cannot_be_streamed_and_has_one_setting(base, tmp_path):
    with pytest.raises(RecipeError, match="works on the whole model at once"):
        compression.compress_to(tmp_path / "out", "random:tiny-pruned", "magnitude(scope=global)")
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.up_proj has settings of its own"):
        compression.compress(base, 'magnitude(scope=global,layers={"*.0.mlp.up_proj":{"sparsity":0.3}})')


def test_what_is_written_block_by_block_is_what_is_made_in_memory(base, tmp_path):
    text = f"sparsegpt(store=bitmask,{SMALL})"
    expected = compression.compress(base, text)

    compression.compress_to(tmp_path / "streamed", "random:tiny-pruned", text)

    streamed = compression.load(tmp_path / "streamed")
    first, second = expected.model.state_dict(), streamed.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (expected.report, expected.stored_bytes) == (streamed.report, streamed.stored_bytes)


def test_a_densely_stored_model_is_as_large_as_before_and_opens_in_plain_transformers(base, tmp_path):
    from transformers import AutoModelForCausalLM

    result = compression.compress(base, f"sparsegpt({SMALL})")
    plain = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "dense"), dtype="auto")

    assert torch.equal(result.model(TOKENS, use_cache=False).logits, plain(TOKENS, use_cache=False).logits)
    weight = plain.model.layers[0].mlp.gate_proj.weight
    assert weight.numel() // 2 == int((weight == 0).sum())
    assert compression.compress(base, "fp16").stored_bytes == result.stored_bytes
    assert ("transformers",) == result.portable
    assert () == compression.compress(base, "magnitude(store=bitmask)").portable


@pytest.mark.parametrize("text", [f"sparsegpt({SMALL})", f"wanda(pattern=2:4,store=nm,{SMALL})"])
def test_the_report_tells_the_sparsity_reached_and_the_error_of_outputs_on_calibration(base, text):
    ids = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(5))
    seen = []
    Inputs.of_first_block(base.model, ids).observe(
        decoder_blocks(base.model)[0], lambda stack, x: seen.append(x[0].float()) if "mlp.up_proj" in stack else None
    )
    name = "model.layers.0.mlp.up_proj"

    result = compression.compress(base, text, calibration=ids)

    (detail,) = (entry.detail for entry in result.report if entry.name == name)
    before, after = (linears(model)[name].weight.float() for model in (base.model, result.model))
    y, changed = (torch.cat(seen) @ w.t() for w in (before, after))
    told = re.search(r"sparsity (\S+), output error (\S+) \(magnitude: (\S+)\)", detail)
    assert 0.5 == float(told[1]) == float((after == 0).float().mean())
    assert float(told[2]) == pytest.approx(float((y - changed).square().sum() / y.square().sum()), rel=0.01)


def test_wanda_sums_up_no_hessian(base, monkeypatch):
    made = []
    work = Hessian.__init__
    monkeypatch.setattr(Hessian, "__init__", lambda self, *arguments: made.append(1) or work(self, *arguments))

    compression.compress(base, f"wanda({SMALL})")
    assert [] == made
    compression.compress(base, f"sparsegpt({SMALL})")
    assert made


def test_wanda_keeps_some_of_the_inputs_spread_over_all():
    seen = sparsity.Norms(8, tokens=3 * sparsity.ERROR_TOKENS)
    for part in gaussian(3 * sparsity.ERROR_TOKENS, 8, std=1).split(512):
        seen.add(part[None])

    assert sparsity.ERROR_TOKENS <= sum(map(len, seen._some)) <= 1.1 * sparsity.ERROR_TOKENS


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsegpt(sparsity=1)", "allowed are 0 to below 1"),
        ("wanda(sparsity=-0.1)", "allowed are 0 to below 1"),
        ("magnitude(pattern=4:2)", "n:m with 0 < n < m <= 32"),
        ("magnitude(pattern=0:4)", "n weights of m neighbours that stay"),
        ('magnitude(pattern="two:four")', "allowed are none and n:m"),
        ("wanda(pattern=2:4,sparsity=0.3)", "makes 2 of 4 weights zero, a sparsity of 0.5; leave one"),
        ("wanda(store=nm)", "needs a pattern"),
        ("magnitude(pattern=2:4,scope=global)", "leave one of the two out"),
        ("sparsegpt(damp=2)", "allowed are 0 to 1"),
        ("wanda(samples=0)", "must be at least 1"),
        ("wanda(store=dens)", "allowed are dense, bitmask, nm"),
    ],
)
def test_parameters_that_cannot_be_are_refused(text, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe.parse(text)


@pytest.mark.parametrize("text", [f"sparsegpt(pattern=3:7,{SMALL})", "magnitude(pattern=3:7)"])
def test_a_pattern_that_does_not_divide_is_refused_naming_the_layer_and_what_does(base, text):
    words = r"model\.layers\.0\.self_attn\.q_proj: pattern=3:7 does not divide the 64 inputs .* 2, 4, 8, 16, 32;"
    with pytest.raises(LayerError, match=words):
        compression.compress(base, text)


@pytest.mark.parametrize("text", [f"sparsegpt({SMALL})", f"wanda({SMALL})", "magnitude", "magnitude(scope=global)"])
def test_a_weight_that_is_not_finite_is_refused_naming_the_layer(base, text):
    base.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")

    with pytest.raises(LayerError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        compression.compress(base, text)


def test_one_recipe_has_one_spelling():
    for texts in (("wanda", "wanda(sparsity=0.5)", "wanda(pattern=none)"),
                  ("wanda(pattern=2:4)", "wanda:pattern=2:4", 'wanda(pattern="2:4",sparsity=0.5)'),
                  ("wanda(pattern=1:4)", "wanda(sparsity=0.75,pattern=1:4)")):  # fmt: skip
        recipes = {Recipe.parse(text) for text in texts}
        assert {texts[0]} == {recipe.text for recipe in recipes}
        assert recipes == {Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) for recipe in recipes}
    assert 0.75 == Recipe.parse("wanda(pattern=1:4)").steps[0].method.share


# --- What is stored ---------------------------------------------------------------------------------------------------


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@given(weights(), seeds, st.sampled_from((None, *PATTERNS)), st.booleans())
def test_what_is_stored_is_the_weight_bit_for_bit(weight, seed, pattern, odd):
    if pattern is None and odd:
        weight = weight[:, :61]  # rows that are no whole number of bytes
    pattern = pattern if pattern is None or weight.shape[1] % pattern[1] == 0 else None
    mask = sparsity.choose(gaussian(*weight.shape, seed=seed).abs(), 0.5, pattern, by_row=False)
    weight = weight.masked_fill(mask, 0)
    weight[~mask & (weight == 0)] = -0.0

    layer = SparseLinear.from_weight(weight, None, pattern)

    assert torch.equal(bits_of(weight), bits_of(layer.weight))
    again = SparseLinear(*reversed(weight.shape), bias=False, dtype=weight.dtype, kept=layer.values.numel(),
                         pattern=pattern)  # fmt: skip
    again.load_state_dict(layer.state_dict())
    assert torch.equal(bits_of(weight), bits_of(again.weight))
    assert layer.stored_bytes == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize(
    ("dtype", "pattern", "share"),
    [
        (torch.bfloat16, None, 0.5625),
        (torch.float32, None, 0.53125),
        (torch.bfloat16, (2, 4), 0.5625),
        (torch.bfloat16, (4, 8), 0.59375),
        (torch.bfloat16, (1, 4), 0.28125),
    ],
)
def test_the_share_of_bytes_is_that_of_the_formula(dtype, pattern, share):
    weight = gaussian(96, 128, dtype=dtype)
    weight = weight.masked_fill(sparsity.choose(weight.float().abs(), 0.5, pattern, by_row=False), 0)

    layer = SparseLinear.from_weight(weight, None, pattern)

    assert share * weight.nbytes == layer.stored_bytes == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_dense_layer(pattern, bias):
    weight = gaussian(48, 64).masked_fill(torch.arange(64) % 2 == 0, 0)
    layer = SparseLinear.from_weight(weight, gaussian(1, 48)[0] if bias else None, pattern)
    x = gaussian(5, 64, std=1)
    x.requires_grad_()

    y, expected = layer(x), layer.to_linear()(x)

    assert torch.equal(expected, y)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, weight.sum(0).expand(5, 64))
    half = layer.to(torch.bfloat16)
    assert (torch.bfloat16, torch.uint8) == (half.dtype, half.get_buffer(half._places).dtype)


def test_more_weights_than_the_pattern_keeps_are_refused():
    with pytest.raises(LayerError, match="3 of 4 neighbouring weights are not zero"):
        SparseLinear.from_weight(torch.tensor([[1.0, 2.0, 0.0, 3.0]]), None, (2, 4))
    with pytest.raises(LayerError, match="does not divide the 6 inputs"):
        SparseLinear.from_weight(torch.ones(2, 6), None, (2, 4))


def test_only_2_to_4_in_16_bits_gets_the_semi_structured_kernels_of_a_gpu(monkeypatch):
    weight = gaussian(64, 64, dtype=torch.bfloat16).masked_fill(torch.arange(64) % 2 == 0, 0)
    fits, others = SparseLinear.from_weight(weight, None, (2, 4)), [
        SparseLinear.from_weight(weight, None), SparseLinear.from_weight(weight, None, (4, 8)),
        SparseLinear.from_weight(weight.float(), None, (2, 4)), SparseLinear.from_weight(weight[:40], None, (2, 4)),
    ]  # fmt: skip
    assert "densify" == fits.kernel_name() == fits.kernel_name("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((8, 0), "semi_structured"), ((7, 5), "densify")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert expected == fits.kernel_name("cuda")
        assert {"densify"} == {layer.kernel_name("cuda") for layer in others}


def test_a_manifest_that_does_not_fit_its_tensors_is_refused(base, tmp_path):
    folder = compression.compress(base, "magnitude(store=bitmask)").save(tmp_path / "broken")
    manifest = json.loads((folder / "compression.json").read_text())
    manifest["layers"]["model.layers.0.mlp.up_proj"]["kept"] -= 1
    (folder / "compression.json").write_text(json.dumps(manifest))

    with pytest.raises(compression.CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.values has shape"):
        compression.load(folder)
