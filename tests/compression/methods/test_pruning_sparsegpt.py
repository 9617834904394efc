"""SparseGPT: against its own arithmetic written plainly, and its errors beside those of Wanda and magnitude."""

import pytest
import torch
from calibration_inputs import hessian_of, inputs
from hypothesis import given
from hypothesis import strategies as st
from pruning_cases import PATTERNS, ranked, shares, with_ties
from strategies import gaussian, seeds

import compression
from compression import LayerError
from compression.architectures.decoder import decoder_blocks
from compression.calibration import observers
from compression.calibration.capture import Inputs, stacks_of
from compression.methods.pruning.unstructured.magnitude import Magnitude
from compression.methods.pruning.unstructured.wanda import Wanda
from compression.numeric import sparsity
from compression.numeric.rounding import relative_error


def column_loop(weight, hessian, share, pattern, damp, block):
    """SparseGPT as the paper has it, eq. 3 and Algorithm 1, with the inverse for the columns to come made anew at every
    column."""
    rows, cols = weight.shape
    weight, mask = weight.clone(), torch.zeros(rows, cols, dtype=torch.bool)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(cols, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(cols)]
    step = block if pattern is None else pattern[1]
    for j in range(cols):
        if j % step == 0:
            part = range(j, min(j + step, cols))
            cost = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in part])  # (columns, rows)
            if pattern is None:
                chosen = ranked(cost.flatten().tolist(), sparsity.removed(share, cost.numel()))
                mask[:, list(part)] = torch.tensor(chosen).view(len(part), rows).t()
            else:
                chosen = [ranked(row, pattern[1] - pattern[0]) for row in cost.t().tolist()]
                mask[:, list(part)] = torch.tensor(chosen)
        error = (weight[:, j] * mask[:, j]) / inverses[j][0, 0]
        weight[:, j:] -= error[:, None] * inverses[j][0]
        weight[mask[:, j], j] = 0
    return weight


@given(seeds, st.sampled_from((96, 75)), st.sampled_from((0.0, 0.3, 0.5, 0.9)))
def test_sparsegpt_equals_the_column_loop_of_the_paper(seed, cols, share):
    weight, hessian = gaussian(5, cols, seed=seed).double(), hessian_of(inputs(cols, seed=seed)).double()

    expected = column_loop(weight, hessian, share, None, 0.01, sparsity.block_size(cols))

    torch.testing.assert_close(sparsity.sparsegpt([weight], hessian, share, None).weights[0], expected)


@given(seeds, st.sampled_from(PATTERNS))
def test_sparsegpt_in_a_pattern_equals_the_column_loop_of_the_paper(seed, pattern):
    weight, hessian = gaussian(5, 80, seed=seed).double(), hessian_of(inputs(80, seed=seed)).double()

    expected = column_loop(weight, hessian, 0.5, pattern, 0.01, 0)

    actual = sparsity.sparsegpt([weight], hessian, 0.5, pattern).weights[0]
    torch.testing.assert_close(actual, expected)
    assert ((actual.view(5, -1, pattern[1]) != 0).sum(-1) == pattern[0]).all()


@given(seeds, st.sampled_from((128, 100)), shares, st.booleans())
def test_sparsegpt_makes_as_many_zeros_of_every_block_of_every_layer_as_promised(seed, cols, share, ties):
    parts = [(with_ties if ties else gaussian)(rows, cols, seed=seed + rows) for rows in (3, 8)]
    hessian = torch.eye(cols) if ties else hessian_of(inputs(cols, seed=seed))

    pruned = sparsity.sparsegpt(parts, hessian, share, None).weights

    for before, after in zip(parts, pruned, strict=True):
        for was, block in zip(*(w.split(sparsity.block_size(cols), 1) for w in (before, after)), strict=True):
            promised = max(sparsity.removed(share, block.numel()), int((was == 0).sum()) if ties else 0)
            assert promised == int((block == 0).sum())


def test_two_layers_together_are_pruned_as_each_would_be_alone():
    hessian = hessian_of(inputs(96)).double()
    first, second = gaussian(8, 96).double(), gaussian(12, 96, seed=9).double()

    both = sparsity.sparsegpt([first, second], hessian, 0.5, None).weights

    for weight, part in ((first, both[0]), (second, both[1])):
        torch.testing.assert_close(sparsity.sparsegpt([weight], hessian, 0.5, None).weights[0], part)


def test_columns_that_no_input_reaches_go_first_and_cost_nothing():
    x, dead = inputs(64), torch.tensor([0, 5, 31, 63])
    x[:, dead] = 0
    weight = gaussian(8, 64)
    weight[:, dead] = 9.0

    pruned = sparsity.sparsegpt([weight], hessian_of(x), 0.5, None).weights[0]

    assert (pruned[:, dead] == 0).all()


def test_inputs_that_are_not_finite_are_refused():
    seen = Wanda().observer(32, "cpu")
    seen.add(torch.full((2, 32), float("nan")))

    with pytest.raises(LayerError, match="not finite"):
        Wanda().prune([gaussian(4, 32)], seen.value())
    with pytest.raises(LayerError, match="not finite"):
        sparsity.sparsegpt([gaussian(4, 32)], torch.full((32, 32), float("nan")), 0.5, None)


def errors(weight, x, share, pattern):
    """Relative output errors of sparsegpt, wanda and magnitude on the inputs that they were given."""
    hessian, seen, method = hessian_of(x), observers.Norms(x.shape[1], len(x)), Wanda(pattern=pattern)
    seen.add(x)
    answers = (
        sparsity.sparsegpt([weight], hessian, share, method.kept).weights[0],
        method.prune([weight], seen.value()).weights[0],
        weight.masked_fill(Magnitude(pattern=pattern).magnitude_mask(weight), 0),
    )
    return torch.tensor([relative_error(weight, answer, hessian) for answer in answers])


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_on_correlated_inputs_sparsegpt_is_nearest_and_magnitude_farthest(pattern, seed):
    x = inputs(256, seed=seed, tokens=1500)

    first, second, third = errors(gaussian(64, 256, seed=seed), x, 0.5, pattern)

    assert first < second < third


def test_a_pattern_costs_more_than_free_choice_and_a_wide_one_less_than_a_narrow_one():
    x, weight = inputs(256, tokens=1500), gaussian(64, 256)

    free, wide, narrow = (errors(weight, x, 0.5, pattern) for pattern in (None, "4:8", "2:4"))

    assert (free < wide).all() and (wide < narrow).all()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_on_the_reference_sparsegpt_is_nearest_and_magnitude_farthest(pattern):
    base = compression.open_base("reference")
    from bench.reference import world

    ids = base.tokenizer.encode("\n\n".join(world.texts("train", limit=60)), add_special_tokens=False, verbose=False)
    block = decoder_blocks(base.model)[0]
    seen = {stack: [] for stack in stacks_of(block)}
    reached = Inputs.of_first_block(base.model, torch.tensor(ids[: 4 * 512]).view(4, 512))
    reached.observe(block, lambda stack, x: seen[stack].append(x.float()[0]))

    found = torch.stack([
        errors(block.module.get_submodule(name).weight.detach().float(), torch.cat(seen[stack]), 0.5, pattern)
        for stack in seen for name in stack.readers
    ])  # fmt: skip

    assert (found[:, 0] < found[:, 1]).all()
    assert found[:, 1].mean() < found[:, 2].mean()
