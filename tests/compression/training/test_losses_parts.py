"""Labels, the parts of a loss and of a batch, and hidden states."""

import math

import pytest
import torch
from textbook_losses import KD, batch, draw, gradient
from torch.nn import functional

from compression.numeric.losses import IGNORED, cross_entropy, hidden_states, next_tokens
from compression.numeric.losses_in_chunks import Projected
from compression.training.objective import distillation
from compression.training.settings import Objective


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
