"""What says which layers, heads and neurons matter, against slow references."""

import pytest
import torch
import torch.nn.functional as F
from cut_models import IDS, LAYERS, compressed, folders, logits, opened  # noqa: F401

from compression.architectures.decoder import decoder_blocks
from compression.calibration import importance
from compression.calibration.capture import Inputs


@torch.no_grad()
def test_similarity_is_the_mean_cosine_of_what_enters_and_leaves_a_layer():
    model, seen = opened().model, []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, arguments, output: seen.append((arguments[0], output)))
    for sample in IDS:
        model(sample[None], use_cache=False)
    expected = [
        torch.stack([
            (x * y).sum() / x.norm() / y.norm()
            for before, after in seen[i::5]
            for x, y in zip(before.squeeze(0), after.squeeze(0), strict=True)
        ]).mean()
        for i in range(5)
    ]  # fmt: skip

    assert pytest.approx([float(x) for x in expected], rel=1e-5) == importance.layer_similarity(opened().model, IDS)


@torch.no_grad()
def test_perplexity_without_a_layer_is_that_of_the_model_without_it():
    expected = []
    for i in range(5):
        model = opened().model
        del model.model.layers[i]
        model.config.num_hidden_layers = 4
        losses = [F.cross_entropy(logits(model)[j, :-1], sample[1:]) for j, sample in enumerate(IDS)]
        expected.append(float(torch.stack(losses).mean().exp()))

    found = importance.perplexity_without(opened().model, IDS)

    assert pytest.approx(expected, rel=1e-4) == found
    result = compressed("MistralForCausalLM", f"{LAYERS}4,choose=perplexity)")
    (gone,) = {entry.name.split(".")[2] for entry in result.report if entry.outcome == "removed"}
    assert expected.index(min(expected)) == int(gone)


@torch.no_grad()
def test_the_contribution_of_a_head_is_the_norm_of_what_its_columns_add():
    model = opened().model
    block, seen = decoder_blocks(model)[0], []
    block.module.self_attn.o_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    logits(model)
    expected = []
    for head in range(4):
        columns = slice(32 * head, 32 * head + 32)
        weight = block.module.self_attn.o_proj.weight[:, columns]
        expected.append(float(sum((weight @ x).square().sum() for x in seen[0][..., columns].reshape(-1, 32)).sqrt()))

    fresh = opened().model
    found = importance.head_contribution(decoder_blocks(fresh)[0], Inputs.of_first_block(fresh, IDS))

    assert pytest.approx(expected, rel=1e-4) == found.tolist()


@torch.no_grad()
def test_the_neurons_that_stay_are_those_of_the_papers_score_on_the_model_as_it_was():
    model, hidden = opened().model, []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[0]))
    logits(model)

    cut = compressed("MistralForCausalLM", "p(ratio=0.3,round_to=1)").model

    for i, layer in enumerate(model.model.layers):
        weight = [
            float(layer.mlp.gate_proj.weight[n].abs().sum() + layer.mlp.up_proj.weight[n].abs().sum())
            for n in range(96)
        ]
        activation = [float(hidden[i][..., n].abs().mean()) for n in range(96)]
        score = [0.5 * w / max(weight) + 0.5 * a / max(activation) for w, a in zip(weight, activation, strict=True)]
        gone = sorted(range(96), key=score.__getitem__)[: int(0.3 * 96)]
        kept = [n for n in range(96) if n not in gone]
        assert torch.equal(layer.mlp.gate_proj.weight[kept], cut.model.layers[i].mlp.gate_proj.weight)
        assert torch.equal(layer.mlp.up_proj.weight[kept], cut.model.layers[i].mlp.up_proj.weight)
        assert torch.equal(layer.mlp.down_proj.weight[:, kept], cut.model.layers[i].mlp.down_proj.weight)
