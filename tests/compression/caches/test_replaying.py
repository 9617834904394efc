"""A quantized cache and its replay against decoding by hand, which keeps every key and rounds anew for every token."""

import functools

import pytest
import torch
from checkpoints import transformers_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compression.caches import replaying
from compression.caches.cache import QuantizedCache, QuantizedLayer
from compression.caches.policy import Policy
from compression.errors import LayerError
from compression.numeric.cache_grids import Float8Grid, IntGrid

TOKENS = 17
IDS = torch.randint(48, (2, TOKENS), generator=torch.Generator().manual_seed(3))
PAST_ONLY = Policy(keys=IntGrid(bits=2), values=IntGrid(bits=2), residual=1)
KIVI = Policy(keys=IntGrid(bits=2, by="channel", group_size=4), values=IntGrid(bits=2), residual=3, keep_first=2)
ALL_IN_FP8 = Policy(keys=Float8Grid(), values=Float8Grid(by="token"))


@functools.cache
def model_of(architecture="LlamaForCausalLM", dtype=torch.float64):
    return transformers_model(architecture, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_policy_is_left():
    yield
    for model in (model_of(), model_of("MistralForCausalLM")):
        replaying.attach(model, None)


class ByHand(DynamicLayer):
    """Keeps all keys and values, and shows each token what a policy would have left of those before it."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def update(self, key_states, value_states, *args, **kwargs):
        super().update(key_states, value_states)
        policy, tokens = self.policy, self.keys.shape[2]
        step, until = max(policy.keys.tokens, policy.values.tokens), policy.keep_first
        while until + step <= tokens - policy.residual:
            until += step
        shown = []
        for held, grid in ((self.keys, policy.keys), (self.values, policy.values)):
            shown.append(held.clone())
            for at in range(policy.keep_first, until, grid.tokens):
                group = slice(at, at + grid.tokens)
                shown[-1][:, :, group] = grid.decode(grid.encode(held[:, :, group]), held.shape[-1], held.dtype)
        return shown


def by_hand(model, ids, policy, *, prompt=0):
    """Logits of decoding token by token behind a prompt that reads itself as it is."""
    replaying.attach(model, None)
    layers = [ByHand(policy) for _ in range(model.config.num_hidden_layers)]
    cache, plain = Cache(layers=layers), DynamicCache()
    found = []
    with torch.inference_mode():
        if prompt:
            found.append(model(ids[:, :prompt], past_key_values=plain).logits)
            for layer, read in zip(layers, plain.layers, strict=True):
                DynamicLayer.update(layer, read.keys, read.values)
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, ids.shape[1])]
    return torch.cat(found, 1)


def replayed(model, ids, policy, **how):
    replaying.attach(model, policy)
    with torch.inference_mode():
        return model.lm_head(replaying.hidden(model, ids, **how))


def decoded(model, ids, policy, *, prompt=0):
    replaying.attach(model, policy)
    cache, begin = replaying.new_cache(model), max(prompt, 1)
    with torch.inference_mode():
        found = [model(ids[:, :begin], past_key_values=cache).logits]
        found += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(begin, ids.shape[1])]
    return torch.cat(found, 1)


def check(policy, *, prompt=0, chunk=7, model=None):
    """One pass without a cache, chunks of a replay, and plain decoding, against decoding by hand, to 1e-9 in fp64."""
    model = model or model_of()
    expected = by_hand(model, IDS, policy, prompt=prompt)
    ways = [replayed(model, IDS, policy, prompt=prompt, chunk=chunk), decoded(model, IDS, policy, prompt=prompt)]
    if not prompt:
        with torch.inference_mode():
            ways.append(model(IDS, use_cache=False).logits)
    for found in ways:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@st.composite
def policies(draw):
    bits, tokens = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from((1, 3, 4)))
    by_token, by_channel = IntGrid(bits=bits, group_size=draw(st.sampled_from((-1, 4)))), IntGrid(
        bits=bits, by="channel", group_size=tokens)  # fmt: skip
    fp8 = Float8Grid(by=draw(st.sampled_from(("head", "token", "unit"))))
    return Policy(
        keys=draw(st.sampled_from((by_token, by_channel, fp8))),
        values=draw(st.sampled_from((by_token, by_channel, fp8))),
        residual=draw(st.integers(0, 7)), keep_first=draw(st.integers(0, 4)),
    )  # fmt: skip


@pytest.mark.parametrize("policy", [KIVI, PAST_ONLY, ALL_IN_FP8], ids=["kivi", "past only", "fp8"])
def test_a_replay_is_decoding_by_hand(policy):
    check(policy, prompt=0, chunk=5)


@pytest.mark.process
@given(policies(), st.integers(0, 12), st.integers(1, TOKENS))
def test_any_replay_is_decoding_by_hand(policy, prompt, chunk):
    check(policy, prompt=prompt, chunk=chunk)


def test_windows_are_kept_by_the_masks():
    check(KIVI, model=transformers_model("MistralForCausalLM", dtype=torch.float64, sliding_window=9).eval())


@pytest.mark.parametrize("sabotage", ["the current token too", "no positions", "a key too early", "one form of a key"])
def test_a_broken_replay_is_caught(sabotage, monkeypatch):
    right, policy = Policy.stored_until, PAST_ONLY if sabotage == "the current token too" else KIVI
    if sabotage == "the current token too":
        monkeypatch.setattr(Policy, "stored_until", lambda self, tokens: right(self, tokens + self.residual))
    elif sabotage == "no positions":
        monkeypatch.setattr(QuantizedLayer, "get_seq_length", lambda self: 0)
    elif sabotage == "a key too early":
        monkeypatch.setattr(Policy, "stored_until", lambda self, tokens: right(self, tokens + 1))
    else:  # as a pass without a past reads its text

        def all_exact(self, new, window=None):
            until = self.policy.stored_until(self.held + 1)
            sees = visible(self, new, window)
            columns = sees.shape[1] - (self.held + new - until)
            query = torch.arange(self.held, self.held + new)[:, None]
            sees[:, columns:] = torch.arange(until, self.held + new) <= query
            sees[:, until:columns] = False
            return sees

        visible = QuantizedLayer.visible
        monkeypatch.setattr(QuantizedLayer, "visible", all_exact)
    with pytest.raises(AssertionError, match="not close"):
        check(policy)


def test_single_precision_differs_by_what_flips():
    """The median is of rounding; a code that falls on the other side of a tie moves single logits by more."""
    model = transformers_model("LlamaForCausalLM").eval()
    expected, found = by_hand(model, IDS, KIVI), replayed(model, IDS, KIVI, chunk=7)

    assert (found - expected).abs().median() < 1e-5
    both = [torch.log_softmax(each[:, :-1], -1).gather(-1, IDS[:, 1:, None]).mean() for each in (found, expected)]
    assert abs(both[0] - both[1]) < 1e-4


def test_what_is_kept_has_every_bit_and_the_rest_is_on_the_grid():
    layer = QuantizedLayer(KIVI)
    keys, values = torch.randn(2, 1, 2, 21, 8).unbind()
    layer.update(keys[:, :, :20], values[:, :, :20])

    shown = layer.update(keys[:, :, 20:], values[:, :, 20:])

    until = KIVI.stored_until(21)
    assert 18 == until
    for found, x, grid in zip(shown, (keys, values), (KIVI.keys, KIVI.values), strict=True):
        assert torch.equal(found[:, :, :2], x[:, :, :2]) and torch.equal(found[:, :, until:], x[:, :, until:])
        assert torch.equal(found[:, :, 2:until], grid.decode(grid.encode(x[:, :, 2:until]), 8, x.dtype))


@pytest.mark.parametrize("residual, most", [(0, {64: 0.285, 32: 0.32}), (128, {64: 0.33, 32: 0.36})])
@pytest.mark.parametrize("size", [64, 32])
def test_bytes_are_those_of_the_tensors(residual, most, size):
    check_bytes(QuantizedLayer(policy_of_4_bits(residual, size)), residual, size, most[size])


def policy_of_4_bits(residual, size):
    return Policy(keys=IntGrid(bits=4, group_size=size), values=IntGrid(bits=4, group_size=size), residual=residual)


def check_bytes(layer, residual, size, most):
    """2,048 tokens in 16 bits and in 4, with a scale and a minimum to each token and head."""
    x = torch.randn(1, 2, 2048, size, dtype=torch.bfloat16)
    layer.update(x, x)
    held = [each for side in layer.sides for each in vars(side).values()]
    held += [each for stored in held if isinstance(stored, dict) for each in stored.values()]
    tensors = {each.data_ptr(): each.untyped_storage().nbytes() for each in held if isinstance(each, torch.Tensor)}

    adds_up = 2 * 2 * ((2048 - residual) * (size // 2 + 4) + residual * 2 * size)
    assert abs(layer.nbytes - adds_up) <= 0.02 * adds_up
    assert layer.nbytes == sum(tensors.values())
    assert layer.nbytes / (2 * x.nbytes) <= most


class Nominal(QuantizedLayer):
    """Reports bits times values."""

    @property
    def nbytes(self):
        return sum(self.policy.keys.bits * side.size * 2 * self.held // 8 for side in self.sides)


def test_nominal_bits_are_caught():
    with pytest.raises(AssertionError):
        check_bytes(Nominal(policy_of_4_bits(0, 64)), 0, 64, 0.285)


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused_where_it_would():
    model = model_of()
    replaying.attach(model, KIVI)
    mask = torch.ones_like(IDS)
    mask[1, 12:] = 0
    with torch.inference_mode():
        alone, padded = model(IDS[1:, :12]).logits, model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(padded[1:, :12], alone, rtol=1e-9, atol=1e-9)
        for cache in (None, replaying.new_cache(model)):
            with pytest.raises(LayerError, match="padded on the left"):
                model(IDS, attention_mask=mask.flip(1), past_key_values=cache)


def test_rows_of_a_policy_by_token_may_be_padded_on_the_left():
    model, ids, cut = model_of(), IDS.clone(), 6
    replaying.attach(model, PAST_ONLY)
    ids[1, cut:], ids[1, :cut] = IDS[1, :-cut], 0
    mask = torch.ones_like(ids)
    mask[1, :cut] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together, alone = replaying.new_cache(model), replaying.new_cache(model)
    with torch.inference_mode():
        for begin, end in ((0, 12), *((at, at + 1) for at in range(12, TOKENS))):
            found = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end],
                          past_key_values=together).logits  # fmt: skip
            expected = model(ids[1:, max(begin, cut) : end], past_key_values=alone).logits
            torch.testing.assert_close(found[1:, -expected.shape[1] :], expected, rtol=1e-9, atol=1e-9)


def test_other_caches_are_refused_and_a_quantized_one_is_never_cut():
    model = model_of()
    with pytest.raises(LayerError, match="no cache policy"):
        replaying.new_cache(model)
    replaying.attach(model, KIVI)
    with pytest.raises(LayerError, match="a DynamicCache is not"):
        model(IDS, past_key_values=DynamicCache())
    cache = QuantizedCache(KIVI, 2)
    model(IDS, past_key_values=cache)
    with pytest.raises(LayerError, match="cannot be cut back"):
        cache.layers[0].crop(-1)
    cache.reset()
    assert (0, 0) == (cache.nbytes, cache.get_seq_length())
    replaying.attach(model, None)
    assert model(IDS, past_key_values=DynamicCache()).logits.isfinite().all()


def test_rows_are_taken_and_repeated():
    model = model_of()
    replaying.attach(model, KIVI)
    caches = [replaying.new_cache(model) for _ in range(2)]
    with torch.inference_mode():
        expected = [model(IDS[:, at], past_key_values=caches[0]).logits for at in (slice(0, 16), slice(16, 17))]
        model(IDS[:, :16], past_key_values=caches[1])
        caches[1].batch_select_indices(torch.tensor([1]))
        caches[1].batch_repeat_interleave(3)
        found = model(IDS[1:, 16:].repeat(3, 1), past_key_values=caches[1]).logits
    torch.testing.assert_close(found, expected[1][1:].expand_as(found), rtol=1e-9, atol=1e-9)


@given(policies())
def test_a_policy_survives_json(policy):
    assert policy == Policy.from_json(policy.to_json())


def test_what_is_no_policy_is_refused():
    for change in ({"residual": -1}, {"residual": "all"}, {"more": 1}, {"keys": None}):
        with pytest.raises(LayerError):
            Policy.from_json(KIVI.to_json() | change)
    with pytest.raises(LayerError, match="cannot move together"):
        Policy(keys=IntGrid(bits=2, by="channel", group_size=4), values=IntGrid(bits=2, by="channel", group_size=8))
