"""Hadamard matrices: H H^T = n I, the fast product is the dense one, sizes that none is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as sylvester

from compression import LayerError
from compression.numeric import hadamard

PALEY = (12, 20, 28, 36, 40, 44, 52, 60, 76, 100, 108, 140, 148, 344)  # 28: 13; 52: 25 = 5^2; 344: 343 = 7^3
sizes = st.sampled_from([1, 2, 4, 8, 32, 24, 80, 144, 240, 576, *PALEY])


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 64, 24, 144, 240, *PALEY])
def test_rows_are_orthogonal_and_entries_are_signs(size):
    matrix = hadamard.construct(size)

    assert torch.equal(size * torch.eye(size, dtype=torch.float64), matrix @ matrix.T)
    assert (matrix.abs() == 1).all()


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_of_powers_of_two_it_is_sylvesters(size):
    assert torch.equal(torch.from_numpy(sylvester(size)).double(), hadamard.construct(size))


@given(sizes, st.integers(1, 3), st.integers(0, 2**20))
def test_the_fast_product_is_the_dense_one_and_goes_back(size, blocks, seed):
    x, matrix = drawn(seed, 2, 3, size * blocks), hadamard.construct(size) / size**0.5

    fast = hadamard.transform(x, size)

    slow = torch.cat([part @ matrix for part in x.split(size, -1)], -1)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard.back(fast, size), x, rtol=0, atol=1e-12)


def test_16_bits_are_computed_in_fp32_and_rounded_once():
    x = drawn(3, 4, 96).bfloat16()

    assert torch.equal(hadamard.transform(x.float()).bfloat16(), hadamard.transform(x))


def test_the_gradient_is_that_of_a_linear_map():
    hadamard._factor.cache_clear()
    with torch.inference_mode():
        hadamard.transform(drawn(1, 3, 24))  # as a model is measured before another one is trained
    x = drawn(1, 3, 24).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: hadamard.transform(x, 12), x)


@given(st.sampled_from([64, 24, 100, 156, 10]), st.integers(0, 2**20))
def test_random_matrices_are_orthogonal_and_spread_one_channel_over_its_block(size, seed):
    matrix = hadamard.random(size, torch.Generator().manual_seed(seed))

    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert pytest.approx(hadamard.block_of(size) ** -0.5) == float(matrix.abs().max())
    assert not torch.equal(matrix, hadamard.random(size, torch.Generator().manual_seed(seed + 1)))


@pytest.mark.parametrize(
    ("size", "block"), [(156, 52), (172, 4), (92, 4), (10, 2), (7, 1), (11008, 11008), (14336, 14336), (18944, 18944)]
)
def test_what_cannot_be_taken_is_done_in_blocks_of_the_largest_divisor_that_can(size, block):
    assert block == hadamard.block_of(size)


def test_sizes_that_none_is_made_of_are_refused_with_the_way_out():
    with pytest.raises(LayerError, match=r"no Hadamard matrix of size 156 is made here; .* is 52"):
        hadamard.construct(156)
    with pytest.raises(LayerError, match="in blocks of 156 cannot be taken of 156 channels; blocks of 52 can"):
        hadamard.transform(torch.zeros(1, 156))
    with pytest.raises(LayerError, match="in blocks of 8 cannot be taken of 12 channels; blocks of 12 can"):
        hadamard.transform(torch.zeros(1, 12), 8)
    with pytest.raises(LayerError, match="layer 3 has 33 channels, an odd number"):
        hadamard.block_for(33, "layer 3")
