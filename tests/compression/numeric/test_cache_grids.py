"""Grids of keys and values: bounds, a slow reference, what is appended, what is stored, what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import LayerError
from compression.numeric import packing
from compression.numeric.cache_grids import Float8Grid, IntGrid, from_json

HEADS, SIZE = 2, 16
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def int_grids(draw):
    by = draw(st.sampled_from(("token", "channel")))
    sizes = (-1, 4, 16) if by == "token" else (1, 3, 8)
    return IntGrid(bits=draw(st.integers(1, 8)), by=by, group_size=draw(st.sampled_from(sizes)))


grids = st.one_of(int_grids(), st.sampled_from([Float8Grid(by=by) for by in ("head", "token", "unit")]))


@st.composite
def tensors(draw, tokens=24):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(2, HEADS, tokens, SIZE, generator=generator, dtype=torch.float64)
    x = x * draw(st.sampled_from((1e-4, 1.0, 90.0))) + draw(st.sampled_from((0.0, 3.0, -0.1)))
    return x.to(draw(st.sampled_from(DTYPES)))


def groups_of(x, grid):
    """Every group of a tensor as a list of places in it, by counting."""
    batch, heads, tokens, size = x.shape
    if grid.by == "channel":
        for b, h, start, c in itertools.product(range(batch), range(heads), range(0, tokens, grid.group_size),
                                                range(size)):  # fmt: skip
            yield [(b, h, start + n, c) for n in range(grid.group_size)]
        return
    step = size if grid.group_size == -1 else grid.group_size
    for b, h, t, start in itertools.product(range(batch), range(heads), range(tokens), range(0, size, step)):
        yield [(b, h, t, start + n) for n in range(step)]


@given(int_grids(), tensors())
def test_no_value_moves_by_more_than_half_a_step_of_its_group(grid, x):
    back = grid.decode(grid.encode(x), SIZE, torch.float64)

    half = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
    info = torch.finfo(half)
    for places in groups_of(x[:1, :1], grid):
        own = torch.stack([x[place] for place in places]).double()
        found = torch.stack([back[place] for place in places])
        rounded = info.eps * own.abs().max() + info.smallest_normal * info.eps  # of the minimum
        step = (own.max() - own.min() + rounded) / (2**grid.bits - 1) * (1 + info.eps) + info.smallest_normal * info.eps
        assert (own - found).abs().max() <= step / 2 + 1e-6 * own.abs().max()
        assert len(found.unique()) <= 2**grid.bits


@given(tensors())
def test_fp8_has_three_bits_of_mantissa(x):
    back = Float8Grid(by="head").decode(Float8Grid(by="head").encode(x), SIZE, torch.float64)

    largest = x.double().abs().amax(-1, keepdim=True)
    assert ((back - x.double()).abs() <= x.double().abs() * 0.0626 + largest / 448 * 2.0**-9 + 1e-7).all()


@given(grids, tensors(), st.integers(0, 3))
def test_what_is_appended_is_what_is_stored_together(grid, x, blocks):
    """What a token becomes does not depend on the tokens behind its group, nor on other sequences."""
    at = blocks * grid.tokens
    whole, parts = grid.encode(x), [grid.encode(each) for each in (x[:, :, :at], x[:, :, at:]) if each.shape[2]]

    assert all(torch.equal(each, torch.cat([part[name] for part in parts], 2)) for name, each in whole.items())
    assert all(torch.equal(each[1:], grid.encode(x[1:])[name]) for name, each in whole.items())


@given(int_grids(), st.sampled_from(DTYPES))
def test_a_group_of_one_value_comes_back(grid, dtype):
    for value in (0.0, 0.5, -3.0, 1024.0):
        x = torch.full((1, HEADS, 24, SIZE), value, dtype=dtype)
        assert torch.equal(x, grid.decode(grid.encode(x), SIZE, dtype))


@given(st.integers(2, 8), st.integers(0, 99))
def test_by_channel_is_nearer_than_by_token_where_channels_have_outliers(bits, seed):
    x = torch.randn(1, HEADS, 32, SIZE, generator=torch.Generator().manual_seed(seed))
    x[..., 3] += 40
    by = {each: IntGrid(bits=bits, by=each, group_size=size) for each, size in (("token", -1), ("channel", 16))}
    errors = {each: (x - grid.decode(grid.encode(x), SIZE, x.dtype)).norm() for each, grid in by.items()}

    assert errors["channel"] < errors["token"] / 2


@given(int_grids())
def test_codes_are_packed_to_the_bit(grid):
    stored = grid.encode(torch.randn(2, HEADS, 24, SIZE))

    if grid.by == "token":
        codes, groups = 24 * packing.packed_width(SIZE, grid.bits), 24 * SIZE // (grid.group_size % (SIZE + 1))
    else:
        groups = 24 // grid.group_size * SIZE
        codes = groups * packing.packed_width(grid.group_size, grid.bits)
    assert {"codes": 4 * codes, "scale": 8 * groups, "minimum": 8 * groups} == {
        name: each.nbytes for name, each in stored.items()
    }


@given(grids)
def test_a_grid_survives_json(grid):
    assert grid == from_json(grid.to_json())


@pytest.mark.parametrize("entry", [
    None, [], {}, {"kind": "nf4"}, {"kind": "int"}, {"kind": "int", "bits": 9, "by": "token", "group_size": -1},
    {"kind": "int", "bits": 4, "by": "head", "group_size": -1}, {"kind": "fp8", "by": "channel"},
    {"kind": "int", "bits": 4, "by": "token", "group_size": 0},
    {"kind": "int", "bits": 4, "by": "channel", "group_size": -1}, {"kind": "fp8", "by": "head", "more": 1},
    {"kind": "int", "bits": True, "by": "token", "group_size": -1},
])  # fmt: skip
def test_what_is_no_grid_is_refused(entry):
    with pytest.raises(LayerError):
        from_json(entry)


def test_what_16_bits_cannot_scale_is_refused():
    x = torch.full((1, 1, 1, 8), 1e6)
    x[..., 0] = -1e6
    for grid in (IntGrid(bits=4), Float8Grid()):
        with pytest.raises(LayerError, match="not finite, or beyond"):
            grid.encode(x * 1e4)
    assert IntGrid(bits=8).decode(IntGrid(bits=8).encode(x.bfloat16()), 8, torch.float32).isfinite().all()
