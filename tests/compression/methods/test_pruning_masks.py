"""Which weights go: exact counts and the lowest scores, against sorting; the masks of magnitude and Wanda."""

import pytest
import torch
from calibration_inputs import inputs
from hypothesis import example, given
from hypothesis import strategies as st
from pruning_cases import PATTERNS, ranked, shares, with_ties
from saboteurs import BROKEN_MASKS
from strategies import DTYPES, gaussian, seeds

from compression.methods.pruning.unstructured.magnitude import Magnitude
from compression.methods.pruning.unstructured.wanda import Wanda
from compression.numeric import sparsity


def check_masks(choose, seed=0, share=0.5):
    """Both ways of counting, and patterns, against sorting; on weights with many ties."""
    scores = with_ties(5, 48, seed).abs()
    by_row = [ranked(row, sparsity.removed(share, 48)) for row in scores.tolist()]
    assert by_row == choose(scores, share, None, by_row=True).tolist()
    of_all = ranked(scores.flatten().tolist(), sparsity.removed(share, 240))
    assert of_all == choose(scores, share, None, by_row=False).flatten().tolist()
    for n, m in PATTERNS:
        expected = [ranked(group, m - n) for group in scores.view(-1, m).tolist()]
        assert expected == choose(scores, share, (n, m), by_row=False).view(-1, m).tolist()


@given(seeds, shares)
@example(0, 0.5)
def test_the_lowest_scores_go_and_of_equal_ones_the_first(seed, share):
    check_masks(sparsity.choose, seed, share)


@pytest.mark.parametrize("broken", BROKEN_MASKS, ids=lambda f: f.__name__)
def test_a_broken_mask_is_caught(broken):
    with pytest.raises(AssertionError):
        check_masks(broken)


@given(st.integers(0, 10**7), st.integers(0, 99))
def test_the_count_is_the_floor_of_the_share_as_it_is_written(count, hundredths):
    assert count * hundredths // 100 == sparsity.removed(hundredths / 100, count)


@given(seeds, shares, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(DTYPES), st.booleans())
def test_over_all_layers_the_smallest_weights_go(seed, share, rows, dtype, ties):
    parts = [(with_ties if ties else gaussian)(r, 16, seed=seed + i).to(dtype) for i, r in enumerate(rows)]

    masks = sparsity.smallest_overall(parts, share)

    together = [w for part in parts for w in part.abs().flatten().tolist()]
    expected = ranked(together, sparsity.removed(share, len(together)))
    assert expected == [m for mask in masks for m in mask.flatten().tolist()]


@given(seeds, st.lists(st.integers(-20, 20), min_size=6, max_size=6), st.sampled_from((None, "2:4")))
def test_scaling_the_rows_of_a_weight_leaves_the_mask_of_magnitude_within_a_row(seed, exponents, pattern):
    method, weight = Magnitude(scope="layer" if pattern else "row", pattern=pattern), gaussian(6, 64, seed=seed)
    scaled = weight * torch.tensor(exponents).float().exp2()[:, None]

    assert torch.equal(method.magnitude_mask(weight), method.magnitude_mask(scaled))


@given(seeds, st.integers(-20, 20), st.sampled_from((None, "2:4")))
def test_scaling_the_activations_leaves_the_mask_of_wanda(seed, exponent, pattern):
    method, weight, x = Wanda(pattern=pattern), gaussian(6, 64, seed=seed), inputs(64, seed=seed, tokens=50)
    masks = []
    for scale in (1, 2.0**exponent):
        seen = method.observer(64, "cpu")
        seen.add(x * scale)
        masks.append(method.prune([weight], seen.value()).weights[0] == 0)

    assert torch.equal(*masks)
    assert (masks[0].sum(1) == 32).all()


def test_wanda_is_magnitude_where_all_inputs_are_of_one_size():
    weight, seen = gaussian(8, 64), Wanda().observer(64, "cpu")
    seen.add(torch.ones(5, 64))

    pruned = Wanda().prune([weight], seen.value()).weights[0]

    assert torch.equal(weight.masked_fill(Magnitude(scope="row").magnitude_mask(weight), 0), pruned)
