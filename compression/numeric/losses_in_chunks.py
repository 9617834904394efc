"""Sums over tokens of a loss of logits, a few dozen tokens at a time, with their gradient: `Summed`.

Whatever the loss, nothing of the size (tokens, vocabulary) is kept but the gradient of logits that were given as they
are. Logits are given so, or as `Projected`; those of a teacher also as their `TopK`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compression.errors import TeacherError

CHUNK = 2**21  # logits that are held at a time: 8 MiB in fp32, of which there are up to seven copies
LEAST_TOKENS = 32  # at a time, however large the vocabulary: each chunk reads the whole head


@dataclass(frozen=True)
class Projected:
    """Logits hidden @ weight.T + bias that are never made as a whole.

    Attributes:
        hidden: (..., d), what enters the head.
        weight: (V, d), of the head.
        bias: (V,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TopK:
    """The head of a teacher's distribution at T = 1, and the mass of the rest.

    Attributes:
        ids: integers (..., k), of the most likely tokens, no two the same.
        log_probs: (..., k), their natural logarithms of probability.
        log_tail: (...), that of all other tokens together; not read where k is the vocabulary.
        vocabulary: V, tokens that the distribution is over: those of the student from V on are left out.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    vocabulary: int

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "TopK":
        """The k most likely of logits (..., V), computed in fp32 (fp64 for fp64); the tail is summed, not subtracted.

        Raises:
            TeacherError: k is not 1 to V.
        """
        vocabulary = logits.shape[-1]
        if not 1 <= k <= vocabulary:
            raise TeacherError(f"k={k} of the teacher's tokens: allowed are 1 to its vocabulary of {vocabulary}")
        logs = torch.log_softmax(logits.to(exact_of(logits)), -1)
        log_probs, ids = logs.topk(k, -1)
        return cls(ids, log_probs, logs.scatter_(-1, ids, -math.inf).logsumexp(-1), vocabulary)


def against(z: Tensor, teacher: Any, rows: Tensor, compare: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence of each of some rows from the teacher's, z (c, V) their logits, and its gradient by z / T."""
    if not isinstance(teacher, TopK):
        t = _logits(teacher, rows)[:, : z.shape[-1]].to(z.dtype)
        return compare(torch.log_softmax(z / temperature, -1), torch.log_softmax(t / temperature, -1))
    ids, theirs = _rows(teacher.ids, rows).long(), _rows(teacher.log_probs, rows).to(z.dtype)
    ours = z.gather(-1, ids)
    if ids.shape[-1] == teacher.vocabulary:
        values, gradient = compare(*(torch.log_softmax(each / temperature, -1) for each in (ours, theirs)))
        return values, torch.empty_like(z).scatter_(-1, ids, gradient)
    tail = z.scatter(-1, ids, -math.inf)
    sums = tail.logsumexp(-1, keepdim=True)
    ours = torch.cat([ours, sums], -1)
    theirs = torch.cat([theirs, _rows(teacher.log_tail[..., None], rows).to(z.dtype)], -1)
    values, gradient = compare(*(torch.log_softmax(each / temperature, -1) for each in (ours, theirs)))
    tail.sub_(sums).exp_().mul_(gradient[:, -1:])  # each token of the tail by its share of it
    return values, tail.scatter_(-1, ids, gradient[:, :-1])


def _logits(teacher: Tensor | Projected, rows: Tensor) -> Tensor:
    """(c, V) of some positions, without a gradient."""
    if not isinstance(teacher, Projected):
        return _rows(teacher.detach(), rows)
    weight = teacher.weight.detach()
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return functional.linear(_rows(teacher.hidden.detach(), rows).to(weight.dtype), weight, teacher.bias)


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Some positions of (..., features), where `rows` is."""
    return tensor.flatten(0, -2)[rows.to(tensor.device)].to(rows.device)


class Summed(torch.autograd.Function):
    """Sum over rows of a loss of logits: the weighted total, and its parts without gradients.

    The gradients of the total are made in the forward pass and wait for what they are multiplied by, unscaled and, but
    for logits that were given, in fp32, so that scaling the loss keeps small ones from vanishing in fp16. They are
    handed out once, scaled in place; a second backward pass makes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, evaluate: Any, step: int,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.how = evaluate, step, dtype, ctx.needs_input_grad[:3]
        parts, ctx.gradients = _run(hidden, weight, bias, rows, *ctx.how)
        ctx.mark_non_differentiable(*parts)
        return sum(part * of for part, of in zip(parts, weights, strict=True)), *parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows = ctx.saved_tensors
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            _, found = _run(hidden, weight, bias, rows, *ctx.how)
        scaled = (
            None if gradient is None else gradient.mul_(by_total).to(of.dtype)
            for gradient, of in zip(found, (hidden, weight, bias), strict=True)
        )  # fmt: skip
        return *scaled, None, None, None, None


def _run(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor, evaluate: Any, step: int,
    dtype: torch.dtype, needed: Any,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Sums of the parts, and the gradients of the total by hidden, weight and bias, those that are needed.

    `dtype` is that of products with the head.
    """
    exact = exact_of(hidden)
    dtypes = (hidden.dtype if weight is None else exact, exact, exact)
    by_hidden, by_weight, by_bias = gradients = [
        torch.zeros_like(of, dtype=kept) if need else None
        for of, kept, need in zip((hidden, weight, bias), dtypes, needed, strict=True)
    ]
    with torch.autocast(hidden.device.type, enabled=False):
        head = None if weight is None else weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        sums = [torch.zeros((), dtype=exact, device=hidden.device) for _ in range(2)]
        for some in rows.split(step):
            h = hidden[some] if head is None else hidden[some].to(dtype)
            z = h if head is None else functional.linear(h, head, offset)
            values, gradient = evaluate(z.to(exact), some)
            sums = [before + value for before, value in zip(sums, values, strict=True)]
            if by_bias is not None:
                by_bias += gradient.sum(0)
            gradient = gradient.to(h.dtype)
            if by_hidden is not None:
                by_hidden[some] = gradient if head is None else (gradient @ head).to(exact)
            if by_weight is not None:
                if h.dtype == exact:
                    by_weight.addmm_(gradient.T, h)
                else:
                    by_weight += gradient.T @ h
    return sums, gradients


def exact_of(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
