"""Mixtures of experts under calibration: every expert is fitted to the tokens that are routed to it, as a dense layer
to those that reach it; one that too few tokens reach is fitted to all of them, and the report says so."""

import functools

import pytest
import torch
from families import SHAPES

import compression
from compression.architectures import random_shapes
from compression.architectures.decoder import decoder_blocks
from compression.calibration.capture import Inputs, Seen
from compression.calibration.observers import Sample

MIXTURES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM"]


@pytest.fixture(autouse=True, scope="module")
def family_shapes():
    with pytest.MonkeyPatch.context() as patch:
        for name in MIXTURES:
            patch.setitem(random_shapes.SHAPES, name, SHAPES[name] | {"mlp_only_layers": [], "num_hidden_layers": 1})
        yield


@functools.cache
def base_of(family):
    return compression.open_base(f"random:{family}")


def ids_of(samples, length):
    return torch.randint(64, (samples, length), generator=torch.Generator().manual_seed(3))


def block_of(family):
    return decoder_blocks(base_of(family).model)[0]


def inputs_by_hand(block, model, ids):
    """What reaches each expert, and each down projection, token by token as the router says."""
    moe, seen = block.module.mlp, {}
    inputs = Inputs.of_first_block(model, ids)
    for states in inputs.hidden:
        caught = []
        handle = moe.register_forward_pre_hook(lambda _, x, caught=caught: caught.append(x[0]))
        with torch.no_grad():
            block.module(states, **inputs.arguments[0])
            handle.remove()
            tokens = caught[0].flatten(0, -2)
            _, _, chosen = moe.gate(tokens)
            for token, experts in zip(tokens, chosen.tolist(), strict=True):
                for number in experts:
                    expert = moe.experts[number]
                    inner = expert.act_fn(expert.gate_proj(token)) * expert.up_proj(token)
                    seen.setdefault((number, "gate_proj"), []).append(token)
                    seen.setdefault((number, "down_proj"), []).append(inner)
    return {key: torch.stack(rows) for key, rows in seen.items()}


@pytest.mark.parametrize("family", MIXTURES)
def test_gptq_of_a_mixture_is_dense_gptq_expert_by_expert(family):
    ids, recipe = ids_of(16, 32), "gptq(group_size=8,samples=16,sequence_length=32)"
    base, (step,), seen = base_of(family), compression.Recipe.parse(recipe).steps, {}
    gptq = step.method

    result = compression.compress(base, recipe, calibration=ids)

    for (number, what), x in inputs_by_hand(block_of(family), base.model, ids).items():
        seen[number, what] = 2 / len(x) * x.T @ x
    experts, after = block_of(family).module.mlp.experts, decoder_blocks(result.model)[0].module.mlp.experts
    for number, expert in enumerate(experts):
        both = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
        for names, weight, what in (
            (("gate_proj", "up_proj"), both, "gate_proj"), (("down_proj",), expert.down_proj.weight, "down_proj")
        ):  # fmt: skip
            rounded = gptq.round(weight.detach().float(), seen[number, what], weight.dtype).decode(gptq.grid())
            found = torch.cat([after[number].get_submodule(name).dequantize() for name in names])
            same = (found - rounded).abs() <= 1e-5 * rounded.abs().max()
            assert same.float().mean() > 0.98, (number, what)  # sums in another order tip a code here and there


@pytest.mark.parametrize("family", MIXTURES)
def test_the_tokens_of_every_expert_are_counted_and_reach_its_observers(family):
    ids, block = ids_of(16, 32), block_of(family)
    seen = Seen(block, Inputs.of_first_block(base_of(family).model, ids))

    observed = seen.inputs(Sample)

    by_hand = inputs_by_hand(block, base_of(family).model, ids)
    for number in range(4):
        expected = by_hand[number, "gate_proj"]
        assert len(expected) == seen.routed.counts[f"mlp.experts.{number}"] > 32
        for part in ("gate_proj", "up_proj"):
            torch.testing.assert_close(observed[block.full(f"mlp.experts.{number}.{part}")], expected)
        down = observed[block.full(f"mlp.experts.{number}.down_proj")]
        torch.testing.assert_close(down, by_hand[number, "down_proj"], rtol=1e-4, atol=1e-5)
    assert 16 * 32 == seen.routed.total and [] == seen.routed.starved


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_too_few_tokens_reach_sees_each_token_once(family):
    ids, block = ids_of(1, 4), block_of(family)
    seen = Seen(block, Inputs.of_first_block(base_of(family).model, ids))

    observed = seen.inputs(Sample)

    counts = [seen.routed.counts[f"mlp.experts.{number}"] for number in range(4)]
    assert 4 == seen.routed.total and min(counts) < 4
    whole = observed[block.full("self_attn.q_proj")]
    for number, count in enumerate(counts):
        mine = observed[block.full(f"mlp.experts.{number}.gate_proj")]
        assert len(whole) == len(mine) == 4 and len(mine.unique(dim=0)) == 4, count
        assert (count < 4) == (f"mlp.experts.{number}" in seen.routed.starved)


@pytest.mark.parametrize("text", ["gptq(group_size=8,{})", "awq(group_size=8,n_grid=3,{})", "sparsegpt({})",
                                    "wanda({})", "smoothquant({})"])  # fmt: skip
def test_an_expert_without_tokens_leaves_a_sentence_and_no_nan(text):
    base, ids = base_of("Qwen3MoeForCausalLM"), ids_of(1, 2)

    result = compression.compress(base, text.format("samples=1,sequence_length=2"), calibration=ids)

    said = {entry.name: entry.detail for entry in result.report if ".experts." in entry.name}
    unreached = [detail for detail in said.values() if ", 0 of 2 calibration tokens routed to it" in detail]
    assert len(said) == 12 and unreached
    assert all("fewer than its 32 inputs: fitted to all of them" in detail for detail in unreached)
    with torch.no_grad():
        assert result.model(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_stay_as_they_are_unless_their_input_is_scaled(family):
    base, ids, path = base_of(family), ids_of(4, 16), "model.layers.0.mlp.gate"
    router, some = base.model.get_submodule(path).weight, "samples=4,sequence_length=16"

    kept, scaled = (compression.compress(base, recipe, calibration=ids).model
                    for recipe in (f"gptq(group_size=8,{some})", f"smoothquant({some})"))  # fmt: skip

    assert torch.equal(router, kept.get_submodule(path).weight)
    norm = "model.layers.0.post_attention_layernorm"
    before, after = (model.get_submodule(norm).weight * model.get_submodule(path).weight
                     for model in (base.model, scaled))  # fmt: skip
    assert not torch.equal(router, scaled.get_submodule(path).weight)
    torch.testing.assert_close(after, before)
