"""Learning rotations: the loss is that of the rotated model, nothing is learned where nothing is rounded, and what is
learned is orthogonal and leaves the model what it was."""

import copy

import pytest
import torch
from exact_models import TOKENS, model_of, norms_in_fp64  # noqa: F401

from compression import TrainingError
from compression.architectures.decoder import Decoder
from compression.architectures.edits import fold_norms
from compression.architectures.rotations import down_projections, merged
from compression.layers.rounded import rounded_numbers, transformed_inputs
from compression.numeric import hadamard
from compression.numeric.cayley import skew_of
from compression.training.rotations import Rotated, learn

FAMILIES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"]


def folded(family, dtype=torch.float64):
    return fold_norms(model_of(family, 7).to(dtype)).model


def start_of(model, seed=0):
    decoder = Decoder(model)
    return hadamard.random_rotations(decoder.width, [block.head_size for block in decoder.blocks], seed)


def with_rounding(model, bits, activation_bits):
    """As methods leave it: transformed, rounded."""
    decoder = Decoder(model)
    for block, path in down_projections(decoder):
        block.replace(block.full(path), transformed_inputs(block.layer(path), 32))
    for block in decoder.blocks:
        for name, linear in list(block.linears()):
            block.replace(name, rounded_numbers(linear, bits, activation_bits, 0.9))
    return model


def loss_of(model):
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()))


def away(matrix):
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_model_with_rotations_merged_and_then_rounded(family):
    model = folded(family, torch.float32)
    start = start_of(model)
    slow = Decoder(copy.deepcopy(model))
    for edit in merged(slow, *start):
        edit.apply(slow)

    found = Rotated(with_rounding(copy.deepcopy(model), 16, 8), 3).loss(TOKENS, (start[0].float(), start[1]))

    rounded, exact = loss_of(with_rounding(slow.model, 3, 8)), loss_of(model)
    assert abs(rounded - float(found)) < 0.05 * abs(rounded - exact)  # values between two steps


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_where_nothing_is_rounded_there_is_nothing_to_learn(family):
    model = folded(family)
    stream, heads = start_of(model)
    now = [each.requires_grad_() for each in (stream, *heads)]

    gradients = torch.autograd.grad(Rotated(model, None).loss(TOKENS, (stream, heads)), now)

    for each, gradient in zip(now, gradients, strict=True):
        assert float(skew_of(each.detach(), gradient).abs().max()) < 1e-8 < float(gradient.abs().max())


@pytest.mark.parametrize("bits", [4, None])
def test_what_is_learned_is_orthogonal_loses_less_and_leaves_the_function_as_it_was(bits):
    model = folded("LlamaForCausalLM", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, start = with_rounding(copy.deepcopy(model), 16, 4), start_of(model)

    learned = learn(student, TOKENS, start, bits=bits, steps=18, learning_rate=0.5)

    stream, heads = learned.rotations
    assert max(map(away, (stream, *heads))) < 1e-5
    assert all(not torch.equal(one, other) for one, other in zip((stream, *heads), (start[0], *start[1]), strict=True))
    assert sum(learned.losses[-6:]) < sum(learned.losses[:6]) and len(learned.losses) == 18
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    exact = Decoder(folded("LlamaForCausalLM"))
    logits = exact.model(TOKENS, use_cache=False).logits
    for edit in merged(exact, stream, heads):
        edit.apply(exact)
    assert float((exact.model(TOKENS, use_cache=False).logits - logits).norm() / logits.norm()) < 1e-9


def test_a_loss_that_is_not_finite_ends_it_with_the_step():
    model = folded("LlamaForCausalLM", torch.float32)
    model.lm_head.weight.data[3] = torch.inf

    with pytest.raises(TrainingError, match="step 1: the loss of the rotated model is"):
        learn(model, TOKENS, start_of(model), bits=4, steps=2, learning_rate=1.5)
