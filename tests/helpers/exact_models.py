"""Models in fp64 of every architecture, to tell an edit that is exact from one that is nearly so."""

import copy
import functools

import pytest
import torch
from checkpoints import transformers_model

from compression.architectures.table import ARCHITECTURES

SIZES = {"head_dim": 8, "num_hidden_layers": 3, "initializer_range": 0.2}
TOKENS = torch.arange(40).view(2, 20) * 7 % 48


@pytest.fixture(scope="module", autouse=True)
def norms_in_fp64():
    """transformers' norms compute in fp32 whatever they are given, which is all that two bases would differ by."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        for family in ARCHITECTURES:
            model = plain(family, False)
            patch.setattr(type(model.model.norm), "forward", forward)
        yield


@functools.cache
def plain(family, tied):
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or family != "Qwen2ForCausalLM"}
    return transformers_model(family, tied=tied, dtype=torch.float64, **sizes).eval().requires_grad_(False)


def model_of(family, seed, tied=False):
    """A model in fp64 whose norms and biases are of all sizes."""
    model = copy.deepcopy(plain(family, tied))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            parameter.data = numbers(seed + i, *parameter.shape) * 0.5 + (0 if name.endswith("bias") else 1)
    return model


def numbers(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed, *shape):
    return torch.linalg.qr(numbers(seed, *shape))[0]
