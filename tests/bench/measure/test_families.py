"""Every architecture under the measurements: likelihoods, cache and operations are what a plain forward pass has."""

import functools

import pytest
import torch
from families import FAMILIES, SHAPES
from torch.utils.flop_counter import FlopCounterMode

import compression
from bench.measure.generation import Decoder, Load, _most_likely
from bench.measure.perplexity import Sample, _scored
from bench.measure.scoring.prefix_tree import Request, Tree
from bench.metrics.compute import _attentions, prefill_flops
from compression.architectures import random_shapes
from compression.architectures.table import ARCHITECTURES


@functools.cache
def model_of(family):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_shapes.SHAPES, family, SHAPES[family])
        return compression.open_base(f"random:{family}").model


def ids_of(seed, count):
    return tuple(torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def log_probs(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_own_logits(family):
    model, texts = model_of(family), [ids_of(1, 20), ids_of(2, 13)]

    found = _scored(model, None, [Sample(ids=ids, first_scored=1, n_bytes=1, label="") for ids in texts], "cpu", None)

    for ids, (nats, *_) in zip(texts, found, strict=True):
        expected = -log_probs(model, ids)[range(len(ids) - 1), list(ids[1:])].sum()
        assert float(expected) == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_choices_that_share_a_beginning_are_those_of_each_alone(family):
    model, begin = model_of(family), ids_of(3, 5)  # within the sliding window of those that have one
    requests = [Request(begin + ids_of(seed, 3), 5) for seed in range(4, 8)] + [Request(ids_of(9, 19), 4)]

    found = Tree(model, 256).score(requests)

    for request, (score, _) in zip(requests, found, strict=True):
        rows = range(request.first - 1, len(request.ids) - 1)
        expected = log_probs(model, request.ids)[rows, list(request.ids[request.first :])].sum()
        assert float(expected) == pytest.approx(score, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_over_the_cache_is_what_the_model_says_without(family):
    model, load = model_of(family), Load(batch_size=1, prompt_tokens=6, new_tokens=8)
    decoder = Decoder(model, load)
    taken = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.measure.generation._most_likely", lambda x: taken.append(_most_likely(x)) or taken[-1])
        done = decoder.run()

    ids = [*decoder._prompts[0][0].tolist(), *[int(token) for token in taken]]
    told = log_probs(model, ids).argmax(-1).tolist()[5:]
    assert told == ids[6:]
    assert done.kv_bytes == held(family, 13) * 4


ALL_HEADS = ("GPTNeoXForCausalLM", "OPTForCausalLM")  # have no grouped ones


def held(family, tokens):
    """Numbers that the cache of a model holds of so many tokens, by its configuration."""
    config, total = model_of(family).config, 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        seen = min(tokens, config.sliding_window) if kind == "sliding_attention" else tokens
        if hasattr(config, "kv_lora_rank"):
            total += seen * (config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            heads = FAMILIES[family].get("num_key_value_heads", 4 if family in ALL_HEADS else 2)
            total += seen * 2 * heads * 8
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_prompt_are_what_torch_counts(family):
    model, ids = model_of(family), torch.tensor([ids_of(5, 7)])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)

    pairs = 4 * sum(width for width, _ in _attentions(model))  # for one token and one key
    fused = ARCHITECTURES[family].sdpa and not hasattr(model.config, "kv_lora_rank")  # of one width
    counted = 0 if fused else 7 * 7 * pairs  # torch does not count fused attention, and elsewhere counts all keys
    assert counter.get_total_flops() - counted == pytest.approx(prefill_flops(model, 7) - 7 * 8 // 2 * pairs, rel=0.005)
