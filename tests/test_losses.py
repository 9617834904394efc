"""Losses of distillation: against the form of the textbook and by their laws, which broken ones break."""

import itertools
import math
import typing
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compression._errors import RecipeError, TeacherError
from compression.distillation import _losses, _settings
from compression.distillation._chunks import Projected, TopK
from compression.distillation._losses import (
    IGNORED,
    cross_entropy,
    distillation,
    forward_kl,
    hidden_states,
    jensen_shannon,
    next_tokens,
    reverse_kl,
)
from compression.distillation._settings import Objective

KD, DISTILLED = Objective(alpha=0.3, temperature=4.0), Objective(alpha=0.5, temperature=2.0)  # of [O], of [E]
DIVERGENCES = (forward_kl, reverse_kl, partial(jensen_shannon, beta=0.5), partial(jensen_shannon, beta=0.1))
NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "jensen_shannon-0.1")
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def gradient(loss, of):
    """Value and gradient of loss(of)."""
    of = of.detach().clone().requires_grad_()
    value = loss(of)
    (found,) = torch.autograd.grad(value, of)
    return value.detach(), found


# --- The textbook: whole tensors, autograd --------------------------------------------------------------------------


def textbook_divergence(name, z, t, temperature):
    log_q, log_p = (functional.log_softmax(each / temperature, -1) for each in (z, t))
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    beta = 0.1 if name.endswith("0.1") else 0.5
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def textbook(z, t, labels, objective, name="forward_kl"):
    """The objective by whole tensors, over the positions that have a label."""
    counts = labels != IGNORED
    z, t, labels = z[counts], t[counts], labels[counts]
    shared = min(z.shape[-1], t.shape[-1])
    divergence = textbook_divergence(name, z[:, :shared], t[:, :shared], objective.temperature).mean()
    task = functional.cross_entropy(z, labels)
    return (1 - objective.alpha) * task + objective.alpha * objective.temperature**2 * divergence


def batch(tokens=70, vocabulary=97, width=24, *, seed=0, dtype=torch.float32, padding=5):
    """Hidden states and heads of a student and a teacher, and labels of which some do not count."""
    hidden, theirs = draw(tokens, width, seed=seed, dtype=dtype), draw(tokens, 2 * width, seed=seed + 1, dtype=dtype)
    head = draw(vocabulary, width, seed=seed + 2, scale=0.4, dtype=dtype)
    their_head = draw(vocabulary, 2 * width, seed=seed + 3, scale=0.3, dtype=dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels[::padding] = IGNORED
    return hidden, head, theirs, their_head, labels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", [KD, DISTILLED], ids=["kd", "distilled"])
def test_loss_and_gradients_are_those_of_whole_tensors(name, objective):
    hidden, head, theirs, their_head, labels = batch()
    objective = Objective(
        alpha=objective.alpha, temperature=objective.temperature, divergence=name.removesuffix("-0.1"),
        beta=0.1 if name.endswith("0.1") else 0.5,
    )  # fmt: skip
    bias = draw(97, seed=9)
    inputs = [each.clone().requires_grad_() for each in (hidden, head, bias)]
    want = textbook(functional.linear(*inputs), theirs @ their_head.T, labels, objective, name)
    want_gradients = torch.autograd.grad(want, inputs)

    found = distillation(Projected(*inputs), Projected(theirs, their_head), labels, objective, chunk=16)
    found_gradients = torch.autograd.grad(found.total, inputs)

    torch.testing.assert_close(want, found.total, rtol=1e-5, atol=0)
    for one, other in zip(want_gradients, found_gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_the_comparison_with_whole_tensors_sees_an_error_of_one_part_in_ten_thousand():
    hidden, head, theirs, their_head, labels = batch()
    wrong = Objective(alpha=KD.alpha * 1.0001, temperature=KD.temperature)
    want = gradient(lambda h: textbook(h @ head.T, theirs @ their_head.T, labels, KD), hidden)[1]
    found = gradient(lambda h: distillation(Projected(h, head), theirs @ their_head.T, labels, wrong).total, hidden)[1]

    assert (want - found).abs().max() > 1e-5 * want.abs().max()


@pytest.mark.parametrize("chunk", [1, 7, 70, 1000, None])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    hidden, head, theirs, their_head, labels = batch(dtype=torch.float64)
    teacher = theirs @ their_head.T
    whole = gradient(lambda h: distillation(Projected(h, head), teacher, labels, KD, chunk=70).total, hidden)
    parts = gradient(lambda h: distillation(Projected(h, head), teacher, labels, KD, chunk=chunk).total, hidden)

    torch.testing.assert_close(whole, parts)


def test_logits_and_hidden_states_with_their_head_give_the_same():
    hidden, head, theirs, their_head, labels = batch(dtype=torch.float64)
    projected = gradient(
        lambda h: distillation(Projected(h, head), Projected(theirs, their_head), labels, KD).total, hidden
    )
    given_logits = gradient(lambda h: distillation(h @ head.T, theirs @ their_head.T, labels, KD).total, hidden)

    torch.testing.assert_close(projected, given_logits)


def test_leading_dimensions_are_positions():
    hidden, head, theirs, their_head, labels = batch()
    flat = distillation(Projected(hidden, head), theirs @ their_head.T, labels, KD)
    of_texts = distillation(
        Projected(hidden.view(2, 35, -1), head), (theirs @ their_head.T).view(2, 35, -1), labels.view(2, 35), KD
    )

    assert flat == of_texts


@pytest.mark.parametrize("sizes", [(97, 61), (61, 97)], ids=["larger student", "larger teacher"])
def test_vocabularies_are_cut_to_the_smaller_for_the_divergence_alone(sizes):
    ours, theirs = sizes
    z, t = draw(8, ours, dtype=torch.float64), draw(8, theirs, seed=1, dtype=torch.float64)
    labels = torch.arange(8) + ours - 8  # the student's last tokens are labels too

    want = gradient(lambda z: textbook(z, t, labels, KD), z)
    torch.testing.assert_close(want, gradient(lambda z: distillation(z, t, labels, KD).total, z))


@each_divergence
@pytest.mark.parametrize("k", [None, 1, 3, 6], ids=lambda k: f"top-{k or 'all'}")
def test_gradients_of_logits_pass_gradcheck(divergence, k):
    z, t = draw(4, 6, dtype=torch.float64, scale=2), draw(4, 6, seed=1, dtype=torch.float64, scale=2)
    teacher, mask = (t if k is None else TopK.of(t, k)), torch.tensor([1, 1, 0, 1])

    assert torch.autograd.gradcheck(
        lambda z: divergence(z, teacher, mask, temperature=1.7, chunk=2), z.requires_grad_()
    )


def test_gradients_of_hidden_states_head_and_bias_pass_gradcheck():
    hidden, head, bias = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (6, 3), (6,)))
    teacher, labels = draw(4, 6, seed=1, dtype=torch.float64), torch.tensor([2, IGNORED, 5, 0])

    def loss(*student):
        return distillation(Projected(*student), teacher, labels, KD, chunk=2).total

    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, head, theirs, their_head, labels = batch()
    hidden.requires_grad_(), head.requires_grad_()
    loss = distillation(Projected(hidden, head), theirs @ their_head.T, labels, KD).total * 3
    first = [each.clone() for each in torch.autograd.grad(loss, (hidden, head), retain_graph=True)]
    second = torch.autograd.grad(loss, (hidden, head))

    torch.testing.assert_close(first, list(second), rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation returned, of those above some size the names."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return found


def largest(loss):
    with Largest() as seen:
        loss().backward()
    return seen.numbers


@pytest.mark.parametrize("k", [None, 5], ids=["teacher's logits", "top 5"])
def test_no_tensor_of_a_batch_by_the_vocabulary_is_made_forward_or_backward(k):
    hidden, head, theirs, their_head, labels = batch(tokens=320, vocabulary=512)
    hidden.requires_grad_(), head.requires_grad_()
    logits = theirs @ their_head.T
    teacher = Projected(theirs, their_head) if k is None else TopK.of(logits, k)
    most = max(their_head.numel(), 40 * 512)  # the teacher's head is not made, but handed on

    assert most >= largest(lambda: distillation(Projected(hidden, head), teacher, labels, KD, chunk=40).total)
    assert 320 * 512 <= largest(lambda: textbook(hidden @ head.T, logits, labels, KD))


def test_a_loss_without_gradients_has_none():
    hidden, head, theirs, their_head, labels = batch()
    head.requires_grad_()
    with torch.no_grad():
        found = distillation(Projected(hidden, head), theirs @ their_head.T, labels, KD)
    assert not found.total.requires_grad

    found = distillation(Projected(hidden, head), Projected(theirs.requires_grad_(), their_head), labels, KD)
    found.total.backward()
    assert (head.grad is not None, theirs.grad, found.task.requires_grad) == (True, None, False)


# --- Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_low_precision_are_as_near_as_their_dtype_allows(dtype):
    hidden, head, theirs, their_head, labels = batch(dtype=dtype)
    inputs = [each.requires_grad_() for each in (hidden, head)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    want = textbook(exact[0] @ exact[1].T, theirs.double() @ their_head.double().T, labels, KD)
    found = distillation(Projected(*inputs), Projected(theirs, their_head), labels, KD, chunk=8).total
    both = zip(torch.autograd.grad(want, exact), torch.autograd.grad(found, inputs), strict=True)

    for one, other in both:
        assert other.dtype == dtype
        assert (one - other).norm() <= 4 * torch.finfo(dtype).eps * one.norm()


def test_scaling_the_loss_saves_gradients_that_fp16_could_not_hold():
    hidden, head, theirs, their_head, labels = batch(dtype=torch.float16)
    items, scale = 10**9, 2.0**20

    def of(factor):
        return gradient(
            lambda h: factor * distillation(Projected(h, head), Projected(theirs, their_head), labels, KD, items=items)
            .total, hidden,
        )[1]  # fmt: skip

    assert 0 == of(1).count_nonzero()  # too small for fp16
    plain = gradient(
        lambda h: distillation(Projected(h, head), Projected(theirs, their_head), labels, KD, items=1).total, hidden
    )[1]
    want = plain.float() * scale / items
    assert (want - of(scale).float()).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("given_as", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_head_multiplies_in_its_dtype(given_as):
    hidden, head, theirs, their_head, labels = batch()
    inputs = [hidden.to(given_as).requires_grad_(), head.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation(Projected(*inputs), Projected(theirs, their_head), labels, KD).total
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    low = [hidden.detach().bfloat16().requires_grad_(), head.detach().bfloat16().requires_grad_()]
    want = torch.autograd.grad(distillation(Projected(*low), Projected(theirs, their_head), labels, KD).total, low)

    assert [given_as, torch.float32] == [gradient.dtype for gradient in found]
    torch.testing.assert_close([each.float() for each in want], [each.float() for each in found], rtol=0.01, atol=1e-6)
    torch.testing.assert_close(found, again, rtol=0, atol=0)


# --- Laws, each with losses that break it ----------------------------------------------------------------------------


@st.composite
def logits(draws, count=2):
    """Some (n, V) logits, one scale: from almost even to almost certain distributions; fp64."""
    tokens, vocabulary = draws(st.integers(1, 4)), draws(st.integers(2, 40))
    scale, seed = draws(st.sampled_from((0.01, 1.0, 10.0, 60.0))), draws(st.integers(0, 2**20))
    return [draw(tokens, vocabulary, seed=seed + i, scale=scale, dtype=torch.float64) for i in range(count)]


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


# --- Top k ----------------------------------------------------------------------------------------------------------


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


# --- Labels, hidden states, parts -----------------------------------------------------------------------------------


def test_a_label_is_the_token_behind_and_none_is_asked_of_or_at_padding():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])

    assert [[6, 7, -100, -100, -100], [-100, -100, 6, 7, -100]] == next_tokens(ids, mask).tolist()
    assert [[6, 7, 0, 0, -100], [0, 5, 6, 7, -100]] == next_tokens(ids).tolist()


def test_cross_entropy_is_that_of_torch():
    z, labels = draw(9, 13, scale=4, dtype=torch.float64), torch.tensor([3, IGNORED, 1, 12, 0, IGNORED, 4, 4, 9])

    torch.testing.assert_close(
        gradient(lambda z: functional.cross_entropy(z, labels), z), gradient(lambda z: cross_entropy(z, labels), z)
    )


def test_the_parts_add_up_to_the_total_and_one_of_weight_0_is_not_made():
    z, t, labels = draw(6, 9), draw(6, 9, seed=1), torch.arange(6)
    found = distillation(z, t, labels, KD)

    assert float(found.total) == pytest.approx(0.7 * float(found.task) + 0.3 * 16 * float(found.divergence), rel=1e-5)
    assert None is distillation(z, None, labels, Objective(alpha=0, temperature=1)).divergence
    assert None is distillation(z, t, labels, Objective(alpha=1, temperature=1)).task


def test_accumulated_parts_of_a_batch_are_the_batch():
    hidden, head, theirs, their_head, labels = batch(dtype=torch.float64)
    teacher, items = theirs @ their_head.T, int((labels != IGNORED).sum())
    parts = sum(
        distillation(Projected(hidden[some], head), teacher[some], labels[some], KD, items=torch.tensor(items)).total
        for some in (slice(10), slice(10, 11), slice(11, None))  # the second has nothing that counts
    )

    torch.testing.assert_close(distillation(Projected(hidden, head), teacher, labels, KD).total, parts)


@pytest.mark.parametrize(("norm", "of_torch"), [("l1", functional.l1_loss), ("l2", functional.mse_loss)])
def test_hidden_states_are_compared_through_the_projection_where_they_count(norm, of_torch):
    student, teacher, projection = draw(2, 5, 8), draw(2, 5, 12, seed=1), draw(12, 8, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    counts = mask.bool()
    want = gradient(lambda s: of_torch(s[counts] @ projection.T, teacher[counts]), student)
    student[~counts], teacher[~counts] = math.nan, math.nan
    found = gradient(lambda s: hidden_states(s, teacher, mask, projection=projection, norm=norm), student)

    torch.testing.assert_close(want, found)


def test_hidden_states_and_projection_pass_gradcheck():
    student, projection = draw(3, 4, dtype=torch.float64), draw(5, 4, seed=2, dtype=torch.float64)
    teacher = draw(3, 5, seed=1, dtype=torch.float64)

    assert torch.autograd.gradcheck(
        lambda s, w: hidden_states(s, teacher, projection=w),
        (student.requires_grad_(), projection.requires_grad_()),
    )


# --- What cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, "alpha=1.5: allowed are 0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"divergence": "kl"}, "divergence='kl': allowed are forward_kl, reverse_kl, jensen_shannon"),
        ({"beta": 1.0}, "beta=1.0: allowed is what lies between 0 and 1"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        Objective(**{"alpha": 0.3, "temperature": 4.0} | settings)


Z, T = torch.zeros(3, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: distillation(Z, None, torch.arange(3), KD), TeacherError, "there is no teacher"),
        (lambda: forward_kl(Z, T[:2]), TeacherError, r"the teacher has positions \(2,\), the student \(3,\)"),
        (
            lambda: forward_kl(Z, TopK.of(torch.zeros(3, 9), 2)),
            TeacherError,
            "top k are of 9 tokens, the student has 5",
        ),
        (lambda: TopK.of(T, 6), TeacherError, "k=6 .* 1 to its vocabulary of 5"),
        (lambda: forward_kl(Z, TopK(T[:, :2], T[:, :3], T[:, 0], 5)), TeacherError, "cannot be"),
        (lambda: forward_kl(Z, T, torch.ones(4)), ValueError, r"mask \(4,\) do not fit positions \(3,\)"),
        (lambda: forward_kl(Z, T, torch.zeros(3)), ValueError, "no position counts"),
        (lambda: forward_kl(Z, T, temperature=-1), RecipeError, "temperature=-1"),
        (lambda: jensen_shannon(Z, T, beta=0), RecipeError, "beta=0"),
        (lambda: cross_entropy(Z, torch.tensor([0, 5, 1])), ValueError, "labels hold 0 to 5; allowed are 0 to 4"),
        (lambda: cross_entropy(Z, torch.tensor([0, -1, 1])), ValueError, "labels hold -1 to 1"),
        (lambda: hidden_states(Z, T[:, :4]), TeacherError, "give a projection"),
        (lambda: hidden_states(Z, T, norm="l3"), RecipeError, "norm='l3': allowed are l1, l2"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_every_divergence_of_an_objective_is_known():
    assert set(typing.get_args(_settings.Divergence)) == set(_losses._DIVERGENCES)
