"""The loss of a training step: labels and a teacher, weighted as an `Objective` says."""

from functools import partial

from torch import Tensor

from compression.numeric.losses import DIVERGENCES, Losses, weighted_mean
from compression.numeric.losses_in_chunks import Projected, TopK
from compression.training.settings import Objective


def distillation(
    student: Tensor | Projected,
    teacher: Tensor | Projected | TopK | None,
    labels: Tensor,
    objective: Objective,
    *,
    items: int | Tensor | None = None,
    chunk: int | None = None,
) -> Losses:
    """The objective's mean over the positions whose label is not `IGNORED`, labels and teacher over the same ones.

    Args:
        student: logits (..., V) or hidden states and head; gradients reach these.
        teacher: the same, or its top k; may be None if alpha is 0. Never gets a gradient. Where the vocabularies differ
            in size, the divergence is over the tokens below the smaller, both renormalised ([O], section 2.1.1).
        labels: int64 (...), the token that each position should give: `next_tokens`.
        items: what the sum is divided by; default the number of positions that count.
        chunk: tokens at a time.

    Raises:
        TeacherError: there is no teacher, or its shape is not that of the student.
        ValueError: labels do not fit, or no position counts and `items` is not given.
    """
    alpha, temperature = objective.alpha, objective.temperature
    compare = DIVERGENCES[objective.divergence]
    if objective.divergence == "jensen_shannon":
        compare = partial(compare, beta=objective.beta)
    weights = (1 - alpha, alpha * temperature**2)
    return weighted_mean(student, teacher, labels, None, weights, compare, temperature, items, chunk)
