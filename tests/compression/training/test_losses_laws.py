"""Laws of the losses of distillation, each with losses that break it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from textbook_losses import draw, each_divergence, gradient, logits, textbook_divergence
from torch.nn import functional

from compression.numeric.losses import cross_entropy, forward_kl, jensen_shannon, reverse_kl
from compression.numeric.losses_in_chunks import TopK
from compression.training.objective import distillation
from compression.training.settings import Objective

EXAMPLE = [draw(3, 7, seed=seed, scale=3, dtype=torch.float64) for seed in (1, 2)]


def assert_law_of_signs(divergence, z, t):
    """At least 0, and 0 with a gradient of 0 where both are equal."""
    assert float(divergence(z, t)) >= -1e-12
    value, by_z = gradient(lambda z: divergence(z, t), t)
    assert abs(float(value)) <= 1e-12
    assert float(by_z.abs().max()) <= 1e-12


def assert_law_of_shifts(divergence, z, t):
    """What is added to all logits of a token changes neither value nor gradient."""
    shift = torch.linspace(-30, 50, len(z), dtype=z.dtype)[:, None]
    torch.testing.assert_close(
        gradient(lambda z: divergence(z, t), z),
        gradient(lambda z: divergence(z, t - 2 * shift), z + shift), rtol=1e-9, atol=1e-9,
    )  # fmt: skip


def assert_law_of_masks(divergence, z, t):
    """Masked positions change nothing, also where they hold NaN, and get a gradient of 0."""
    holes = torch.full_like(z[:1], math.nan)
    mask = torch.tensor([False] + [True] * len(z) + [False])
    value, by_z = gradient(lambda z: divergence(z, t), z)
    wide, by_wide = gradient(lambda z: divergence(z, torch.cat([holes, t, holes]), mask), torch.cat([holes, z, holes]))
    assert value == wide
    assert torch.equal(by_wide, torch.cat([0 * by_z[:1], by_z, 0 * by_z[:1]]))


def assert_law_of_temperature(loss, z, t):
    """The gradient neither vanishes nor grows with T: it tends to (z - t) / V, both less their mean, as 1 / T."""
    z, t = z / z.abs().max(), t / t.abs().max()  # then the next term of the series is at most 2 / T of the size
    limit = ((z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))) / z.shape[-1] / len(z)
    for temperature in (64.0, 1024.0):
        found = gradient(lambda z, at=temperature: loss(z, t, at), z)[1]
        assert float((found - limit).abs().max()) <= 4 / temperature / z.shape[-1] / len(z)


def assert_law_of_alpha(loss, z, t):
    """alpha 0 is training on labels alone, to the last bit; with alpha 1 it makes no difference what they say."""
    labels = torch.arange(len(z)) % z.shape[-1]
    plain = gradient(lambda z: cross_entropy(z, labels), z)
    alone = gradient(lambda z: loss(z, t, labels, Objective(alpha=0, temperature=3)), z)
    assert plain[0] == alone[0]
    assert torch.equal(plain[1], alone[1])

    pure = gradient(lambda z: 9 * forward_kl(z, t, temperature=3), z)
    ours = gradient(lambda z: loss(z, t, labels, Objective(alpha=1, temperature=3)), z)
    torch.testing.assert_close(pure, ours, rtol=1e-12, atol=1e-12)
    assert ours[0] == loss(z, t, (labels + 1) % z.shape[-1], Objective(alpha=1, temperature=3))


def combined(z, t, labels, objective):
    return distillation(z, t, labels, objective).total


def pure(divergence="forward_kl"):
    """T^2 times a divergence, as the papers train."""

    def loss(z, t, temperature):
        labels = torch.zeros(len(z), dtype=torch.int64)
        return combined(z, t, labels, Objective(alpha=1, temperature=temperature, divergence=divergence))

    return loss


@each_divergence
@given(logits())
def test_divergences_are_not_negative_and_0_for_equal_logits(divergence, pair):
    assert_law_of_signs(divergence, *pair)


@each_divergence
@given(logits())
def test_divergences_do_not_see_what_is_added_to_all_logits(divergence, pair):
    assert_law_of_shifts(divergence, *pair)


@each_divergence
@given(logits())
def test_masked_positions_change_nothing_even_if_they_hold_nan(divergence, pair):
    assert_law_of_masks(divergence, *pair)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@given(logits())
def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient(divergence, pair):
    assert_law_of_temperature(pure(divergence), *pair)


@given(logits())
def test_alpha_goes_from_plain_training_to_pure_distillation(pair):
    assert_law_of_alpha(combined, *pair)


@given(logits(), st.sampled_from((1, 2, 5)))
def test_the_laws_hold_for_the_top_k_too(pair, k):
    def lumped(z, t, mask=None):
        return forward_kl(z, TopK.of(t, min(k, t.shape[-1])), mask, temperature=2)

    assert_law_of_signs(lumped, *pair)
    assert_law_of_shifts(lumped, *pair)
    assert_law_of_masks(lumped, *pair)


def soft_labels(z, t, mask=None):
    """The cross-entropy with the teacher, entropy not taken off."""
    return -(functional.softmax(t, -1) * functional.log_softmax(z, -1)).sum(-1).mean()


def raw_logits(z, t, mask=None):
    """The student's logits not normalised."""
    p = functional.softmax(t, -1)
    return (p * (p.log() - z)).sum(-1).mean()


def upside_down(z, t, mask=None):
    return -forward_kl(z, t, mask)


def over_all_positions(z, t, mask=None):
    """Masked positions are multiplied by 0 and stay in the mean."""
    values = textbook_divergence("forward_kl", z, t, 1)
    return (values if mask is None else values * mask).mean()


def times_the_mask(z, t, mask=None):
    """As many do it: the sum of values times the mask by the sum of the mask; NaN times 0 is NaN."""
    values = textbook_divergence("forward_kl", z, t, 1)
    return values.mean() if mask is None else (values * mask).sum() / mask.sum()


def without_the_square(z, t, temperature):
    return forward_kl(z, t, temperature=temperature)


def with_the_fourth_power(z, t, temperature):
    return temperature**4 * forward_kl(z, t, temperature=temperature)


def alpha_on_the_other_side(z, t, labels, objective):
    return combined(z, t, labels, Objective(alpha=1 - objective.alpha, temperature=objective.temperature))


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        (assert_law_of_signs, soft_labels),
        (assert_law_of_signs, raw_logits),
        (assert_law_of_signs, upside_down),
        (assert_law_of_shifts, raw_logits),
        (assert_law_of_masks, over_all_positions),
        (assert_law_of_masks, times_the_mask),
        (assert_law_of_temperature, without_the_square),
        (assert_law_of_temperature, with_the_fourth_power),
        (assert_law_of_alpha, alpha_on_the_other_side),
    ],
    ids=lambda each: each.__name__,
)
def test_a_loss_that_is_wrong_breaks_the_law(law, broken):
    with pytest.raises(AssertionError):
        law(broken, *EXAMPLE)


@given(logits())
def test_jensen_shannon_lies_below_the_entropy_of_its_mixture_and_tends_to_both_kls(pair):
    z, t = pair
    assert float(jensen_shannon(z, t, beta=0.3)) <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7) + 1e-12

    z, t = z / z.abs().max(), t / t.abs().max()
    beta = 1e-7
    torch.testing.assert_close(jensen_shannon(z, t, beta=beta) / beta, forward_kl(z, t), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(jensen_shannon(z, t, beta=1 - beta) / beta, reverse_kl(z, t), rtol=1e-5, atol=1e-8)
