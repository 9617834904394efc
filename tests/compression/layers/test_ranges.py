"""The quantizer of inputs of any granularity: against slow loops, its laws, and what kernels and formats make of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from compression import LayerError
from compression.calibration.ranges import Ranges
from compression.layers import Linear
from compression.layers.activations import TokenRange
from compression.layers.kernels.choose import choose
from compression.layers.ranges import AffineRange, range_of
from compression.layers.rounded import Rounded
from compression.numeric.clusters import k_means

COLS = 32
bits = st.integers(2, 8)
scales = st.sampled_from(["float", "power_of_two"])


def drawn(seed, tokens=40):
    """Activations whose channels differ in size and in middle."""
    generator = torch.Generator().manual_seed(seed)
    spread, middle = (torch.randn(COLS, generator=generator) for _ in range(2))
    return torch.randn(tokens, COLS, generator=generator) * (1.5 * spread).exp() + 3 * middle


def static(x, bits, *, clusters=1, symmetric=True, scale="float"):
    """Static, on its own text."""
    ranges = Ranges(x.amin(0), x.amax(0))
    index = k_means(torch.stack([ranges.high, ranges.low], 1), clusters)
    steps, zeros = ranges.fit(bits, symmetric=symmetric, index=index, count=clusters, scale=scale)
    shared = {"symmetric": symmetric, "scale": scale, "steps": steps, "zeros": zeros}
    if clusters == 1:
        return AffineRange(bits, granularity="tensor", **shared)
    return AffineRange(bits, granularity="cluster", index=index, **shared)


def error(part, x):
    return float((part(x) - x).square().mean())


def by_hand(values, bits, symmetric, scale, low=None, high=None):
    """One range, number by number."""
    low, high = (min(0, *values), max(0, *values)) if low is None else (low, high)
    first, last = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    step = max(-low, high) / last if symmetric else (high - low) / last
    if scale == "power_of_two":
        power = 2.0**-60
        while power < step:
            power *= 2
        step = power
    zero = 0 if symmetric else -round(low / step)
    return [(min(max(round(v / step) + zero, first), last) - zero) * step for v in values]


@given(seeds, bits, st.booleans(), scales, st.sampled_from(["tensor", "token", "group"]))
def test_it_rounds_as_loops_over_numbers_do(seed, bits, symmetric, scale, granularity):
    x = drawn(seed, 3)
    if granularity == "tensor":
        part = static(x, bits, symmetric=symmetric, scale=scale)
        low, high = float(x.min()), float(x.max())
        expected = torch.tensor([by_hand(row, bits, symmetric, scale, low, high) for row in x.tolist()])
    else:
        size = COLS if granularity == "token" else 8
        part = AffineRange(bits, granularity=granularity, group_size=-1 if granularity == "token" else 8,
                           symmetric=symmetric, scale=scale)  # fmt: skip
        rows = x.view(-1, size).tolist()
        expected = torch.tensor([by_hand(row, bits, symmetric, scale) for row in rows]).view(x.shape)

    apart = (part(x) - expected).abs() > 1e-4 * x.abs().max()
    assert 0.02 >= float(apart.float().mean())  # but for numbers between two levels


@given(seeds, st.integers(2, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_plain_forms_are_those_that_kernels_take_bit_for_bit(seed, bits, dtype):
    x = drawn(seed).to(dtype)

    assert torch.equal(TokenRange(bits)(x), AffineRange(bits)(x))
    steps = torch.tensor([0.05])
    assert torch.equal(TokenRange(bits, steps)(x), AffineRange(bits, granularity="tensor", steps=steps)(x))
    assert isinstance(range_of(bits), TokenRange)
    assert isinstance(range_of(bits, (steps, torch.zeros(1))), TokenRange)
    assert isinstance(range_of(bits, symmetric=False), AffineRange)


@given(seeds, st.integers(3, 8), st.booleans(), st.integers(2, 12))
def test_one_cluster_is_the_tensor_and_more_are_no_worse(seed, bits, symmetric, clusters):
    x = drawn(seed)
    tensor, many = (static(x, bits, clusters=count, symmetric=symmetric) for count in (1, clusters))
    one = AffineRange(bits, granularity="cluster", symmetric=symmetric, steps=tensor.steps, zeros=tensor.zeros,
                      index=torch.zeros(COLS))  # fmt: skip

    assert torch.equal(tensor(x), one(x))
    assert error(tensor, x) * 1.01 >= error(many, x)


@given(seeds, st.integers(3, 8), st.booleans())
def test_finer_granularities_err_less_on_average(seed, bits, symmetric):
    """Over texts: tensor, token and group each less than the one before, and tensor more than clusters."""
    found = {"tensor": 0.0, "cluster": 0.0, "token": 0.0, "group": 0.0}
    for n in range(4):
        x = drawn(seed + n)
        found["tensor"] += error(static(x, bits, symmetric=symmetric), x)
        found["cluster"] += error(static(x, bits, clusters=8, symmetric=symmetric), x)
        found["token"] += error(AffineRange(bits, symmetric=symmetric), x)
        found["group"] += error(AffineRange(bits, granularity="group", group_size=8, symmetric=symmetric), x)

    assert found["tensor"] >= found["token"] >= found["group"]
    assert found["tensor"] >= found["cluster"]


@given(seeds, st.integers(3, 8), st.booleans(), st.sampled_from(["tensor", "token"]))
def test_powers_of_two_err_at_most_a_whole_step_where_real_steps_err_half_of_one(seed, bits, symmetric, granularity):
    x = drawn(seed, 200)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    if granularity == "tensor":
        low, high = x.amin(), x.amax()
        fixed, free = (static(x, bits, symmetric=symmetric, scale=scale) for scale in ("power_of_two", "float"))
        assert float(fixed.steps.log2()) == round(float(fixed.steps.log2()))
        assert free.steps <= fixed.steps < 2 * free.steps
    else:
        fixed, free = (AffineRange(bits, symmetric=symmetric, scale=scale) for scale in ("power_of_two", "float"))
    steps = torch.maximum(high, -low) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)

    assert ((fixed(x) - x).abs() <= steps * (1 + 1e-4)).all()
    assert ((free(x) - x).abs() <= steps / 2 * (1 + 1e-4)).all()


@given(seeds, st.integers(4, 8))
def test_a_shift_at_run_time_is_the_shift_that_a_bias_makes_up_for(seed, bits):
    x, offsets = drawn(seed), drawn(seed + 1, 1)[0]
    weight = drawn(seed + 2, 6)
    shifted = Linear(Rounded(weight), input_part=AffineRange(bits, offsets=offsets))
    bias = Linear(Rounded(weight), shifted.weight @ offsets, input_part=AffineRange(bits))

    torch.testing.assert_close(shifted(x), bias(x - offsets), rtol=1e-4, atol=1e-3)
    assert "shifted at run time" in shifted.input_part.words


def test_constants_and_zeros_stay_what_they_are():
    for symmetric in (True, False):
        x = torch.cat([torch.zeros(1, COLS), torch.full((1, COLS), -3.5)])
        assert torch.equal(x, AffineRange(8, symmetric=symmetric)(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["token", "group", "tensor"])
def test_values_that_are_no_numbers_come_out_as_such(granularity, symmetric):
    x = drawn(0, 2)
    x[1, 3] = torch.nan
    part = (static(drawn(0, 2), 8, symmetric=symmetric) if granularity == "tensor" else
            AffineRange(8, granularity=granularity, group_size=8 if granularity == "group" else -1,
                        symmetric=symmetric))  # fmt: skip

    y = part(x)

    assert y[1, 3].isnan()
    assert y[0].isfinite().all()


STEP = {"steps": torch.ones(1), "zeros": torch.zeros(1)}
REFUSED = {
    "granularity=row": ({"granularity": "row"}, "must be one of tensor, cluster, token, group"),
    "a static token": ({**STEP, "granularity": "token"}, "static ranges, found on calibration text, are those of"),
    "a tensor without text": ({"granularity": "tensor"}, "found on calibration text"),
    "a group without a size": ({"granularity": "group"}, "groups alone have a size"),
    "a token with one": ({"group_size": 8}, "groups alone have a size"),
    "clusters without index": ({**STEP, "granularity": "cluster"}, "clusters have the index of each channel"),
    "one bit": ({"bits": 1}, "bits=1 must be a whole number from 2 to 8"),
    "a step of zero": ({"granularity": "tensor", "steps": torch.zeros(1)}, "steps must be above 0"),
    "a step that is no number": ({"granularity": "tensor", "steps": torch.tensor([torch.nan])}, "NaN or infinite"),
    "half a zero point": ({"granularity": "tensor", "symmetric": False, "steps": torch.ones(1),
                           "zeros": torch.tensor([0.5])}, "whole numbers"),
    "an unknown cluster": ({**STEP, "granularity": "cluster", "index": torch.ones(4)}, "must be 0 to 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_what_is_allowed(case):
    given, words = REFUSED[case]

    with pytest.raises(LayerError) as refused:
        AffineRange(**given)

    assert words in str(refused.value)


def test_groups_go_whole():
    part = AffineRange(4, granularity="group", group_size=8)

    assert part.columns(torch.arange(8, 24)).granularity == "group"
    with pytest.raises(LayerError, match="groups of 8, which go whole"):
        part.columns(torch.arange(4, 20))


@pytest.mark.parametrize("part", [AffineRange(8, symmetric=False), AffineRange(8, granularity="group", group_size=8),
                                  AffineRange(8, scale="power_of_two")], ids=lambda part: part.words)  # fmt: skip
def test_kernels_take_none_of_it_and_the_layer_says_simulated(part):
    layer = Linear(Rounded(torch.eye(COLS)), input_part=part)

    kernel, refused = choose(layer.spec_on("cpu"))

    assert kernel is None
    assert "affine_range" in refused["w8a8"]
    assert layer.kernel_name() == "simulated"


def test_formats_of_other_engines_have_no_place_for_it():
    from compression.checkpoints.formats.compressed_tensors import scheme_of

    words = scheme_of(Linear(Rounded(torch.eye(COLS)), input_part=AffineRange(8, symmetric=False)))

    assert "it has no place for affine_range" == words
