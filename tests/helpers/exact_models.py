"""Models in fp64 of every architecture, to tell an edit that is exact from one that is nearly so."""

import copy
import functools
import tempfile

import pytest
import torch
from checkpoints import transformers_model
from families import FAMILIES

from compression.architectures.table import ARCHITECTURES
from compression.checkpoints.base import open_base

SIZES = {"head_dim": 8, "num_hidden_layers": 3, "initializer_range": 0.2, "first_k_dense_replace": 1}
TOKENS = torch.arange(40).view(2, 20) * 7 % 48


@pytest.fixture(scope="module", autouse=True)
def norms_in_fp64():
    """transformers' norms, and softmax where it is not torch's attention, compute in fp32 whatever they are given."""
    softmax = torch.nn.functional.softmax

    def norm(offset, epsilon):
        def forward(self, x):
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, epsilon))
            return (self.weight + offset) * (x * scale)

        return forward

    def exact_softmax(x, dim=None, dtype=None, **others):
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", exact_softmax)
        for family, row in ARCHITECTURES.items():
            for module in plain(family, False).modules():
                if type(module).__name__.endswith("RMSNorm"):
                    patch.setattr(type(module), "forward", norm(row.norm_offset, row.epsilon))
        yield


@functools.cache
def plain(family, tied):
    """As this package opens it: its parts and experts are layers of their own."""
    sizes = {key: value for key, value in SIZES.items() if key in FAMILIES[family] or key not in ("head_dim",
             "first_k_dense_replace") or family in ("LlamaForCausalLM", "MistralForCausalLM")}  # fmt: skip
    if "layer_types" in FAMILIES[family]:
        sizes["layer_types"] = [*FAMILIES[family]["layer_types"], "full_attention"]
    model = transformers_model(family, tied=tied, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return open_base(folder).model.double().eval().requires_grad_(False)


def model_of(family, seed, tied=False):
    """A model in fp64 whose norms and biases are of all sizes."""
    model = copy.deepcopy(plain(family, tied))
    offset = ARCHITECTURES[family].norm_offset
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            one = 0 if name.endswith("bias") else 1 - offset * ("norm" in name)
            parameter.data = numbers(seed + i, *parameter.shape) * 0.5 + one
    return model


def numbers(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed, *shape):
    return torch.linalg.qr(numbers(seed, *shape))[0]
