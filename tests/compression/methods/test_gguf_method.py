"""`gguf`: the bytes of llama.cpp, its mix of types by block, and what it stores where blocks do not tile a row."""

import pytest
import torch
from tiny_models import COMMON, TINY, linears

import compression
from compression.engine.plan import plan
from compression.methods.quantization.weight_only.gguf import takes_more_bits
from compression.numeric import ggml

LAYERS = 9  # with rows that super-blocks tile
WIDE = COMMON | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}


@pytest.fixture
def base(tiny_shapes, monkeypatch):
    from compression.architectures.random_shapes import SHAPES

    monkeypatch.setitem(SHAPES, "tiny-wide", TINY["tiny-llama-fp32"] | WIDE)
    return compression.open_base("random:tiny-wide")


def types(model):
    return {name: layer.weight_part.type for name, layer in linears(model).items()}


def test_more_bits_go_to_the_first_and_last_eighth_and_to_every_third_block_between():
    """Counted by hand from the rule of llama.cpp, for 32 blocks."""
    expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]

    assert expected == [number for number in range(32) if takes_more_bits(number, 32)]


def test_the_mix_stores_values_and_down_projections_of_these_blocks_in_q6_k(base):
    result = compression.compress(base, "gguf")

    larger = {
        f"model.layers.{number}.{path}"
        for number in range(LAYERS)
        for path in ("self_attn.v_proj", "mlp.down_proj")
        if takes_more_bits(number, LAYERS)
    }
    assert {name: "Q6_K" if name in larger else "Q4_K" for name in linears(base.model)} == types(result.model)
    assert plan(base, "gguf").stored_bytes == result.stored_bytes
    assert types(plan(base, "gguf").outcome) == types(result.model)


def test_block_by_block_the_mix_is_the_same(base, tmp_path):
    whole = compression.compress(base, "gguf")

    streamed = compression.compress_to(tmp_path / "a", base.source, "gguf")

    again = compression.load(tmp_path / "a")
    assert types(whole.model) == types(again.model)
    assert streamed is not None
    state = again.model.state_dict()
    assert [] == [name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, state[name])]


@pytest.mark.usefixtures("tiny_shapes")
def test_a_fallback_is_named_layer_by_layer():
    result = compression.compress(compression.open_base("random:tiny-llama"), "gguf(type=q6_k)")

    told = {entry.name: entry.detail for entry in result.report}
    assert "gguf(type=q6_k), ggml Q6_K, kernel dequantize" == told["model.layers.0.mlp.down_proj"]
    assert told["model.layers.1.self_attn.q_proj"] == (
        "gguf(type=q6_k), ggml Q8_0, kernel dequantize; 128 inputs are no whole number of blocks of Q6_K"
    )


@pytest.mark.usefixtures("tiny_shapes")
def test_a_layer_may_have_a_type_of_its_own():
    recipe = 'gguf(type=q4_0,layers={"*.down_proj":{"type":"q8_0"},"*.q_proj":null})'
    base = compression.open_base("random:tiny-llama")

    found = linears(compression.compress(base, recipe).model)

    assert "Q8_0" == found["model.layers.0.mlp.down_proj"].weight_part.type
    assert isinstance(found["model.layers.0.self_attn.q_proj"], torch.nn.Linear)
    weight = base.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(ggml.encode(weight, "Q4_0"), found["model.layers.0.mlp.up_proj"].weight_part.raw)
