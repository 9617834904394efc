"""GPTQ on grids whose parameters are known beforehand, against the paper's column loop in fp64, and its laws."""

import pytest
import torch
from calibration_inputs import hessian_of, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import gaussian, seeds

from compression import LayerError
from compression.numeric.floats import FloatGrid
from compression.numeric.grids import AffineGrid, Int8RowGrid, SignedGrid
from compression.numeric.grouping import decode
from compression.numeric.rounding import Factored, gptq, output_error

GRIDS = {
    "int8": SignedGrid(bits=8), "int4": SignedGrid(bits=4), "fp8": FloatGrid(element="e4m3", group_size=-1),
    "fp8-groups": FloatGrid(element="e5m2", group_size=24),
    "nvfp4": FloatGrid(element="e2m1", group_size=16, scale="e4m3"),
    "mxfp4": FloatGrid(element="e2m1", group_size=32, scale="e8m0"), "int8-row": Int8RowGrid(),
    "affine": AffineGrid(bits=3, group_size=32, symmetric=False),
}  # fmt: skip
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def levels_of(grid, params, rows, cols):
    """Every value that a weight at each place can have, fp64 (rows, cols, levels)."""
    scales, zeros = grid.expand(params, rows, cols)
    table = grid.table()
    table = table[table.isfinite()].double()
    table = table[1:] if grid.kind in ("signed", "int8_row") else table  # code 0 stands for no level
    levels = table - (0 if zeros is None else zeros.double()[..., None])
    return (levels * scales.double()[..., None]).repeat_interleave(cols // scales.shape[1], 1)


def column_loop(weight, hessian, grid, params, damp=0.01):
    """By the inverse of H, column by column in the order of falling H_jj, to the nearest of all values; in fp64."""
    rows, cols = weight.shape
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    weight, levels = weight.double()[:, order], levels_of(grid, params, rows, cols)[:, order]
    quantized = torch.zeros_like(weight)
    for j in range(cols):
        nearest = (levels[:, j] - weight[:, j, None]).abs().argmin(-1)
        quantized[:, j] = levels[:, j].gather(1, nearest[:, None])[:, 0]
        weight[:, j:] -= ((weight[:, j] - quantized[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return quantized[:, order.argsort()]


@each_grid
def test_it_equals_the_column_loop_of_the_paper(grid):
    weight, hessian = gaussian(48, 96, seed=1), hessian_of(inputs(96, seed=1))
    params = grid.fit(weight)

    codes = Factored.of(hessian).codes(weight, grid, params)

    difference = (column_loop(weight, hessian, grid, params) - decode(grid, codes, params)).abs().amax(-1)
    ties = difference > 1e-5  # one tie, or one value between two levels, changes the rest of its row
    assert ties.float().mean() <= 0.15
    errors = [float(output_error(weight - q, hessian).sum())
              for q in (column_loop(weight, hessian, grid, params).float(), decode(grid, codes, params))]  # fmt: skip
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@settings(max_examples=40)
@given(seeds, st.sampled_from(list(GRIDS)))
def test_independent_inputs_leave_rounding_to_nearest_to_the_bit(seed, name):
    """However large each is."""
    grid, weight = GRIDS[name], gaussian(4, 96, seed=seed)
    weight[:, ::7] = 0
    weight[1] = -weight[1]  # with -0.0
    params = grid.fit(weight)

    codes = Factored.of(torch.diag(gaussian(1, 96, seed=seed)[0].exp())).codes(weight, grid, params)

    assert torch.equal(grid.encode(weight, params), codes)


@each_grid
def test_outputs_are_nearer_than_those_of_nearest_on_average(grid):
    ratios = []
    for seed in range(4):
        weight, hessian = gaussian(24, 96, seed=seed), hessian_of(inputs(96, seed=seed))
        params = grid.fit(weight)
        codes = Factored.of(hessian).codes(weight, grid, params), grid.encode(weight, params)
        one, other = (float(output_error(weight - decode(grid, each, params), hessian).sum()) for each in codes)
        ratios.append(one / other)

    assert sum(ratios) / len(ratios) < 0.9


@each_grid
def test_columns_without_inputs_are_rounded_to_nearest_and_zeros_stay(grid):
    x, dead = inputs(96), torch.tensor([0, 5, 31, 95])
    x[:, dead] = 0
    weight = gaussian(8, 96)
    weight[::2, 1::3] = 0
    params = grid.fit(weight)

    codes = Factored.of(hessian_of(x)).codes(weight, grid, params)

    assert torch.equal(grid.encode(weight, params)[:, dead], codes[:, dead])
    assert (decode(grid, codes, params)[weight == 0] == 0).all()


def test_on_an_affine_grid_it_is_gptq_with_static_groups():
    grid, weight, hessian = GRIDS["affine"], gaussian(24, 96, seed=2), hessian_of(inputs(96, seed=2))
    params = grid.fit(weight)

    codes = Factored.of(hessian).codes(weight, grid, params)

    assert torch.equal(gptq(weight, hessian, grid, act_order=True, params=params).codes, codes)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(LayerError, match="not finite"):
        Factored.of(torch.full((32, 32), float("inf")))
