"""The clock: what it runs is what the model does, and what it counts is there."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import pack_linear
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.errors import OptionError
from bench.machine import cpu_wait
from bench.machine.cpu_wait import moments
from bench.measure.decode_step import fits, lean_step
from bench.measure.generation import (
    Decoder,
    Interleaved,
    Load,
    Round,
    _most_likely,
    _next,
    _static_cache,
    graph_refusal,
)

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SECONDS = st.floats(1e-4, 10)


def model_of(family, **changes):
    config, architecture = FAMILIES[family]
    torch.manual_seed(0)
    model = architecture(config(**SIZES | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a norm or a bias that is left out
            parameter.data.normal_(1 if "norm" in name else 0, 0.3)
    return model


def logits_of(model, step):
    """Logits of five tokens after a prompt of nine: by the model's forward and by the lean step."""
    tokens = torch.randint(0, 128, (2, 14), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.inference_mode():
        cache = _static_cache(model.config, 2, 14)
        model(input_ids=tokens[:, :9], past_key_values=cache, use_cache=True)
        for position in range(9, 14):
            token = tokens[:, position : position + 1]
            if step is None:
                found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)
            else:
                found.append(step(token, position, cache))
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_the_lean_step_yields_the_logits_of_the_model(family, kv_heads):
    model = model_of(family, num_key_value_heads=kv_heads)
    torch.testing.assert_close(logits_of(model, lean_step(model, 14)), logits_of(model, None), rtol=1e-4, atol=1e-5)


def test_a_lean_step_with_another_norm_is_seen():
    model = model_of("qwen3")
    norms = [layer.self_attn.k_norm for layer in model.model.layers]
    for layer, norm in zip(model.model.layers, norms, strict=True):
        layer.self_attn.k_norm = copy.deepcopy(norm)
        layer.self_attn.k_norm.weight.data.mul_(torch.linspace(0.5, 2, norm.weight.numel()))
    step = lean_step(model, 14)
    for layer, norm in zip(model.model.layers, norms, strict=True):
        layer.self_attn.k_norm = norm
    assert not torch.allclose(logits_of(model, step), logits_of(model, None), rtol=1e-4, atol=1e-5)


def test_a_model_with_hooks_or_of_another_architecture_keeps_its_own_forward():
    model = model_of("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert lean_step(model, 14) is None
    assert lean_step(torch.nn.Linear(2, 2), 14) is None


def test_a_sliding_window_shorter_than_the_text_does_not_fit():
    model = model_of("mistral", sliding_window=8)
    cache = _static_cache(model.config, 1, 14)
    with torch.inference_mode():
        _next(model, torch.zeros(1, 4, dtype=torch.long), cache)
    assert not fits(cache, 14)
    assert fits(cache, 8)


def test_a_round_counts_what_was_generated_and_what_the_cache_holds():
    model = model_of("llama")
    done = Decoder(model, Load(batch_size=2, prompt_tokens=5, new_tokens=7)).run()
    assert done.tokens == 14
    assert len(done.steps_s) == 6
    assert done.kv_bytes == 2 * 3 * 2 * 4 * 8 * (5 + 7 - 1) * 4  # keys and values, layers, batch, heads, size, tokens
    assert done.total_s == pytest.approx(done.ttft_s + sum(done.steps_s))
    assert done.prefill_s <= done.ttft_s


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=3, max_size=20), st.floats(0, 10))
def test_a_round_without_its_waits_is_what_it_did(parts, between):
    (setup, setup_waits), (prefill, prefill_waits), *steps = parts
    ttft = setup + setup_waits + prefill + prefill_waits + between
    one = Round(
        ttft_s=ttft, prefill_s=prefill + prefill_waits, steps_s=tuple(did + waited for did, waited in steps),
        total_s=ttft + sum(map(sum, steps)), kv_bytes=1, tokens=2, waits_s=tuple(waited for _, waited in parts),
    )  # fmt: skip

    done = one.running()

    assert done.prefill_s == pytest.approx(prefill)
    assert done.ttft_s == pytest.approx(setup + prefill + between)
    assert done.steps_s == pytest.approx([did for did, _ in steps])
    assert done.total_s == pytest.approx(done.ttft_s + sum(done.steps_s))
    assert done == done.running()


def test_a_decoder_tells_the_waits_of_every_part_where_the_system_does(monkeypatch):
    decoder, before = Decoder(model_of("llama"), Load(prompt_tokens=4, new_tokens=5)), torch.get_num_threads()
    with moments() as moment:
        counted = moment().waited_s is not None
    try:
        torch.set_num_threads(1)
        alone = decoder.run(0)
        torch.set_num_threads(2)
        several = decoder.run(0)
        monkeypatch.setattr(cpu_wait, "_COUNTED", "/nowhere")
        torch.set_num_threads(1)
        uncounted = decoder.run(0)
    finally:
        torch.set_num_threads(before)

    assert 4 == len(alone.steps_s) and (2 + 4) * counted == len(alone.waits_s)
    assert all(0 <= waited <= took for waited, took in zip(alone.waits_s[2:], alone.steps_s, strict=False))
    assert () == several.waits_s == uncounted.waits_s


def test_rounds_of_several_decoders_alternate_and_have_equal_prompts():
    order = []

    class Recorded(Decoder):
        def run(self, index=0):
            order.append((self, index))
            return super().run(index)

    pair = Interleaved([Recorded(model_of("llama"), Load(prompt_tokens=3, new_tokens=2)) for _ in range(2)])
    pair.run(3)
    assert order == [(decoder, index) for index in range(3) for decoder in pair.decoders]


def test_a_load_beyond_the_positions_of_the_model_is_refused():
    with pytest.raises(OptionError, match="exceed the 64 positions"):
        Decoder(model_of("llama"), Load(prompt_tokens=60, new_tokens=5))


def test_graphs_are_refused_without_cuda():
    with pytest.raises(OptionError, match="graph on cuda"):
        Decoder(model_of("llama"), Load(prompt_tokens=4, new_tokens=4), mode="graph")


@pytest.mark.parametrize(("threshold", "refused"), [(6.0, True), (None, False)])
def test_a_kernel_that_waits_for_the_device_is_refused_a_graph(threshold, refused):
    """Asked for CUDA, where bitsandbytes takes the layer; nothing runs there."""
    pytest.importorskip("bitsandbytes")
    from compression.numeric.grids import Int8RowGrid
    from compression.numeric.normal_float import NF4Grid

    grid = Int8RowGrid() if refused else NF4Grid()
    layer = pack_linear(torch.randn(64, 64).bfloat16(), None, grid, threshold=threshold)

    why = graph_refusal(torch.nn.Sequential(layer), "cuda")

    assert (why is not None) == refused
    assert why is None or "bitsandbytes-int8" in why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_token_taken_is_the_first_of_the_most_likely_after_the_last_position(dtype):
    logits = torch.randn(3, 4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, -1, [7, 400]] = 9.0

    with torch.inference_mode():
        taken = _most_likely(logits)

    assert (3, 1) == tuple(taken.shape)
    assert torch.int64 == taken.dtype
    assert 7 == taken[0]
    for row, token in zip(logits[1:, -1].tolist(), taken[1:, 0].tolist(), strict=True):
        assert token == row.index(max(row))
