import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bench.errors import MetricError, OptionError
from bench.measure.generation import Decoder, Interleaved, Load
from bench.metrics.compute import generation_flops, model_flops_per_token, prefill_flops
from bench.metrics.speed import mfu, readings, throughput

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def tiny(family="llama", *, device="cpu", **changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attn_implementation": "eager",
    }
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes)).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoded_token_costs_what_torch_counts(family):
    model, context = tiny(family), 33
    cache = model(torch.zeros(1, context - 1, dtype=torch.long), use_cache=True).past_key_values

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)

    assert counter.get_total_flops() == pytest.approx(model_flops_per_token(model, context), rel=0.01)


@torch.no_grad()
def test_a_short_prompt_costs_what_torch_counts(llama):
    with FlopCounterMode(display=False) as counter:
        llama(torch.zeros(1, 4, dtype=torch.long), logits_to_keep=1)

    assert counter.get_total_flops() == pytest.approx(prefill_flops(llama, 4), rel=0.01)


@pytest.mark.parametrize("window", [None, 5])
@settings(deadline=None, max_examples=25)
@given(tokens=st.integers(1, 40))
def test_a_prompt_costs_the_sum_of_its_tokens(window, tokens):
    model = windowed(window)

    assert sum(model_flops_per_token(model, seen) for seen in range(1, tokens + 1)) == prefill_flops(
        model, tokens, logits=tokens
    )


@functools.cache
def windowed(window):
    return tiny("mistral", device="meta", sliding_window=window)


def test_beyond_its_window_a_token_costs_no_more():
    model = windowed(5)

    assert model_flops_per_token(model, 4) < model_flops_per_token(model, 5) == model_flops_per_token(model, 500)


def test_grouped_heads_narrow_two_projections_and_nothing_else(llama):
    full = tiny(num_key_value_heads=8)

    narrower = 2 * 2 * 128 * (8 - 2) * 16  # k and v, multiply and add, columns, heads, head size
    assert 2 * narrower == model_flops_per_token(full, 100) - model_flops_per_token(llama, 100)


def test_a_removed_layer_takes_its_share_with_it():
    head = 2 * 128 * 64
    whole, half = tiny(), tiny()
    del half.model.layers[1]

    assert (model_flops_per_token(whole, 9) - head) / 2 == model_flops_per_token(half, 9) - head


class Packed(torch.nn.Module):
    """A layer whose weight is not a matrix of its shape."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features


class LowRank(Packed):
    def __init__(self, dense, rank):
        super().__init__(dense)
        self.right = torch.nn.Linear(dense.in_features, rank, bias=False)
        self.left = torch.nn.Linear(rank, dense.out_features, bias=False)


def test_a_packed_layer_costs_the_dense_layer_it_stands_for(llama):
    packed = tiny()
    for layer in packed.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Packed(layer.self_attn.q_proj), Packed(layer.mlp.up_proj)

    assert model_flops_per_token(llama, 9) == model_flops_per_token(packed, 9)


def test_a_low_rank_layer_costs_its_two_factors(llama):
    factored = tiny()
    factored.model.layers[0].mlp.up_proj = LowRank(factored.model.layers[0].mlp.up_proj, 4)

    saved = 2 * (128 * 256 - 4 * (128 + 256))
    assert saved == model_flops_per_token(llama, 9) - model_flops_per_token(factored, 9)


def test_mistral_7b_on_a_t4_reaches_the_third_of_a_percent_that_the_papers_speed_means():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral"))

    weights = 7_241_732_096 - 32_000 * 4096 - 65 * 4096  # all but the embedding and the norms
    flops = model_flops_per_token(model, 200)

    assert 2 * weights + 32 * 4 * 4096 * 200 == flops
    assert flops * 15.97 / 65e12 == pytest.approx(0.0035, rel=0.02)


@pytest.mark.parametrize("context", [0, -1])
def test_a_token_that_does_not_see_itself_is_refused(llama, context):
    with pytest.raises(OptionError, match="at least 1"):
        model_flops_per_token(llama, context)


def test_more_logits_than_positions_are_refused(llama):
    with pytest.raises(OptionError, match="from 1 to 3"):
        prefill_flops(llama, 3, logits=4)


def test_queries_of_unknown_width_are_an_error_and_not_a_smaller_count():
    model = tiny()
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential()

    with pytest.raises(MetricError, match=r"layers\.1\.self_attn\.q_proj is a Sequential"):
        model_flops_per_token(model, 9)


def test_a_model_without_linear_layers_is_an_error_and_not_zero():
    with pytest.raises(MetricError, match="nothing to count"):
        model_flops_per_token(torch.nn.Embedding(2, 2), 9)


def test_the_operations_of_a_generation_are_those_of_its_prompt_and_of_each_step():
    model, load = tiny("llama"), Load(batch_size=3, prompt_tokens=5, new_tokens=4)

    steps = 3 * model_flops_per_token(model, 7)

    assert 3 * (prefill_flops(model, 5) + steps) == generation_flops(model, load)


def test_model_and_base_are_each_credited_with_their_own_operations():
    """A model of half the layers does about half the work: of equal times it makes half of the base's MFU."""
    load, models = Load(prompt_tokens=4, new_tokens=3), [tiny("llama", num_hidden_layers=layers) for layers in (4, 2)]
    pair = Interleaved([Decoder(model, load) for model in models])
    pair.run(3)

    own, base = readings(pair, load, warmup=1, peak_flops_per_s=1e12)

    for reading, model in ((base, models[0]), (own, models[1])):
        assert len(reading.rounds) == 2
        work = generation_flops(model, load) / load.new_tokens
        assert mfu(reading) == pytest.approx(100 * work * throughput(reading) / 1e12)
    assert own.base == base
