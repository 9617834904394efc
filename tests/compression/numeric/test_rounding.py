"""GPTQ against the paper's own arithmetic, written plainly, and the laws that rounding has to keep."""

from dataclasses import replace

import pytest
import torch
from calibration_inputs import hessian_of, inputs
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussian, seeds, weights

from compression import LayerError
from compression.calibration.observers import Hessian
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import decode, quantize
from compression.numeric.half_quadratic import half_quadratic
from compression.numeric.rounding import Rounded, gptq, output_error, relative_error, upper_factor

GRIDS = st.builds(
    AffineGrid,
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from((8, 24, 32, 96, -1)),
    symmetric=st.just(False),
)


def column_loop(weight, hessian, grid, damp):
    """GPTQ as the paper has it, eq. 2 and 3: one column after the other, by the inverse of H, in fp64."""
    weight, cols = weight.double().clone(), weight.shape[1]
    group = cols if grid.group_size == -1 else grid.group_size
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    one, quantized = replace(grid, group_size=-1), torch.zeros_like(weight)
    for j in range(cols):
        if j % group == 0:
            params = one.fit(weight[:, j : j + group].float())
        code = one.encode(weight[:, j : j + 1].float(), params)
        quantized[:, j : j + 1] = decode(one, code, params)
        error = (weight[:, j] - quantized[:, j]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return quantized.float()


def nearest(weight, grid):
    return decode(grid, *quantize(grid, weight))


@given(seeds, GRIDS)
def test_gptq_equals_the_column_loop_of_the_paper(seed, grid):
    weight, hessian = gaussian(5, 96, seed=seed), hessian_of(inputs(96, seed=seed))

    expected, actual = column_loop(weight, hessian, grid, 0.01), gptq(weight, hessian, grid).decode(grid)

    # a tie between two levels may fall either way, and then all columns after it differ in that row
    same = (expected - actual).abs().amax(-1) <= 1e-5
    assert same.float().mean() >= 0.6
    errors = [float(output_error(weight - q, hessian).sum()) for q in (expected, actual)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_gptq_equals_the_column_loop_on_a_layer_of_usual_shape():
    weight, hessian = gaussian(64, 384, seed=1), hessian_of(inputs(384, tokens=1500))
    grid = AffineGrid(bits=4, group_size=128, symmetric=False)

    difference = (column_loop(weight, hessian, grid, 0.01) - gptq(weight, hessian, grid).decode(grid)).abs().amax(-1)

    assert (difference > 1e-5).sum() <= 3  # rows with a tie


@pytest.mark.parametrize("cols", [32, 100])
def test_the_factor_is_that_of_the_textbook(cols):
    """H^-1 = U^T U, U upper triangular, is what the paper takes; ours is R = U^-1."""
    hessian = hessian_of(inputs(cols)).double()
    factor, damping = upper_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols)

    assert 0.01 == damping
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.t(), damped)
    torch.testing.assert_close(torch.linalg.inv(factor), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"params": True}, {"act_order": True, "params": True}],
                         ids=lambda o: "-".join(o) or "plain")  # fmt: skip
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_better_than_nearest_on_average(options, bits, group, symmetric):
    grid = AffineGrid(bits=bits, group_size=group, symmetric=symmetric)
    ratios = []
    for seed in range(4):
        weight, hessian = gaussian(24, 128, seed=seed), hessian_of(inputs(128, seed=seed))
        given = options | ({"params": grid.fit(weight)} if options.get("params") else {})
        quantized = gptq(weight, hessian, grid, **given).decode(grid)
        ratios.append(
            relative_error(weight, quantized, hessian) / relative_error(weight, nearest(weight, grid), hessian)
        )

    assert sum(ratios) / len(ratios) < 0.95


@given(seeds, GRIDS, st.booleans())
def test_independent_inputs_of_equal_size_leave_nothing_to_make_up_for(seed, grid, static):
    weight = gaussian(4, 96, seed=seed)

    rounded = gptq(weight, torch.eye(96), grid, params=grid.fit(weight) if static else None)

    assert torch.equal(nearest(weight, grid), rounded.decode(grid))


@given(seeds, st.booleans())
def test_activation_order_is_gptq_on_permuted_columns(seed, static):
    grid = AffineGrid(bits=3, group_size=-1 if static else 32, symmetric=True)
    weight, hessian = gaussian(4, 96, seed=seed), hessian_of(inputs(96, seed=seed))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    params = grid.fit(weight) if static else None

    plain = gptq(weight[:, order], hessian[order][:, order], grid, params=params)
    ordered = gptq(weight, hessian, grid, act_order=True, params=params)

    assert torch.equal(plain.decode(grid)[:, order.argsort()], ordered.decode(grid))
    assert (ordered.permutation is None) == static


@given(seeds, st.permutations(range(64)))
def test_permuting_columns_and_back_is_the_identity(seed, order):
    grid = AffineGrid(bits=4, group_size=32, symmetric=False)
    weight, order = gaussian(3, 64, seed=seed), torch.tensor(order)

    codes, params = quantize(grid, weight[:, order])

    expected = nearest(weight[:, order], grid)
    assert torch.equal(expected, Rounded(codes, params, order).decode(grid)[:, order])


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_that_no_input_reaches_are_rounded_to_nearest(act_order):
    grid = AffineGrid(bits=4, group_size=-1, symmetric=False)
    x, dead = inputs(64), torch.tensor([0, 5, 31, 63])
    x[:, dead] = 0
    weight = gaussian(8, 64)

    rounded = gptq(weight, hessian_of(x), grid, act_order=act_order, params=grid.fit(weight))

    assert 0.01 == rounded.damping
    assert torch.equal(nearest(weight, grid)[:, dead], rounded.decode(grid)[:, dead])


def test_inputs_that_are_all_zero_leave_rounding_to_nearest():
    grid = AffineGrid(bits=4, group_size=32, symmetric=False)
    weight = gaussian(8, 64)

    assert torch.equal(nearest(weight, grid), gptq(weight, torch.zeros(64, 64), grid).decode(grid))


def test_a_singular_hessian_gets_more_damping_and_says_how_much():
    grid = AffineGrid(bits=4, group_size=32, symmetric=False)
    weight, direction = gaussian(8, 64), torch.ones(1, 64)

    rounded = gptq(weight, direction.t() @ direction, grid, damp=0)

    assert 0 < rounded.damping < 0.1
    assert torch.isfinite(rounded.decode(grid)).all()


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(LayerError, match="not finite"):
        gptq(gaussian(4, 32), torch.full((32, 32), float("nan")), AffineGrid(bits=4, group_size=32, symmetric=True))


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from((3, 64, 257, 1030)))
def test_the_hessian_is_the_sum_over_all_inputs(seed, lengths, cols):
    x = gaussian(sum(lengths), cols, seed=seed, std=1)
    summed = Hessian(cols)
    for part in x.split(lengths):
        summed.add(part[None])

    hessian = summed.value()

    assert torch.equal(hessian, hessian.t())
    assert float((hessian - hessian_of(x.double())).norm() / hessian.norm()) < 1e-6


def test_one_matrix_for_two_layers_gives_what_each_would_get():
    grid = AffineGrid(bits=4, group_size=32, symmetric=True)
    hessian, first, second = hessian_of(inputs(96)), gaussian(8, 96), gaussian(12, 96, seed=9)

    both = gptq(torch.cat([first, second]), hessian, grid, act_order=True)

    for weight, part in ((first, slice(0, 8)), (second, slice(8, 20))):
        alone = gptq(weight, hessian, grid, act_order=True).decode(grid)
        assert (alone - both.rows(part).decode(grid)).abs().amax(-1).le(1e-6).float().mean() > 0.8  # but for ties


# --- Half-quadratic -------------------------------------------------------------------------------------------------


def sparse_error(weight, quantized, group, norm=0.7):
    """sum |W - Q|^norm of each group."""
    return (weight - quantized).abs().pow(norm).view(len(weight), -1, weight.shape[1] if group == -1 else group).sum(-1)


@given(weights(), st.sampled_from((2, 3, 4, 8)), st.sampled_from((8, 32, -1)))
def test_half_quadratic_zero_points_are_never_worse_than_those_of_nearest(weight, bits, group):
    grid = AffineGrid(bits=bits, group_size=group, symmetric=False, float_zeros=True)
    integer = replace(grid, float_zeros=False)
    dense = weight.float()
    rounded = half_quadratic(dense, grid, dtype=weight.dtype)

    before = decode(integer, *quantize(integer, weight))
    after = rounded.decode(grid)

    assert torch.isfinite(after).all()
    loss, least = (sparse_error(dense, q, group) for q in (after, before))
    assert (loss <= least * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_quadratic_zero_points_are_better_on_average(bits):
    grid = AffineGrid(bits=bits, group_size=64, symmetric=False, float_zeros=True)
    weight = gaussian(64, 256)

    losses = [float(sparse_error(weight, q, 64).sum()) for q in (half_quadratic(weight, grid).decode(grid),
                                                                 nearest(weight, grid))]  # fmt: skip

    assert losses[0] < 0.99 * losses[1]
