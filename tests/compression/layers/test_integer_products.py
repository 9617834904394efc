"""Products of whole numbers on both sides: beside the plain way in fp32, and beside sums of Python's integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.layers import Linear
from compression.layers.activations import TokenRange
from compression.layers.codes import Codes
from compression.layers.kernels.choose import choose
from compression.layers.kernels.integer_products import exact_here, token_steps
from compression.layers.rounded import Rounded
from compression.numeric.grids import AffineGrid

pytestmark = pytest.mark.skipif(not exact_here(), reason="this processor has no VNNI")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(rows, cols, *, step=None, bias=False, dtype=torch.float32, seed=0):
    given = drawn(rows, seed=seed + 1, dtype=dtype) if bias else None
    return Linear(Rounded(drawn(rows, cols, seed=seed, dtype=dtype)), given, input_part=TokenRange(8, step))


@given(
    st.integers(1, 40), st.integers(2, 70), st.integers(1, 5), st.none() | st.floats(0.005, 0.1), st.booleans(),
    st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_the_plain_one(rows, cols, tokens, step, bias, dtype, seed):
    layer = layer_of(rows, cols, step=step, bias=bias, dtype=dtype, seed=seed)
    x = drawn(2, tokens, cols, seed=seed + 2, dtype=dtype)

    y = layer(x)

    assert "w8a8" == layer.kernel_name()
    assert (y.shape, y.dtype) == ((2, tokens, rows), dtype)
    wanted = layer.reference(x).float()
    size = wanted.abs().max() + (0 if layer.bias is None else layer.bias.abs().max())
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=float(8 * torch.finfo(dtype).eps * size))


@given(st.integers(2, 70), st.booleans(), st.integers(0, 99))
def test_codes_on_an_even_grid_are_multiplied_alike(cols, bias, seed):
    grid = AffineGrid(bits=8, group_size=-1, symmetric=True)
    given = drawn(24, seed=seed + 1) if bias else None
    layer = Linear(Codes.from_weight(drawn(24, cols, seed=seed), grid), given, input_part=TokenRange())
    x = drawn(3, cols, seed=seed + 2)

    assert "w8a8" == layer.kernel_name()
    torch.testing.assert_close(layer(x), layer.reference(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", [{"symmetric": False}, {"group_size": 8, "symmetric": True}])
def test_grids_with_zero_points_or_groups_are_refused(setting):
    grid = AffineGrid(**{"bits": 8, "group_size": -1} | setting)
    layer = Linear(Codes.from_weight(drawn(24, 40), grid), input_part=TokenRange())

    assert "symmetric weights with one scale" in choose(layer.spec_on("cpu"))[1]["w8a8"]


def test_sums_are_those_of_whole_numbers():
    """Where scales are powers of two, nothing is rounded behind the sums."""
    weight = torch.randint(-127, 128, (8, 4096), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 127
    x = torch.randint(-127, 128, (3, 4096), generator=torch.Generator().manual_seed(1)).float()
    x[:, 0] = 127

    y = Linear(Rounded(weight / 127), input_part=TokenRange(8, 1.0))(x)

    exact = [[sum(int(a) * int(b) for a, b in zip(row, other, strict=True)) for other in weight] for row in x]
    torch.testing.assert_close(y, torch.tensor(exact, dtype=torch.float64).div(127).float(), rtol=1e-6, atol=0)


def test_beyond_a_static_step_activations_are_clipped():
    layer = Linear(Rounded(torch.eye(16)), input_part=TokenRange(8, 0.5))
    x = torch.full((1, 16), 1000.0)

    torch.testing.assert_close(layer(x), torch.full((1, 16), 63.5))
    torch.testing.assert_close(layer(-x), torch.full((1, 16), -63.5))


def test_a_token_of_zeros_stays_one():
    x = drawn(3, 64)
    x[1] = 0

    assert torch.equal(torch.zeros(32), layer_of(32, 64)(x)[1])
    assert 1 == token_steps(x)[1]


def test_a_step_that_is_put_in_later_is_taken():
    layer, x = layer_of(32, 64), drawn(3, 64)
    before = layer(x)

    layer.input_part = TokenRange(8, 0.25)

    torch.testing.assert_close(layer(x), layer.reference(x), rtol=0, atol=1e-4)
    assert not torch.allclose(before, layer(x))


def test_codes_are_stored_as_before_once_the_kernel_held_them():
    layer = layer_of(24, 40)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    layer(drawn(2, 40))

    assert all(torch.equal(stored[name], tensor) for name, tensor in layer.state_dict().items())
    assert torch.equal(Rounded(drawn(24, 40)).value(), layer.weight_part.value())


def test_gradients_go_the_plain_way():
    layer, x = layer_of(24, 40), drawn(2, 40).requires_grad_()

    layer(x).sum().backward()

    torch.testing.assert_close(x.grad, layer.weight_part.value().sum(0).expand(2, -1))


@pytest.mark.parametrize("bits", [4, 6])
def test_other_bits_are_refused_with_the_number(bits):
    _, refused = choose(Linear(Rounded(drawn(24, 40)), input_part=TokenRange(bits)).spec_on("cpu"))

    assert f"activations in 8 bits only, not {bits}" == refused["w8a8"]


def test_activations_that_are_cut_off_are_refused():
    _, refused = choose(Linear(Rounded(drawn(24, 40)), input_part=TokenRange(clip=0.9)).spec_on("cpu"))

    assert "activations up to their largest only, none of them cut off" == refused["w8a8"]


def test_one_input_is_refused():
    _, refused = choose(Linear(Rounded(drawn(24, 1)), input_part=TokenRange()).spec_on("cpu"))

    assert "two inputs or more" == refused["w8a8"]


def test_sums_that_overflow_are_refused(monkeypatch):
    """As oneDNN's on processors without VNNI: it multiplies x + 128, adds pairs in 16 bits, and takes 128 w off."""

    def saturating(a, b):
        pairs = ((a.int() + 128)[:, :, None] * b.int()[None]).view(len(a), -1, 2, b.shape[1]).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    exact_here.cache_clear()
    try:
        layer = Linear(Rounded(drawn(24, 40)), input_part=TokenRange())
        assert "no VNNI" in choose(layer.spec_on("cpu"))[1]["w8a8"]
        assert "simulated" == layer.kernel_name()
    finally:
        exact_here.cache_clear()
