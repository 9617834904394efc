"""Losses of distillation: what a student pays for missing the labels, and for differing from its teacher.

Letters: n tokens (leading dimensions of what is given are flattened), d hidden size, V vocabulary, T temperature; z and
t (n, V) logits of student and teacher; q = softmax(z / T), p = softmax(t / T). Divergences are summed over the
vocabulary and averaged over the tokens that count: nat per token.

    cross_entropy     -log softmax(z)[label]                              the task
    forward_kl        sum p (log p - log q)                               Hinton et al., arXiv 1503.02531; [B] 4.2
    reverse_kl        sum q (log q - log p)                               MiniLLM, arXiv 2306.08543
    jensen_shannon    b sum p (log p - log m) + (1 - b) sum q (log q - log m),
                      m = b p + (1 - b) q                                 GKD, arXiv 2306.13649
    hidden_states     mean |S W^T - H| or (S W^T - H)^2                   [B] 4.3; TinyBERT, arXiv 1909.10351
    distillation      (1 - alpha) cross_entropy + alpha T^2 divergence    `Objective`: [O] equation 1, [E] 3.3.3

Logits are given as they are, or as `Projected`: hidden states and the head that makes them, so that no logits of a
batch exist. Either way a few dozen tokens are taken at a time, and their gradient is computed with their loss (each is
a sum over tokens, whose gradient is known in closed form); nothing of the size (n, V) is kept but the gradient of
logits that were given, in their own dtype. Arithmetic is fp32 (fp64 for fp64); products with a
student's head are in the dtype of its hidden states, or in that of autocast where it is on.

A teacher may also be `TopK`: its k most likely tokens and the mass of all others. The divergence is then that of k + 1
classes, the tail as one; with k = V it is the whole one.

Departures: the tail of a `TopK` is softened as one class, p_tail^(1/T) before normalising, for student and teacher
alike, since its tokens are not known; at T = 1 that is the divergence of the lumped distributions, a lower bound of the
whole one. Of hidden states the mean over features is taken, not the norm of [B], so that widths compare. Labels and
teacher count at the same positions, so the last of a text, which has no label, is not distilled; [E] does not shift the
labels, and divides by the number of texts.
Limits: logits of tokens that count must be finite. Derivatives are of the first order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from compression.errors import RecipeError, TeacherError
from compression.numeric.bounds import check_beta, check_temperature
from compression.numeric.losses_in_chunks import CHUNK, LEAST_TOKENS, Projected, Summed, TopK, against, exact_of

IGNORED = -100  # the label of a position that does not count


class Losses(NamedTuple):
    """The loss to minimise, and its two parts, without weights and gradients; None for a part of weight 0."""

    total: Tensor
    task: Tensor | None
    divergence: Tensor | None


def next_tokens(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Labels (batch, time) of token ids (batch, time): of each position the token behind it.

    The last position, and any that is padding (mask 0) or comes before padding, is `IGNORED`.

    >>> next_tokens(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])).tolist()
    [[6, 7, -100, -100]]
    """
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    if mask is not None:
        labels[:, :-1].masked_fill_(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORED)
    return labels


def cross_entropy(
    student: Tensor | Projected, labels: Tensor, *, items: int | Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Mean of -log softmax(z)[label] over the positions whose label is not `IGNORED`; arguments: `distillation`.

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([1, IGNORED]))
    tensor(0.6931)
    """
    return weighted_mean(student, None, labels, None, (1.0, 0.0), None, 1.0, items, chunk).total


def forward_kl(
    student: Tensor | Projected,
    teacher: Tensor | Projected | TopK,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    items: int | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(p || q), the mean over tokens with mask (...) not 0; not multiplied by T^2. Arguments: `distillation`.

    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> forward_kl(q.log(), p.log())  # 0.5 log 2 + 0.5 log (2 / 3)
    tensor(0.1438)
    """
    return _divergence(student, teacher, mask, _forward_kl, temperature, items, chunk)


def reverse_kl(
    student: Tensor | Projected,
    teacher: Tensor | Projected | TopK,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    items: int | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(q || p), otherwise as `forward_kl`.

    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    >>> reverse_kl(q.log(), p.log())  # 0.25 log (1 / 2) + 0.75 log (3 / 2)
    tensor(0.1308)
    """
    return _divergence(student, teacher, mask, _reverse_kl, temperature, items, chunk)


def jensen_shannon(
    student: Tensor | Projected,
    teacher: Tensor | Projected | TopK,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    items: int | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The generalised Jensen-Shannon divergence, otherwise as `forward_kl`; at most log 2.

    Divided by beta it tends to KL(p || q) as beta goes to 0, divided by 1 - beta to KL(q || p) as beta goes to 1.

    >>> jensen_shannon(torch.tensor([[-99.0, 99.0]]), torch.tensor([[99.0, -99.0]]))  # nothing in common: log 2
    tensor(0.6931)
    """
    check_beta(beta)
    return _divergence(student, teacher, mask, partial(_jensen_shannon, beta=beta), temperature, items, chunk)


def hidden_states(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    norm: Literal["l1", "l2"] = "l2",
    items: int | Tensor | None = None,
) -> Tensor:
    """Mean over tokens and features of |S W^T - H| (l1) or its square (l2), in the units of H or their square.

    Args:
        student: S (..., d), gets a gradient.
        teacher: H (..., e), gets none.
        mask: (...), tokens that count; default all.
        projection: W (e, d), trained with the student; may be left out where d = e.
        items: tokens that the sum is divided by; default those that count.

    Raises:
        TeacherError: shapes do not fit.
        RecipeError: there is no such norm.
        ValueError: no token counts and `items` is not given.

    >>> hidden_states(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]), norm="l1")
    tensor(1.5000)
    """
    if norm not in ("l1", "l2"):
        raise RecipeError(f"norm={norm!r}: allowed are l1, l2")
    width = student.shape[-1] if projection is None else projection.shape[0]
    if student.shape[:-1] != teacher.shape[:-1] or width != teacher.shape[-1]:
        way = "" if projection is not None else "; give a projection (width of the teacher, width of the student)"
        raise TeacherError(f"hidden states {tuple(student.shape)} of the student do not fit {tuple(teacher.shape)} of "
                           f"the teacher{way}")  # fmt: skip
    rows = _counted(mask, student.shape[:-1], student.device)
    ours, theirs = student.flatten(0, -2)[rows], teacher.detach().flatten(0, -2)[rows]
    if projection is not None:
        ours = functional.linear(ours, projection)
    exact = exact_of(ours)
    difference = ours.to(exact) - theirs.to(exact)
    values = difference.abs() if norm == "l1" else difference.square()
    return values.mean(-1).sum() / _items(items, rows)


# --- Divergences of a few tokens: log q and log p (c, V) -> of each its value, and its gradient by z / T --------------


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """sum p (log p - log q); by z / T: q - p."""
    p = log_p.exp()
    return (log_p - log_q).mul_(p).sum(-1), log_q.exp().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """sum q (log q - log p); by z / T: q (log q - log p - value)."""
    q, difference = log_q.exp(), log_q - log_p
    value = (q * difference).sum(-1, keepdim=True)
    return value.squeeze(-1), difference.sub_(value).mul_(q)


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m); by z / T: (1 - b) q (s - sum q s) with s = log q - log m."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    q, s = log_q.exp(), log_q - log_m
    of_student = (q * s).sum(-1, keepdim=True)
    of_teacher = (log_p - log_m).mul_(log_p.exp()).sum(-1)
    value = beta * of_teacher + (1 - beta) * of_student.squeeze(-1)
    return value, s.sub_(of_student).mul_(q).mul_(1 - beta)


DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}


# --- Chunks -----------------------------------------------------------------------------------------------------------


def _divergence(
    student: Any, teacher: Any, mask: Any, compare: Any, temperature: float, items: Any, chunk: int | None
) -> Tensor:
    check_temperature(temperature)
    return weighted_mean(student, teacher, None, mask, (0.0, 1.0), compare, temperature, items, chunk).total


def weighted_mean(
    student: Tensor | Projected,
    teacher: Tensor | Projected | TopK | None,
    labels: Tensor | None,
    mask: Tensor | None,
    weights: tuple[float, float],
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    temperature: float,
    items: int | Tensor | None,
    chunk: int | None,
) -> Losses:
    """Both parts by their weights, over the positions that labels or mask let count; one of weight 0 is not made."""
    task, divergence = weights
    given = student if isinstance(student, Projected) else Projected(student, None)  # type: ignore[arg-type]
    leading = given.hidden.shape[:-1]
    vocabulary = given.hidden.shape[-1] if given.weight is None else given.weight.shape[0]
    if labels is not None:
        mask = labels != IGNORED
    rows = _counted(mask, leading, given.hidden.device)
    if task:
        labels = labels.reshape(-1)  # type: ignore[union-attr]
        _check_labels(labels[rows], vocabulary)
    shared = vocabulary
    if divergence:
        shared = min(vocabulary, _check_teacher(teacher, leading, vocabulary))

    def evaluate(z: Tensor, some: Tensor) -> tuple[list[Tensor], Tensor]:
        """Sums of the two parts over some rows, z (c, V) their logits; the gradient of both by z."""
        values, gradient = [z.new_zeros(()), z.new_zeros(())], None
        if task:
            target = labels[some, None]  # type: ignore[index]
            gradient = torch.log_softmax(z, -1)
            values[0] = -gradient.gather(1, target).sum()
            gradient.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=z.dtype)).mul_(task)
        if divergence:
            found, by_z = against(z[:, :shared], teacher, some, compare, temperature)
            values[1] = found.sum()
            by_z.mul_(divergence / temperature)
            if gradient is None and shared == vocabulary:
                gradient = by_z
            else:
                gradient = torch.zeros_like(z) if gradient is None else gradient
                gradient[:, :shared] += by_z
        return values, gradient  # type: ignore[return-value]

    step = chunk or max(LEAST_TOKENS, CHUNK // vocabulary)
    hidden = given.hidden.reshape(-1, given.hidden.shape[-1])
    divisor = _items(items, rows)
    total, *parts = Summed.apply(hidden, given.weight, given.bias, rows, evaluate, step, weights)
    of_task, of_divergence = (part / divisor if weight else None for part, weight in zip(parts, weights, strict=True))
    return Losses(total / divisor, of_task, of_divergence)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _counted(mask: Tensor | None, leading: torch.Size, device: torch.device) -> Tensor:
    """Which of the flattened positions count, int64 (m,)."""
    if mask is None:
        return torch.arange(math.prod(leading), device=device)
    if mask.shape != leading:
        raise ValueError(f"labels or mask {tuple(mask.shape)} do not fit positions {tuple(leading)} of the student")
    return mask.reshape(-1).to(device).nonzero().squeeze(-1)


def _items(items: int | Tensor | None, rows: Tensor) -> int | Tensor:
    if items is None and not len(rows):
        raise ValueError("no position counts: every label is ignored or masked; give items to let the loss be 0")
    return len(rows) if items is None else items


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(
            f"labels hold {int(labels.min())} to {int(labels.max())}; allowed are 0 to {vocabulary - 1}, the student's "
            f"vocabulary, and {IGNORED} for positions that do not count"
        )


def _check_teacher(teacher: Any, leading: torch.Size, vocabulary: int) -> int:
    """The vocabulary of a teacher, once it fits."""
    if teacher is None:
        raise TeacherError("there is no teacher; give its logits, or alpha=0 to train on the labels alone")
    if isinstance(teacher, TopK):
        positions, found = teacher.ids.shape[:-1], teacher.vocabulary
        if found > vocabulary:
            raise TeacherError(f"the teacher's top k are of {found} tokens, the student has {vocabulary}; take the top "
                               "k of the shared ones")  # fmt: skip
        k = teacher.ids.shape[-1]
        if teacher.log_probs.shape != teacher.ids.shape or teacher.log_tail.shape != positions or not 1 <= k <= found:
            raise TeacherError(f"a teacher's top k of ids {tuple(teacher.ids.shape)}, log_probs "
                               f"{tuple(teacher.log_probs.shape)}, log_tail {tuple(teacher.log_tail.shape)} and a "
                               f"vocabulary of {found} cannot be")  # fmt: skip
    elif isinstance(teacher, Projected):
        positions, found = teacher.hidden.shape[:-1], teacher.weight.shape[0]
    else:
        positions, found = teacher.shape[:-1], teacher.shape[-1]
    if positions != leading:
        raise TeacherError(f"the teacher has positions {tuple(positions)}, the student {tuple(leading)}; both "
                           "must have read the same tokens")  # fmt: skip
    return found
