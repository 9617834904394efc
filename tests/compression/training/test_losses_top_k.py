"""A teacher of which only the k most likely tokens are known, and the mass of all others."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textbook_losses import draw, each_divergence, gradient, logits
from torch.nn import functional

from compression.numeric.losses import forward_kl
from compression.numeric.losses_in_chunks import TopK


def lumped_textbook(z, t, k, temperature):
    """The k most likely tokens of the teacher, and one class of all others, token by token."""
    values = []
    for ours, theirs in zip(z.log_softmax(-1), t.log_softmax(-1), strict=True):
        order = theirs.argsort(descending=True)
        classes = [
            torch.cat([each[order[:k]], each[order[k:]].exp().sum().log()[None]]) for each in (ours, theirs)
        ]  # fmt: skip
        log_q, log_p = (functional.log_softmax(each / temperature, -1) for each in classes)
        values.append((log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(values).mean()


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_top_k_are_classes_and_the_tail_is_one_more(k, temperature):
    z, t = draw(5, 11, scale=2, dtype=torch.float64), draw(5, 11, seed=1, scale=2, dtype=torch.float64)

    torch.testing.assert_close(
        gradient(lambda z: lumped_textbook(z, t, k, temperature), z),
        gradient(lambda z: forward_kl(z, TopK.of(t, k), temperature=temperature), z),
    )


@each_divergence
@given(logits(), st.sampled_from((1.0, 4.0)))
def test_with_k_of_the_whole_vocabulary_nothing_is_lost(divergence, pair, temperature):
    z, t = pair
    whole = gradient(lambda z: divergence(z, t, temperature=temperature), z)
    of_k = gradient(lambda z: divergence(z, TopK.of(t, t.shape[-1]), temperature=temperature), z)

    torch.testing.assert_close(whole, of_k, rtol=1e-9, atol=1e-11)


@given(logits())
def test_a_larger_k_sees_more_and_none_more_than_all(pair):
    z, t = pair
    found = [float(forward_kl(z, TopK.of(t, k))) for k in range(1, t.shape[-1] + 1)]

    assert all(one <= other + 1e-9 * (1 + other) for one, other in itertools.pairwise(found))
    assert found[-1] == pytest.approx(float(forward_kl(z, t)), abs=1e-9)


@given(logits(count=1), st.integers(1, 40))
def test_the_top_k_and_their_tail_make_one(one, k):
    teacher = TopK.of(one[0], min(k, one[0].shape[-1]))
    mass = teacher.log_probs.exp().sum(-1) + teacher.log_tail.exp()

    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_a_tail_too_small_to_be_subtracted_is_kept():
    teacher = TopK.of(torch.tensor([[0.0, -40.0, -41.0]]), 1)

    assert float(teacher.log_tail) == pytest.approx(-40 + math.log1p(math.exp(-1)), abs=1e-5)


def test_a_teacher_of_fewer_tokens_may_be_its_top_k():
    z, t = draw(4, 9, dtype=torch.float64), draw(4, 6, seed=1, dtype=torch.float64)

    torch.testing.assert_close(
        gradient(lambda z: forward_kl(z, t), z), gradient(lambda z: forward_kl(z, TopK.of(t, 6)), z)
    )
