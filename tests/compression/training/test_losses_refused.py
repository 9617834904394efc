"""What the losses of distillation refuse: settings that cannot be, and tensors that do not fit."""

import math
import typing

import pytest
import torch
from textbook_losses import KD

from compression.errors import RecipeError, TeacherError
from compression.numeric import losses
from compression.numeric.losses import cross_entropy, forward_kl, hidden_states, jensen_shannon
from compression.numeric.losses_in_chunks import TopK
from compression.training import settings as _settings
from compression.training.objective import distillation
from compression.training.settings import Objective


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
    assert set(typing.get_args(_settings.Divergence)) == set(losses.DIVERGENCES)
