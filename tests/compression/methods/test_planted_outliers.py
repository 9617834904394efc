"""Outliers planted in what norms put out: the model computes what it did, one step per tensor loses on it, and methods
that move outliers into weights, or cluster channels, win it back."""

import functools

import pytest
import torch
from exact_models import TOKENS, model_of, norms_in_fp64  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from outliers import plant
from strategies import seeds

import compression
from compression.architectures.decoder import decoder_blocks
from compression.architectures.table import ARCHITECTURES
from compression.calibration.text import open_calibration

ROUGH = dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"), 1e-5)  # their routers multiply in fp32


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@settings(max_examples=10)
@given(st.sampled_from(sorted(ARCHITECTURES)), seeds)
def test_planting_changes_nothing_but_the_activations(family, seed):
    model = model_of(family, seed % 1000)
    before = logits(model, TOKENS)

    planted = plant(model, seed=seed)

    after = logits(model, TOKENS)
    assert ROUGH.get(family, 1e-9) > float((after - before).norm() / before.norm())
    assert planted or family == "Olmo2ForCausalLM"  # whose norms stand behind the sublayers


# --- On the reference -------------------------------------------------------------------------------------------------

FEW = "samples=8,sequence_length=128"
BACK = 0.8  # of the loss, at least


@pytest.fixture(scope="module")
def loss():
    """What a recipe adds to the loss of the reference with planted outliers on held-out text: its divergence from the
    base, in nat a token."""
    base = compression.open_base("reference")
    base.model.float()
    assert 2 * len(decoder_blocks(base.model)) == plant(base.model)
    text = open_calibration("embedded", base.source)
    ids = text.tokens(base.tokenizer, samples=12, length=128, seed=1, vocabulary=base.model.config.vocab_size)

    @functools.cache
    def divergence(recipe):
        result = compression.compress(base, recipe, calibration=ids[:8])
        ours, theirs = (logits(model, ids[8:]).double().log_softmax(-1) for model in (base.model, result.model))
        return float((ours.exp() * (ours - theirs)).sum(-1).mean())

    return divergence


@pytest.mark.process
@pytest.mark.parametrize(
    "steps",
    [
        f"smoothquant(activations=static,{FEW})",
        f"os_plus({FEW})",
        f"os_plus(shift=true,{FEW})",
        f"rptq(bits=8,activation_bits=8,rounding=nearest,{FEW})",
    ],
)
def test_what_one_step_per_layer_loses_is_won_back(loss, steps):
    lost = loss(f"int8(activations=static,{FEW})")

    assert lost * (1 - BACK) >= loss(steps)
