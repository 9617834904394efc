"""Parts that treat the first tokens of a sequence apart know which they are, with a cache and without."""

import copy

import pytest
import torch
from checkpoints import transformers_model

from compression import Recipe
from compression.architectures.decoder import decoder_blocks
from compression.checkpoints.artefact import Compressed
from compression.layers import positions
from compression.layers.activations import Levels
from compression.layers.linear import Linear

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
IDS = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    """Keys and values on three levels, but for the first two tokens; in double precision, so that none is near one."""
    found = transformers_model(request.param).double().eval()
    for block in decoder_blocks(found):
        for name, linear in block.linears():
            if name.endswith(("k_proj", "v_proj")):
                seen = torch.randn(99, linear.out_features, generator=torch.Generator().manual_seed(1)) / 3
                layer = Linear.of(linear)
                layer.output_part = Levels.fitted(seen, 2, outliers=0.05, keep_first=2)
                block.replace(name, layer)
    return Compressed(found.requires_grad_(False), Recipe(), ("tiny", "0")).model


def by_steps(model, sizes):
    cache, found, at = None, [], 0
    for size in sizes:
        out = model(IDS[:, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12, [8, 1, 1, 1, 1], [1, 11]], ids=str)
def test_with_a_growing_cache_the_logits_are_those_without(model, sizes):
    expected = model(IDS, use_cache=False).logits

    torch.testing.assert_close(expected, by_steps(model, sizes), rtol=1e-9, atol=1e-9)


def test_padding_on_the_left_does_not_count(model):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)

    found = model(padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 3:]

    torch.testing.assert_close(model(IDS, use_cache=False).logits, found, rtol=1e-6, atol=1e-6)


def test_without_a_decoder_that_says_so_every_pass_begins_at_the_start():
    assert [0, 1, 2] == positions.current(torch.zeros(2, 3, 4)).tolist()


def test_a_model_without_such_parts_is_not_watched():
    found = transformers_model("LlamaForCausalLM").requires_grad_(False)

    assert not Compressed(found, Recipe(), ("tiny", "0")).model.model._forward_pre_hooks


@pytest.mark.parametrize("model", ARCHITECTURES[:1], indirect=True)
def test_watching_twice_is_watching_once_and_copies_watch_too(model):
    before = len(model.model._forward_pre_hooks)
    positions.watch(model)

    assert 1 == before == len(model.model._forward_pre_hooks)
    copied = copy.deepcopy(model)
    assert torch.equal(by_steps(model, [5, 7]), by_steps(copied, [5, 7]))


@pytest.mark.parametrize("model", ARCHITECTURES[:1], indirect=True)
def test_a_pass_that_fails_leaves_no_place_behind(model):
    with pytest.raises((RuntimeError, TypeError)):
        model(IDS.float(), use_cache=False)

    assert [0, 1] == positions.current(torch.zeros(2, 4)).tolist()
