"""Decoders cut smaller: which parts stay, the shapes foreseen are those that come, and no layer goes unsaid."""

import pytest
from cut_models import CUTS, FAMILIES, NF4, compressed, folders, opened, skeleton  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from compression import LayerError, Recipe
from compression.architectures.decoder import decoder_blocks
from compression.checkpoints.size import stored_bytes
from compression.engine.shapes import outcome
from compression.methods.pruning.structured.depth_and_heads import layers_by_position
from compression.methods.pruning.structured.mlp_neurons import P

# --- Which parts stay -------------------------------------------------------------------------------------------------


def test_of_32_layers_the_paper_keeps_the_first_8_and_the_last_12():
    assert [*range(8), *range(20, 32)] == layers_by_position(20, 32)
    assert [0, 1, 5, 6, 7] == layers_by_position(5, 8)
    assert list(range(7)) == layers_by_position(7, 7)


def test_mistral_7b_is_left_with_20_layers_and_6_of_8_kv_heads_of_its_shapes():
    model = outcome(Recipe.parse("structured"), skeleton("mistral-7b"))

    config, attention = model.config, model.model.layers[19].self_attn
    assert (20, 24, 6, 128) == (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    shapes = {name: tuple(getattr(attention, f"{name}_proj").weight.shape) for name in "qkvo"}
    assert {"q": (3072, 4096), "k": (768, 4096), "v": (768, 4096), "o": (4096, 3072)} == shapes
    assert list(range(20)) == [layer.self_attn.layer_idx for layer in model.model.layers]


@pytest.mark.parametrize(("text", "left"), [("p(round_to=1)", 7706), ("p", 7680), ("p(ratio=0.5)", 5504)])
def test_of_11008_neurons_the_paper_keeps_7706_and_the_default_a_multiple_of_128(text, left):
    model = outcome(Recipe.parse(text), skeleton("qwen2.5-3b"))

    mlp = model.model.layers[35].mlp
    assert left == model.config.intermediate_size
    assert [(left, 2048), (left, 2048), (2048, left)] == [
        tuple(layer.weight.shape) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 200), st.integers(1, 4000))
def test_what_stays_of_neurons_is_the_nearest_allowed_number(ratio, round_to, neurons):
    exact = neurons - int(ratio * neurons + 1e-9)
    try:
        kept = P(ratio=ratio, round_to=round_to).keep(neurons)
    except LayerError:
        allowed = range(round_to, neurons, round_to)
        assert not allowed or 2 * exact < round_to or exact < neurons < exact + round_to / 2 + round_to
        return

    assert (kept == neurons == exact) or (kept % round_to == 0 and 0 < kept < neurons)
    if round_to == 1:
        assert exact == kept
    elif kept < neurons:
        assert abs(kept - exact) <= round_to / 2 or kept == neurons // round_to * round_to


# --- The report -------------------------------------------------------------------------------------------------------


def test_every_layer_of_the_base_is_reported_with_what_became_of_it():
    base = opened()
    result = compressed("MistralForCausalLM", CUTS[0])

    said = {entry.name: (entry.outcome, entry.detail) for entry in result.report}
    linears = [name for block in decoder_blocks(base.model) for name, _ in block.linears()]
    assert linears == [entry.name for entry in result.report][: len(linears)]
    assert ("removed", "structured(keep_layers=3): layer 1 of 5 is none of the 3 that stay") == said[
        "model.layers.1.mlp.up_proj"
    ]
    heads = "structured(keep_layers=3): KV heads 0, 1, 2 of 4 stay, 6 of 8 query heads"
    assert ("replaced", heads) == said["model.layers.0.self_attn.o_proj"]
    assert ("replaced", f"{heads}; now model.layers.1.self_attn.k_proj") == said["model.layers.3.self_attn.k_proj"]
    assert ("kept", "the recipe leaves this layer alone; now model.layers.2.mlp.up_proj") == said[
        "model.layers.4.mlp.up_proj"
    ]
    neurons = {e.name: e.detail for e in compressed("MistralForCausalLM", CUTS[2]).report}
    assert "p(round_to=32): 64 of 96 neurons stay" == neurons["model.layers.4.mlp.down_proj"]


@pytest.mark.parametrize(
    ("family", "text"),
    [(FAMILIES[0], CUTS[0]), *((FAMILIES[1], text) for text in (f"{CUTS[0]}-{NF4}", CUTS[1], "p(round_to=32)"))],
)
def test_the_shapes_foreseen_are_those_that_come(family, text):
    """What `--plan` counts, and what later steps are checked against."""
    base = opened(family)

    foreseen = outcome(Recipe.parse(text), base.model)

    result = compressed(family, text)
    assert type(result.model) is type(foreseen)
    assert stored_bytes(result.model) == stored_bytes(foreseen)
    assert {n: t.shape for n, t in result.model.state_dict().items()} == {
        n: t.shape for n, t in foreseen.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in foreseen.state_dict().values())
    assert not any(tensor.is_meta for tensor in base.model.state_dict().values())
