"""Decoders cut smaller: what is kept computes what it computed."""

import pytest
import torch
from cut_models import FAMILIES, HEADS, IDS, LAYERS, NF4, assert_close, compressed, folders, logits, opened, without  # noqa: F401

import compression
from compression.architectures.cuts import keep_heads
from compression.architectures.decoder import decoder_blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_whole_one_without_the_parts_that_went(family):
    base = opened(family)
    cut = compressed(family, "structured(keep_layers=3)").model

    assert_close(logits(cut), logits(without(base.model, layers=[1, 2], heads=[3])))
    for other in ({}, {"layers": [1, 2]}, {"heads": [3]}, {"layers": [2, 3], "heads": [3]}):  # it matters what went
        assert (logits(cut) - logits(without(base.model, **other))).abs().max() > 0.05


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [3]])
def test_query_heads_go_with_the_head_of_keys_that_they_attend_to(kept):
    base, model = opened("Qwen3ForCausalLM"), opened("Qwen3ForCausalLM").model
    for block in decoder_blocks(model):
        keep_heads(block, torch.tensor(kept))

    assert_close(logits(model), logits(without(base.model, heads=[h for h in range(4) if h not in kept])))


def test_heads_cut_as_the_paper_lists_them_cannot_run():
    """Listing 6 of [E]: rows of k_proj and v_proj alone; a negative control."""
    model = opened().model
    attention = model.model.layers[0].self_attn
    for linear in (attention.k_proj, attention.v_proj):
        linear.weight = torch.nn.Parameter(linear.weight[: 3 * attention.head_dim])

    with pytest.raises(RuntimeError):
        logits(model)


@pytest.mark.parametrize("family", FAMILIES[1:3])
def test_neurons_of_zeros_are_the_ones_that_go_and_no_logit_changes(family):
    dead = [3, 4, 50, 95]

    def edit(model):
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data[dead] = 0

    base = opened(family, edit)
    result = compression.compress(base, f"p(ratio={4.5 / 96},round_to=1)", calibration=IDS)

    assert 92 == result.model.config.intermediate_size
    assert_close(logits(result.model), logits(base.model))
    kept = [i for i in range(96) if i not in dead]
    down = [model.model.layers[4].mlp.down_proj.weight for model in (base.model, result.model)]
    assert torch.equal(down[0][:, kept], down[1])


def test_neurons_that_are_not_zero_are_missed():
    base = opened()

    result = compression.compress(base, f"p(ratio={4.5 / 96},round_to=1)", calibration=IDS)

    assert (logits(result.model) - logits(base.model)).abs().max() > 0.01
    assert (92, 96) == (result.model.config.intermediate_size, base.model.config.intermediate_size)


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_a_head_that_o_proj_does_not_read_is_the_one_that_goes_and_no_logit_changes(family):
    base = opened(family)
    base.model = without(base.model, heads=[1])

    result = compression.compress(base, f"{HEADS},heads=importance)", calibration=IDS)

    assert (6, 3) == (result.model.config.num_attention_heads, result.model.config.num_key_value_heads)
    assert_close(logits(result.model), logits(base.model))
    assert (logits(compressed(family, f"{HEADS})").model) - logits(base.model)).abs().max() > 0.05


def test_a_layer_that_is_the_identity_is_the_one_that_goes_and_no_bit_of_a_logit_changes():
    base = opened()
    base.model = without(base.model, layers=[2])

    result = compression.compress(base, f"{LAYERS}4,choose=similarity)", calibration=IDS)

    removed = {entry.name for entry in result.report if entry.outcome == "removed"}
    assert {name for name, _ in decoder_blocks(base.model)[2].linears()} == removed
    assert torch.equal(logits(base.model), logits(result.model))
    for entry in result.report:
        if entry.outcome == "removed":
            assert "layer 2 of 5 is none of the 4 that stay, similarity 1.0000" in entry.detail


EVERYTHING = (
    "structured(keep_layers=1.0,keep_kv_heads=1.0)",
    "structured(keep_layers=5,keep_kv_heads=4)",
    "p(ratio=0)",
    f"{NF4}-p(ratio=0)",
    f"{NF4}-structured(keep_layers=none,keep_kv_heads=none)",
)


@pytest.mark.parametrize("text", EVERYTHING)
def test_keeping_everything_is_the_identity_bit_for_bit(text):
    base = opened()
    before = base.model if "nf4" not in text else compressed("MistralForCausalLM", NF4).model

    result = compression.compress(base, text)

    assert torch.equal(logits(before), logits(result.model))
    after = result.model.state_dict()
    assert before.state_dict().keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())
    assert "nf4" in text or all(entry.outcome == "kept" for entry in result.report)
