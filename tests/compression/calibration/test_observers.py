"""What observers keep: merging equals having seen both, and each value is what a plain formula gives."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussian, seeds

from compression import LayerError
from compression.calibration.observers import Hessian, Largest, Mean, Norms, Sample

KINDS = {
    "largest": Largest,
    "mean": Mean,
    "hessian": Hessian,
    "sample": Sample,
    "every third": functools.partial(Sample, every=3),
    "norms": lambda cols: Norms(cols, 4000),
}
COLS = 12


def parts_of(observer):
    value = observer.value()
    return [value.norms, value._sample.value()] if isinstance(value, Norms) else [value]


def fed(kind, texts):
    observer = KINDS[kind](COLS)
    for text in texts:
        observer.add(text)
    return observer


@given(st.sampled_from(sorted(KINDS)), seeds, st.lists(st.integers(1, 40), max_size=4), st.integers(0, 4))
def test_merging_is_having_seen_both(kind, seed, lengths, cut):
    texts = [gaussian(n, COLS, seed=seed + i, std=1)[None] for i, n in enumerate(lengths)]
    one, other, both = fed(kind, texts[:cut]), fed(kind, texts[cut:]), fed(kind, texts)

    one.merge(other)

    for merged, whole in zip(parts_of(one), parts_of(both), strict=True):
        torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 60))
def test_each_value_is_what_the_formula_gives(seed, tokens):
    x = gaussian(tokens, COLS, seed=seed, std=2)

    found = {kind: parts_of(fed(kind, [x]))[0] for kind in KINDS}

    torch.testing.assert_close(found["largest"], x.abs().amax(0))
    torch.testing.assert_close(found["mean"], x.double().abs().mean(0))
    torch.testing.assert_close(found["hessian"], 2 * x.t() @ x / tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["norms"], x.norm(dim=0))
    assert torch.equal(x, found["sample"])
    assert torch.equal(x[::3], found["every third"])


@pytest.mark.parametrize("kind", ["largest", "norms"])
def test_inputs_that_are_not_finite_are_refused(kind):
    with pytest.raises(LayerError, match="not finite; check the base"):
        parts_of(fed(kind, [torch.full((2, COLS), torch.inf)]))
