"""Cayley SGD: a step is the one by the inverse, matrices stay orthogonal, and what is minimised falls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.numeric.cayley import cayley_step, nearest_orthogonal, skew_of

seeds = st.integers(0, 2**20)


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed, size):
    return torch.linalg.qr(drawn(seed, size, size))[0]


def away(matrix):
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@given(seeds, st.integers(2, 24), st.floats(1e-3, 2.0))
def test_a_step_is_the_cayley_transform_by_the_inverse(seed, size, rate):
    rotation, gradient, one = orthogonal(seed, size), drawn(seed + 1, size, size), torch.eye(size).double()
    skew = -(gradient.T @ rotation - rotation.T @ gradient) / 2
    t = min(rate, 1 / float(skew.abs().sum(0).max()))

    found = cayley_step(rotation, gradient, rate)

    exact = torch.linalg.solve(one - t / 2 * skew, (one + t / 2 * skew) @ rotation.T).T
    torch.testing.assert_close(skew_of(rotation, gradient), skew, rtol=0, atol=1e-12)
    spread = t / 2 * float(torch.linalg.matrix_norm(skew, 2))
    assert float((found - exact).abs().max()) <= 3 * spread**6 + 1e-12  # five times put in
    assert away(found) <= 1e-12


@settings(max_examples=5)
@given(seeds, st.integers(2, 32))
def test_matrices_are_orthogonal_after_a_hundred_steps(seed, size):
    rotation = orthogonal(seed, size)
    for step in range(100):
        rotation = cayley_step(rotation, drawn(seed + step, size, size) * 10, 1.5)

    assert away(rotation) <= 1e-10


@settings(max_examples=5)
@given(seeds)
def test_it_finds_the_rotation_that_takes_one_matrix_nearest_to_another(seed):
    """Procrustes' problem, whose answer comes out of a singular value decomposition; from a start of its own sign."""
    a, turn = drawn(seed, 40, 6), orthogonal(seed + 1, 6)
    b = a @ turn + drawn(seed + 2, 40, 6) * 0.1
    left, _, right = torch.linalg.svd(a.T @ b)
    best = left @ right
    rotation = best @ torch.linalg.matrix_exp((s := drawn(seed + 3, 6, 6) * 0.1) - s.T)

    before = float((a @ rotation - b).square().sum())
    for _ in range(150):
        rotation = cayley_step(rotation, 2 * a.T @ (a @ rotation - b), 0.008)

    least = float((a @ best - b).square().sum())
    assert pytest.approx(least, rel=1e-6) == float((a @ rotation - b).square().sum()) < before


@given(seeds)
def test_where_turning_changes_nothing_it_stays(seed):
    rotation = orthogonal(seed, 8)
    symmetric = drawn(seed + 1, 8, 8)

    assert torch.allclose(rotation, cayley_step(rotation, rotation @ (symmetric + symmetric.T), 1.5), atol=1e-12)


def test_what_is_nearly_orthogonal_becomes_the_nearest_orthogonal_matrix():
    matrix = orthogonal(3, 16) + drawn(4, 16, 16) * 1e-2
    left, _, right = torch.linalg.svd(matrix)

    torch.testing.assert_close(left @ right, nearest_orthogonal(matrix), rtol=0, atol=1e-9)
