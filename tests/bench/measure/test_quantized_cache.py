# ruff: noqa: F811 - fixtures of another file
"""A model whose keys and values are quantized is measured as it generates: losses, likelihoods, answers, bytes."""

from copy import deepcopy

import pytest
import torch
from bytewise_llama import data, model, tokenizer  # noqa: F401

from bench.measure import perplexity as module
from bench.measure.answering import answer
from bench.measure.decoding import Decoder as TextDecoder
from bench.measure.generation import Decoder, Load, graph_refusal
from bench.measure.perplexity import perplexity
from bench.measure.perplexity_windows import PerplexityProtocol
from bench.measure.scoring.prefix_tree import Request, Tree, shares
from compression.caches import replaying
from compression.caches.policy import Policy
from compression.checkpoints.tokens import encode
from compression.numeric.cache_grids import IntGrid

KIVI = Policy(keys=IntGrid(bits=2, by="channel", group_size=4), values=IntGrid(bits=2), residual=6)
PROMPTS = ("the quick brown fox", "jumps over")


@pytest.fixture
def quantized(model):
    copy = deepcopy(model).double()
    replaying.attach(copy, KIVI)
    return copy


def stepwise(model, ids, prompt=1):
    """Log-probabilities after every token of one sequence, decoded token by token behind a prompt."""
    cache = replaying.new_cache(model)
    with torch.inference_mode():
        found = [model(torch.tensor([ids[:prompt]]), past_key_values=cache).logits[0]]
        found += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in ids[prompt:]]
    return torch.cat(found).log_softmax(-1)


def test_perplexity_is_that_of_decoding_token_by_token(model, quantized, tokenizer, data):
    protocol = PerplexityProtocol(name="e", samples=3, length=40, stride=None, batch_size=2)
    reading = perplexity(quantized, tokenizer, data, protocol, device="cpu")

    samples = module.checked_samples(model.config, tokenizer, data, protocol)
    for sample, mean in zip(samples, reading.sample_means, strict=True):
        steps, ids = stepwise(quantized, list(sample.ids)), torch.tensor(sample.ids)
        places = torch.arange(sample.first_scored, len(ids))
        assert mean == pytest.approx(-float(steps[places - 1, ids[places]].mean()), rel=1e-6)
    assert abs(reading.nll / perplexity(model, tokenizer, data, protocol, device="cpu").nll - 1) > 1e-4


def test_likelihoods_are_those_of_decoding_token_by_token(quantized):
    ids = [(7 * n + 3) % 200 for n in range(30)]
    requests = [Request((*ids[:20], *ids[20 + n :]), 18) for n in range(3)]

    found = Tree(quantized, tokens=64, shared=shares(quantized)).score(requests)

    assert not shares(quantized)
    for request, (likelihood, _) in zip(requests, found, strict=True):
        steps = stepwise(quantized, list(request.ids))
        expected = sum(float(steps[at - 1, request.ids[at]]) for at in range(request.first, len(request.ids)))
        assert likelihood == pytest.approx(expected, rel=1e-6)


def greedy(model, ids, tokens):
    """The most likely tokens after a prompt, behind a quantized cache."""
    cache, fed, found = replaying.new_cache(model), list(ids), []
    with torch.inference_mode():
        for _ in range(tokens):
            found.append(int(model(torch.tensor([fed]), past_key_values=cache).logits[0, -1].argmax()))
            fed = found[-1:]
    return found


def test_answers_are_greedy_and_the_replay_agrees_on_every_token(quantized, tokenizer):
    written = answer(quantized, tokenizer, PROMPTS, new_tokens=12)

    for prompt, each in zip(PROMPTS, written, strict=True):
        ids = encode(tokenizer, prompt)
        expected = greedy(quantized, ids, each.tokens)
        assert TextDecoder(tokenizer).behind(ids, expected) == each.text
        with torch.inference_mode():
            states = replaying.hidden(quantized, torch.tensor([[*ids, *expected]]), prompt=len(ids), chunk=5)
            likeliest = quantized.lm_head(states)[0].argmax(-1).tolist()
        assert expected == likeliest[len(ids) - 1 : -1]


def test_the_clock_decodes_behind_the_quantized_cache_and_counts_its_bytes(quantized, model):
    load = Load(batch_size=2, prompt_tokens=40, new_tokens=9, prompts=1)
    own, plain = (Decoder(each, load).run().kv_bytes for each in (quantized.float(), model))

    held, size, rows = 48, 8, 2 * 2 * 2  # layers, heads, sequences
    until = KIVI.stored_until(held)
    keys = until // 4 * size * (1 + 4)  # a group of 4 in 2 bits, scale and minimum
    values = until * (size // 4 + 4)
    assert own == rows * (keys + values + 2 * 4 * size * (held - until))
    assert plain == rows * 2 * 4 * size * held
    assert "grows with every token" in graph_refusal(quantized)
