"""Activations on floating-point numbers: torch's own casts, the formats by hand, and what depends on what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression import LayerError
from compression.layers import Linear, describe, restore
from compression.layers.activations import FloatRange
from compression.layers.dense import Dense
from compression.numeric.floats import E2M1_LEVELS, FloatGrid

E4M3 = FloatGrid(element="e4m3", group_size=-1)
NVFP4 = FloatGrid(element="e2m1", group_size=16, scale="e4m3")
MXFP4 = FloatGrid(element="e2m1", group_size=32, scale="e8m0")
LEVELS = torch.tensor([*E2M1_LEVELS, *(-each for each in E2M1_LEVELS)])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(x):
    """Of E2M1, ties to the even code."""
    off = (x[..., None] - LEVELS).abs()
    even = torch.where(off == off.amin(-1, keepdim=True), torch.arange(16) % 2, 9)
    return LEVELS[even.argmin(-1)]


@pytest.mark.parametrize(("element", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_the_cast_of_torch_under_a_scale_of_each_token(element, dtype):
    x = drawn(2, 5, 64)
    top = torch.finfo(dtype).max

    scale = x.abs().amax(-1, keepdim=True) / top
    wanted = (x / scale).clamp(-top, top).to(dtype).float() * scale

    torch.testing.assert_close(FloatRange(FloatGrid(element=element, group_size=-1))(x), wanted, rtol=1e-6, atol=0)


def test_a_static_scale_is_the_same_for_all_tokens():
    x, part = drawn(3, 64), FloatRange.fitted(E4M3, torch.full((64,), 2.0))

    wanted = (x / (2 / 448)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (2 / 448)

    torch.testing.assert_close(part(x), wanted)
    assert 2 == pytest.approx(float(part(torch.full((1, 64), 100.0)).max()))


def test_nvfp4_is_as_it_is_written():
    x, largest = drawn(4, 64), 5.0
    part = FloatRange.fitted(NVFP4, torch.full((64,), largest))
    divisor = 448 * 6 / largest

    groups = x.view(4, 4, 16)
    scales = (groups.abs().amax(-1) * divisor / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn).float() / divisor
    wanted = nearest(groups / scales[..., None]) * scales[..., None]

    torch.testing.assert_close(part(x), wanted.view(4, 64))


def test_mxfp4_is_as_it_is_written():
    x = drawn(4, 64)

    groups = x.view(4, 2, 32)
    scales = 2.0 ** (groups.abs().amax(-1).log2().floor() - 2)
    wanted = nearest(groups / scales[..., None]) * scales[..., None]

    torch.testing.assert_close(FloatRange(MXFP4)(x), wanted.view(4, 64), rtol=0, atol=0)


@given(st.sampled_from([FloatRange(E4M3), FloatRange(E4M3, 0.01), FloatRange(NVFP4, 500.0), FloatRange(MXFP4)]),
       st.integers(0, 99))  # fmt: skip
def test_a_token_depends_on_no_other_and_what_is_rounded_stays(part, seed):
    x = drawn(5, 64, seed=seed)

    assert torch.equal(part(x)[2], part(x[2:3])[0])
    if part.grid.scale != "e4m3":  # whose scales are rounded too
        torch.testing.assert_close(part(part(x)), part(x), rtol=2**-20, atol=0)


@pytest.mark.parametrize(
    ("grid", "whole", "says"),
    [
        (NVFP4, None, "need a divisor that calibration text gives"),
        (MXFP4, 1.0, "found at run time, and cannot be static"),
        (FloatGrid(element="e4m3", group_size=16), 1.0, "group_size must be -1"),
        (E4M3, 0.0, "must be above 0"),
        (E4M3, float("nan"), "whole"),
    ],
)
def test_what_cannot_be_is_refused(grid, whole, says):
    with pytest.raises(LayerError, match=says):
        FloatRange(grid, whole)


def test_inputs_go_in_whole_groups():
    x, part = drawn(3, 64), FloatRange(MXFP4)
    layer = Linear(Dense(drawn(8, 64, seed=1)), input_part=part)
    kept = torch.arange(32, 64)

    torch.testing.assert_close(layer.columns(kept)(x[:, kept]), layer(torch.where(torch.arange(64) < 32, 0, x)))
    for some in (torch.arange(16, 48), torch.arange(0, 64, 2), torch.arange(40)):
        with pytest.raises(LayerError, match="in groups of 32, which go whole"):
            layer.columns(some)


@pytest.mark.parametrize("part", [FloatRange(NVFP4, 500.0), FloatRange(MXFP4), FloatRange(E4M3), FloatRange(E4M3, 0.1)])
def test_it_is_described_and_restored(part):
    layer = Linear(Dense(drawn(8, 64)), input_part=part)

    other = restore(describe(layer))
    other.load_state_dict(layer.state_dict(), assign=True)

    x = drawn(3, 64, seed=2)
    assert torch.equal(layer(x), other(x))
    assert part.words == other.input_part.words
