"""The laws of every kind of part: rows, columns, bytes, saving, restoring, moving, gradients."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import affine_grids, gaussian, nf4_grids, seeds
from torch import nn

from compression import LayerError
from compression.layers import Linear, describe, part_kinds, restore
from compression.layers.activations import FloatRange, Levels, OutlierColumns, TokenRange
from compression.layers.blocks import Blocks
from compression.layers.codes import Codes
from compression.layers.columns import Columns
from compression.layers.dense import Dense
from compression.layers.kernels.integer_products import token_steps
from compression.layers.low_rank import LowRank
from compression.layers.outlier_victim import OutlierVictim, OutlierVictimRange
from compression.layers.ranges import AffineRange
from compression.layers.rounded import Rounded
from compression.layers.several import Chain, OutputChain, Sum
from compression.layers.sparse import Csr, Sparse
from compression.layers.transforms import Hadamard, Permutation, Rotation, Scale
from compression.numeric.floats import FloatGrid

ROWS, COLS = 12, 64


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed, size):
    return Rotation(torch.linalg.qr(drawn(seed, size, size)).Q)


def permutation(seed):
    return Permutation(torch.randperm(COLS, generator=torch.Generator().manual_seed(seed)))


def affine_range(seed):
    """Of any granularity, shifted or not."""
    generator = torch.Generator().manual_seed(seed)
    of, offsets = seed % 4, drawn(seed, COLS) if seed % 3 == 0 else None
    steps, zeros = torch.rand(5, generator=generator) + 0.01, torch.arange(5.0)
    if of == 0:
        return AffineRange(2 + seed % 7, symmetric=False, offsets=offsets)
    if of == 1:
        return AffineRange(4, granularity="group", group_size=1, scale="power_of_two", offsets=offsets)
    if of == 2:
        return AffineRange(4, granularity="tensor", symmetric=False, steps=steps[:1], zeros=zeros[1:2], offsets=offsets)
    index = torch.randint(5, (COLS,), generator=generator)
    return AffineRange(
        4, granularity="cluster", symmetric=False, steps=steps, zeros=zeros, index=index, offsets=offsets
    )


def levels(seed, bits=3, **settings):
    return Levels.fitted(drawn(seed, 200, ROWS), bits, **settings)


def halved(seed):
    """A weight of which every second column is zero, so that two of four neighbours are."""
    return gaussian(ROWS, COLS, seed=seed).masked_fill(torch.arange(COLS) % 2 == 0, 0)


def with_seed(make):
    return seeds.map(make)


WEIGHTS = {
    "dense": with_seed(lambda seed: Dense(gaussian(ROWS, COLS, seed=seed))),
    "codes": st.builds(lambda seed, grid: Codes.from_weight(gaussian(ROWS, COLS, seed=seed), grid), seeds,
                       st.one_of(affine_grids, nf4_grids)),
    "rounded": st.builds(lambda seed, bits: Rounded(gaussian(ROWS, COLS, seed=seed), bits), seeds, st.integers(2, 8)),
    "ggml": st.builds(lambda seed, type: Blocks.from_weight(gaussian(ROWS, COLS, seed=seed), type), seeds,
                      st.sampled_from(("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))),
    "outlier_victim": with_seed(lambda seed: OutlierVictim.from_weight(gaussian(ROWS, COLS, seed=seed))),
    "sparse": st.builds(lambda seed, pattern: Sparse.from_weight(halved(seed), pattern), seeds,
                        st.sampled_from((None, (2, 4), (4, 8)))),
    "csr": with_seed(lambda seed: Csr.from_weight(halved(seed))),
    "low_rank": st.builds(lambda seed, rank: LowRank(drawn(seed, rank, COLS), drawn(seed, ROWS, rank), rank / 4),
                          seeds, st.integers(1, 9)),
    "columns": with_seed(lambda seed: Columns.from_weight(gaussian(ROWS, COLS, seed=seed), torch.arange(3, COLS, 4))),
    "sum": with_seed(
        lambda seed: Sum(Rounded(gaussian(ROWS, COLS, seed=seed)), Dense(gaussian(ROWS, COLS, seed=seed + 1)))
    ),
}  # fmt: skip
INPUTS = {
    "token_range": st.one_of(
        st.builds(TokenRange, st.integers(2, 16), st.none() | st.floats(0.01, 1)),
        st.builds(TokenRange, st.integers(2, 16), clip=st.floats(0.1, 1)),
    ),
    "float_range": st.sampled_from(
        [
            FloatRange(FloatGrid(element="e4m3", group_size=-1)),
            FloatRange(FloatGrid(element="e5m2", group_size=-1)),
            FloatRange(FloatGrid(element="e4m3", group_size=-1), 0.01),
        ]
    ),
    "outlier_victim_range": st.builds(OutlierVictimRange, st.floats(0.05, 1)),
    "affine_range": with_seed(affine_range),
    "outlier_columns": st.builds(OutlierColumns, st.floats(0.5, 10)),
    "scale": with_seed(lambda seed: Scale(drawn(seed, COLS).exp())),
    "permutation": with_seed(permutation),
    "rotation": with_seed(lambda seed: rotation(seed, 16)),
    "hadamard": st.sampled_from([64, 16, 4]).map(Hadamard),
    "chain": with_seed(lambda seed: Chain(permutation(seed), Scale(drawn(seed, COLS)), TokenRange())),
}
OUTPUTS = {
    "levels": st.builds(levels, seeds, st.integers(1, 4), outliers=st.sampled_from((0.0, 0.02)),
                        keep_first=st.integers(0, 2)),
    "output_chain": with_seed(lambda seed: OutputChain(levels(seed, 4), levels(seed + 1, 2))),
}  # fmt: skip
UNCUT = {"rotation", "hadamard", "outlier_victim_range"}  # whose inputs are mixed, or go in pairs


@st.composite
def layers(draw):
    """A layer of any parts."""
    return Linear(
        draw(st.one_of(*WEIGHTS.values())),
        draw(st.none() | seeds.map(lambda seed: drawn(seed, ROWS))),
        input_part=draw(st.none() | st.one_of(*INPUTS.values())),
        output_part=draw(st.none() | st.one_of(*OUTPUTS.values())),
    )


def inputs(seed=0):
    return drawn(seed, 2, 5, COLS)


def test_every_kind_of_part_is_under_the_laws():
    assert {*WEIGHTS, *INPUTS, *OUTPUTS} == {kind for kind, cls in part_kinds().items() if _is_own(cls)}


def _is_own(cls):
    return cls.__module__.startswith("compression.")


@given(layer=layers(), seed=seeds)
def test_what_is_described_and_saved_comes_back_bit_for_bit(layer, seed):
    x = inputs(seed)
    expected, state = layer(x), layer.state_dict()

    again = restore(json.loads(json.dumps(describe(layer))))
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again.load_state_dict(state, assign=True)

    assert torch.equal(expected, again(x))
    assert describe(layer) == describe(again)
    assert list(state) == list(again.state_dict())


@given(layer=layers())
def test_bytes_are_those_of_the_state_dict_before_and_after_a_forward(layer):
    written = sum(tensor.nbytes for tensor in layer.state_dict().values())

    assert written == layer.stored_bytes
    layer(inputs())
    assert written == layer.stored_bytes == sum(tensor.nbytes for tensor in layer.state_dict().values())


@given(weight=st.one_of(*WEIGHTS.values()), seed=seeds)
def test_rows_of_a_weight_are_the_rows_of_its_value(weight, seed):
    kept = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:5].sort().values

    cut = weight.rows(kept)

    assert torch.equal(weight.value()[kept], cut.value())
    assert (5, COLS) == cut.shape
    torch.testing.assert_close(weight.value()[kept], weight.lookup(kept))


@given(weight=st.one_of(*WEIGHTS.values()))
def test_columns_of_a_weight_in_whole_groups_are_the_columns_of_its_value(weight):
    kept = torch.arange(32, 64)
    if isinstance(weight, Codes) and weight.grid.group_size in (8, 16):
        with pytest.raises(LayerError, match="no common divisor of 32"):  # no kernel takes smaller ones
            weight.columns(kept)
        return

    cut = weight.columns(kept)

    assert (ROWS, 32) == cut.shape
    assert torch.equal(weight.value()[:, kept], cut.value())


@given(part=st.one_of(*(each for kind, each in INPUTS.items() if kind not in UNCUT)), seed=seeds)
def test_a_layer_without_some_inputs_is_the_layer_on_zeros_there(part, seed):
    assume(getattr(part, "offsets", None) is None)  # zeros that are shifted are something else
    layer = Linear(Dense(gaussian(ROWS, COLS, seed=seed)), input_part=part)
    kept = torch.randperm(COLS, generator=torch.Generator().manual_seed(seed))[:40].sort().values
    x = torch.zeros(2, 5, COLS)
    x[..., kept] = inputs(seed)[..., kept]

    torch.testing.assert_close(layer(x), layer.columns(kept)(x[..., kept]))


def test_of_outlier_victim_pairs_both_inputs_go_or_none():
    part, x = OutlierVictimRange(0.2), inputs()
    kept = torch.tensor([0, 1, 6, 7, 62, 63])

    assert torch.equal(part(x)[..., kept], part.columns(kept)(x[..., kept]))
    for odd in ([0, 1, 2], [1, 2], [0, 2]):
        with pytest.raises(LayerError, match="in pairs, which go whole"):
            part.columns(torch.tensor(odd))
    with pytest.raises(LayerError, match="must be an even number"):
        OutlierVictim.from_weight(drawn(0, ROWS, COLS)).columns(torch.arange(3))


def test_a_rotation_cannot_be_cut():
    with pytest.raises(LayerError, match="none of them can go"):
        rotation(0, 16).columns(torch.arange(32))


@given(layer=layers(), seed=seeds)
def test_a_layer_without_some_outputs_has_the_others(layer, seed):
    kept = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:5].sort().values

    torch.testing.assert_close(layer(inputs())[..., kept], layer.rows(kept)(inputs()))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@given(layer=layers())
def test_a_copy_computes_the_same_and_is_of_its_own(layer, through):
    expected = layer(inputs())

    copied = through(layer)

    assert torch.equal(expected, copied(inputs()))
    assert torch.equal(expected, layer(inputs()))
    assert not {t.data_ptr() for t in layer.state_dict().values()} & {
        t.data_ptr() for t in copied.state_dict().values()
    }


@given(layer=layers())
def test_a_change_of_dtype_reaches_what_is_computed_with_and_not_what_is_stored_of_codes(layer):
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    layer.to(torch.bfloat16)

    assert torch.bfloat16 == layer.dtype
    for name, tensor in layer.state_dict().items():
        if name == "bias" or name.rsplit(".", 1)[-1] in ("weight", "values", "a", "b"):
            assert torch.bfloat16 == tensor.dtype
        else:
            assert torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype
    assert torch.bfloat16 == layer(inputs().bfloat16()).dtype


@given(layer=layers())
def test_a_gradient_reaches_the_inputs_and_does_not_change_the_outputs(layer):
    x = inputs().requires_grad_()

    y = layer(x)
    y.sum().backward()

    torch.testing.assert_close(layer(inputs()), y.detach())
    assert x.grad.isfinite().all() and x.grad.any()


@given(layer=layers())
def test_the_product_is_that_of_the_slow_reference(layer):
    torch.testing.assert_close(layer.reference(inputs()), layer(inputs()), rtol=1e-3, atol=1e-3)


@given(part=st.sampled_from(("scale", "permutation", "rotation")).flatmap(INPUTS.get), seed=seeds)
def test_a_linear_map_of_the_inputs_folds_into_the_weight(part, seed):
    layer = Linear(Dense(gaussian(ROWS, COLS, seed=seed)), input_part=part)

    torch.testing.assert_close(layer(inputs()), layer.to_linear()(inputs()))


def test_a_dense_layer_is_taken_in_and_given_back_as_it_is():
    linear = nn.Linear(COLS, ROWS)

    layer = Linear.of(linear)

    assert layer.weight_part.weight is linear.weight is layer.simplest().weight
    assert torch.equal(linear(inputs()), layer(inputs()))
    assert Linear.of(layer) is layer
    layer.input_part = TokenRange()
    assert layer.simplest() is layer


def test_a_list_of_weights_is_their_sum():
    layer = Linear.of(nn.Linear(COLS, ROWS))
    first, second = Rounded(layer.weight), Dense(gaussian(ROWS, COLS))

    layer.weight_part = [first, second]

    assert torch.equal(first.value() + second.value(), layer.weight)
    assert first.bytes + second.bytes == layer.weight_part.bytes


@pytest.mark.parametrize(
    ("place", "part"),
    [("input", Dense(torch.zeros(2, 2))), ("output", TokenRange()), ("weight", TokenRange()), ("weight", None)],
)
def test_a_part_of_another_place_is_refused(place, part):
    layer = Linear.of(nn.Linear(2, 2))

    with pytest.raises(LayerError, match=f"place '{place}'"):
        setattr(layer, f"{place}_part", part)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": None},
        {"weight": {"kind": "unknown"}},
        {"weight": {"kind": ["dense"]}},
        {"weight": {"kind": "dense"}},
        {"weight": {"kind": "dense", "dtype": "int8"}},
        {"weight": {"kind": "token_range", "bits": 8, "static": False}},
        {"weight": {"kind": "rounded", "bits": 9, "dtype": "float32"}},
        {"weight": {"kind": "sum", "parts": []}},
        {"weight": {"kind": "sum", "parts": [{"kind": "sum", "parts": []}] * 2}},
        {"input": {"kind": "token_range", "bits": 8, "static": 1}},
        {"input": {"kind": "token_range", "bits": 8, "static": False, "clip": 1.5}},
        {"input": {"kind": "token_range", "bits": 8, "static": False, "clip": True}},
        {"input": {"kind": "token_range", "bits": 8, "static": True, "clip": 0.9}},
        {"input": {"kind": "token_range", "bits": 8}},
        {"input": {"kind": "hadamard", "block": 3}},
        {"input": {"kind": "hadamard", "block": 2**40}},
        {"input": {"kind": "hadamard", "block": True}},
        {"input": {"kind": "rotation", "block": 48}},
        {"output": {"kind": "levels", "bits": 40, "keep_first": 0}},
        {"output": {"kind": "levels", "bits": 3, "keep_first": -1}},
        {"in_features": -1},
        {"bias": "int32"},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_refused(change):
    description = describe(Linear(Dense(torch.zeros(ROWS, COLS))))

    with pytest.raises(LayerError):
        restore(description | change)


# --- Quantizers of activations ----------------------------------------------------------------------------------------


@given(bits=st.integers(2, 8), seed=seeds)
def test_a_token_moves_by_at_most_half_of_its_step(bits, seed):
    x = inputs(seed)
    part = TokenRange(bits)

    assert ((part(x) - x).abs() <= token_steps(x, part.highest) / 2 * (1 + 1e-5)).all()
    assert (part(x).abs().amax(-1) >= x.abs().amax(-1) * (1 - 1e-5)).all(), "the largest value is itself a level"


def test_one_static_step_serves_all_tokens_and_clips():
    x = torch.tensor([[0.26, -0.24, 900.0, 0.0]])

    assert torch.allclose(torch.tensor([[0.5, 0.0, 63.5, 0.0]]), TokenRange(8, 0.5)(x))


def test_with_a_clip_the_largest_number_stands_for_a_share_of_the_largest_value():
    x = torch.tensor([[10.0, 4.2, -1.0, 0.0]])  # a step of 8 / 7

    torch.testing.assert_close(torch.tensor([[8.0, 32 / 7, -8 / 7, 0.0]]), TokenRange(4, clip=0.8)(x))


@given(st.sampled_from([64, 32, 4]), seeds)
def test_a_hadamard_transform_is_what_the_weight_behind_it_takes_back(block, seed):
    x, weight, part = inputs(seed).double(), drawn(seed, ROWS, COLS).double(), Hadamard(block)

    torch.testing.assert_close(part(x) @ part.taken(weight).T, x @ weight.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(part.folded(part.taken(weight)), weight, rtol=0, atol=1e-12)


def test_a_token_of_zeros_stays():
    assert torch.equal(torch.zeros(1, 4), TokenRange()(torch.zeros(1, 4)))


@given(seed=seeds, bits=st.integers(1, 4))
def test_outputs_lie_on_the_levels_of_their_channel_but_for_outliers_and_the_first_tokens(seed, bits):
    part = levels(seed, bits, outliers=0.05, keep_first=2)
    y = drawn(seed, 3, 9, ROWS)

    changed = part(y)

    outside = (y < part.low) | (y > part.high)
    assert torch.equal(y[:, :2], changed[:, :2]) and torch.equal(y[outside], changed[outside])
    distance = (changed[..., None] - part.levels).abs().amin(-1)
    assert (distance[:, 2:][~outside[:, 2:]] == 0).all()
    assert not torch.equal(y, changed)


@given(seed=seeds)
def test_more_levels_than_values_keep_every_value(seed):
    seen = drawn(seed, 8, ROWS)

    torch.testing.assert_close(seen, Levels.fitted(seen, 3)(seen), rtol=0, atol=1e-6)


def test_a_share_of_each_channel_is_outside_of_its_thresholds_and_none_lies_on_them():
    seen = drawn(0, 1000, ROWS)

    part = Levels.fitted(seen, 2, outliers=0.02)

    assert (10 == (seen < part.low).sum(0)).all() and (10 == (seen > part.high).sum(0)).all()
    assert not ((seen == part.low) | (seen == part.high)).any()


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(LayerError, match="not finite"):
        Levels.fitted(torch.tensor([[1.0], [float("nan")]]), 2)
