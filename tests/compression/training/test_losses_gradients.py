"""Values and gradients of the losses of distillation: those of the textbook, in chunks and in low precision too."""

import pytest
import torch
from textbook_losses import DISTILLED, KD, NAMES, batch, draw, each_divergence, gradient, textbook
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compression.numeric.losses import IGNORED
from compression.numeric.losses_in_chunks import Projected, TopK
from compression.training.objective import distillation
from compression.training.settings import Objective


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
