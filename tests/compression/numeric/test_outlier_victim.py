"""Outlier-victim pairs beside a slow and obvious reference, and their laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from compression import LayerError
from compression.numeric import outlier_victim
from compression.numeric.outlier_victim import OUTLIERS, VICTIM

LEVELS = [*range(-7, 8), *OUTLIERS, *(-each for each in OUTLIERS)]


def heavy(seed, rows=6, cols=32):
    """Gaussian numbers, every tenth of which is ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * 3
    return torch.where(torch.rand(rows, cols, generator=generator) < 0.1, values * 10, values)


def slow(first, second):
    """One pair: each number at its nearest level; the larger outlier stays and its neighbour goes."""
    near = [min(LEVELS, key=lambda level: (abs(level - value), abs(level))) for value in (first, second)]
    outlying = [abs(level) > 7 for level in near]
    if all(outlying):
        outlying = [abs(first) >= abs(second), abs(first) < abs(second)]
    if outlying[0]:
        return [near[0], 0]
    return [0, near[1]] if outlying[1] else near


@given(seeds)
def test_pairs_are_rounded_as_the_reference_rounds_them(seed):
    values = heavy(seed)

    expected = [[level for pair in row.view(-1, 2).tolist() for level in slow(*pair)] for row in values]
    assert expected == outlier_victim.rounded(values).tolist()


@given(seeds)
def test_bytes_stand_for_what_was_rounded(seed):
    values = heavy(seed)
    codes = outlier_victim.encode(values)

    assert (6, 16) == codes.shape and torch.uint8 == codes.dtype and outlier_victim.sound(codes)
    assert torch.equal(outlier_victim.rounded(values), outlier_victim.decode(codes))
    assert torch.equal(codes, outlier_victim.encode(outlier_victim.decode(codes)))


def test_every_byte_is_one_pair_or_none():
    codes = torch.arange(256, dtype=torch.uint8)
    pairs = [tuple(pair) for pair in outlier_victim.decode(codes[:, None]).tolist()]
    whole = [pair for pair in pairs if pair[0] == pair[0] and pair[1] == pair[1]]

    assert 15 * 15 + 2 * 2 * len(OUTLIERS) == len(whole) == len(set(whole))
    assert all(0 in pair for pair in whole if max(map(abs, pair)) > 7)
    assert not outlier_victim.sound(torch.tensor([VICTIM | VICTIM << 4], dtype=torch.uint8))
    assert not outlier_victim.sound(torch.tensor([VICTIM], dtype=torch.uint8))  # beside it no outlier


def test_of_two_outliers_the_larger_stays_and_the_first_of_equal_ones():
    assert [[0, 48], [-96, 0], [24, 0]] == outlier_victim.rounded(
        torch.tensor([[20.0, 50.0], [-90.0, 50.0], [24.0, -24.0]])
    ).tolist()


@given(seeds, st.floats(0.01, 100))
def test_scales_follow_the_numbers_and_beat_all_others_that_were_tried(seed, factor):
    values = heavy(seed)
    scales = outlier_victim.fit(values)

    torch.testing.assert_close(outlier_victim.fit(values * factor), scales * factor, rtol=1e-4, atol=0)

    def error(each):
        return (outlier_victim.rounded(values / each[:, None]) * each[:, None] - values).square().sum(-1)

    mean, spread = values.mean(-1), 3 * values.std(-1, correction=0)
    reach = torch.maximum((mean + spread).abs(), (mean - spread).abs())
    others = torch.stack([error(share * reach / 7) for share in outlier_victim.SHARES])
    torch.testing.assert_close(error(scales), others.amin(0))


@given(seeds)
def test_without_outliers_it_is_the_symmetric_grid_of_15_levels(seed):
    values = torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)) * 14 - 7

    assert torch.equal(values.round().clamp(-7, 7), outlier_victim.rounded(values))


def test_zeros_have_a_scale_of_one_and_an_odd_number_is_refused():
    assert [1, 1] == outlier_victim.fit(torch.zeros(2, 8)).tolist()
    with pytest.raises(LayerError, match="7 inputs must be an even number"):
        outlier_victim.encode(torch.zeros(2, 7))
