"""QuaRot and SpinQuant: their limits, layers by hand, what is refused; and outliers that are planted and won back."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from planted_outliers import in_principal_basis

import compression
from compression import LayerError, RecipeError
from compression.architectures.edits import fold_norms
from compression.architectures.rotations import merged
from compression.calibration.text import open_calibration
from compression.numeric import hadamard

IDS = torch.randint(48, (6, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=6,sequence_length=24"


@pytest.fixture
def base(folder):
    return compression.open_base(str(folder))


def states(result):
    return result.model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def folded(base):
    """The base with folded gains and an untied head."""
    return replace(base, model=fold_norms(copy.deepcopy(base.model)).model)


# --- Limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", f"activations=static,{SMALL}", f"rounding=gptq,{SMALL}"])
def test_with_the_identity_it_is_rounding_of_the_model_with_folded_gains_and_an_untied_head(base, more):
    found = compression.compress(
        base,
        f"quarot(rotation=identity,weight_scales=largest,bits=8,activation_bits=8,clip=1.0{more and ','}{more})",
        calibration=IDS,
    )

    plain = compression.compress(folded(base), f"int8({more})", calibration=IDS)
    assert same(states(plain), states(found))


def test_without_steps_spinquant_is_quarot(base):
    for more in ("", "rounding=gptq,"):
        one = compression.compress(base, f"quarot({more}{SMALL})", calibration=IDS)
        other = compression.compress(base, f"spinquant(steps=0,{more}{SMALL})", calibration=IDS)
        assert same(states(one), states(other))


def test_another_seed_is_another_rotation_and_steps_are_another(base):
    results = [compression.compress(base, f"spinquant(steps={steps},{SMALL})", calibration=IDS, seed=seed)
               for steps, seed in ((0, 0), (0, 1), (2, 0))]  # fmt: skip
    codes = [result.model.model.layers[0].mlp.up_proj.weight_part.codes for result in results]

    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_layers_are_rotated_then_rounded_by_hand(base):
    result = compression.compress(base, "quarot(clip=0.8,weight_scales=largest)")
    decoder = fold_norms(copy.deepcopy(base.model))
    sizes = [block.head_size for block in decoder.blocks]
    for edit in merged(decoder, *hadamard.random_rotations(decoder.width, sizes, 0)):
        edit.apply(decoder)

    for path in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer, weight = result.model.model.layers[1].get_submodule(path), decoder.blocks[1].layer(path).weight
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        if path == "mlp.down_proj":
            matrix = hadamard.construct(weight.shape[1]).float() / weight.shape[1] ** 0.5
            weight, mixed = weight @ matrix, x @ matrix
        else:
            mixed = x
        step, scale = mixed.abs().amax(-1, keepdim=True) * 0.8 / 7, weight.abs().amax(-1, keepdim=True) / 7
        q = (mixed / step).round().clamp(-7, 7) * step
        expected = q @ ((weight / scale).round() * scale).T
        assert float((layer(x) - expected).norm() / expected.norm()) < 0.05, path  # but for values between two steps


def test_no_online_transform_is_a_layer_without(base):
    layer = compression.compress(base, "quarot(online=false)").model.model.layers[0].mlp.down_proj

    assert "token_range" == layer.input_part.kind


# --- What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("quarot(clip=0)", "must be above 0 and at most 1"),
        ("quarot(clip=1.1)", "must be above 0 and at most 1"),
        ("quarot(bits=5)", "bits"),
        ("quarot(activation_bits=5)", "activation_bits"),
        ("quarot(damp=2.0)", "allowed are 0 to 1"),
        ("quarot(samples=0)", "must be at least 1"),
        ("spinquant(steps=-1)", "must be 0 or more"),
        ("spinquant(learning_rate=0)", "must be above 0"),
        ("spinquant(activation_bits=16,rounding=gptq)", "there is nothing to learn"),
        ("magnitude-quarot", "would lose the zeros"),
    ],
)
def test_parameters_that_cannot_be_are_refused(folder, steps, words):
    with pytest.raises(RecipeError, match=words):
        compression.compress(str(folder), steps, calibration=IDS)


def test_what_cannot_be_rotated_is_refused_in_words(folder):
    with pytest.raises(LayerError, match="passes a matrix beside this block already"):
        compression.compress(str(folder), f"slicegpt(share=0.0,{SMALL})-quarot", calibration=IDS)
    with pytest.raises(RecipeError, match="works on the whole model at once"):
        compression.compress_to(folder / "streamed", str(folder), "quarot")
    with pytest.raises(RecipeError, match="it takes no settings per layer"):
        compression.Recipe.parse('quarot(layers={"*":null})')


def test_sizes_that_do_not_factor_are_done_in_blocks_and_said_or_refused(odd_shape):
    result = compression.compress(odd_shape(hidden_size=46 * 4, intermediate_size=50), "quarot")

    [words] = [entry.detail for entry in result.report if entry.name == "residual stream"]
    assert "turned in blocks of 8" in words
    assert "a Hadamard transform of 2 inputs" in result.report[-4].detail
    with pytest.raises(LayerError, match=r"layers.0.mlp.down_proj: what it reads has 51 channels, an odd number"):
        compression.compress(odd_shape(hidden_size=64, intermediate_size=51), "quarot")
    compression.compress(odd_shape(hidden_size=64, intermediate_size=51), "quarot(online=false)")


@pytest.fixture
def odd_shape(monkeypatch):
    from compression.architectures import random_shapes

    def make(**sizes):
        shape = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 48, "head_dim": 16,
        }  # fmt: skip
        monkeypatch.setitem(random_shapes.SHAPES, "odd", shape | sizes)
        return "random:odd"

    return make


# --- Planted outliers -------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_quarot_wins_back_what_the_principal_basis_costs():
    """On the reference without the outliers that it was given: its stream is turned at random first."""
    base = compression.open_base("reference")
    text = open_calibration(None, base.source).tokens(base.tokenizer, samples=20, length=256, seed=0, vocabulary=1024)
    clean = fold_norms(copy.deepcopy(base.model).float())
    sizes = [block.head_size for block in clean.blocks]
    for edit in merged(clean, *hadamard.random_rotations(clean.width, sizes, 3)):
        edit.apply(clean)
    planted = copy.deepcopy(clean.model)
    in_principal_basis(planted, text[:12])

    def loss(model, recipe):
        changed = compression.compress(replace(base, model=model), recipe).model
        with torch.no_grad():
            logits = changed(text[12:], use_cache=False).logits.float()
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[12:, 1:].flatten()))

    plain = "quarot(rotation=identity,clip=1.0)"
    exact, before, after = loss(clean.model, "fp16"), loss(clean.model, plain), loss(planted, plain)
    again = loss(planted, "quarot(clip=1.0)")

    print(
        f"W4A4, nat per token over fp32: {before - exact:.4f}, planted {after - exact:.4f}, quarot {again - exact:.4f}"
    )
    assert math.isclose(exact, loss(planted, "fp16"), rel_tol=1e-4)
    assert after - before > 0.2  # the plant costs something
    assert again - exact <= 0.2 * (after - exact)
