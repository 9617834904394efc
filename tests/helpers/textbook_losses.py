"""Losses of distillation in the form of the textbook, by whole tensors and autograd; and what to try losses on."""

from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional

from compression.numeric.losses import IGNORED, forward_kl, jensen_shannon, reverse_kl
from compression.training.settings import Objective

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


@st.composite
def logits(draws, count=2):
    """Some (n, V) logits, one scale: from almost even to almost certain distributions; fp64."""
    tokens, vocabulary = draws(st.integers(1, 4)), draws(st.integers(2, 40))
    scale, seed = draws(st.sampled_from((0.01, 1.0, 10.0, 60.0))), draws(st.integers(0, 2**20))
    return [draw(tokens, vocabulary, seed=seed + i, scale=scale, dtype=torch.float64) for i in range(count)]
