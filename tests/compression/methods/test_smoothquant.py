"""SmoothQuant against the paper by hand: scales, steps and codes of a block; what reaches the next; artefacts."""

import pytest
import torch
from checkpoints import logits

import compression
from compression import RecipeError
from compression.architectures.decoder import decoder_blocks
from compression.calibration.capture import Inputs
from compression.layers.kernels.integer_products import exact_here

IDS = torch.randint(48, (6, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=6,sequence_length=24"


@pytest.fixture
def base(folder):
    """A base some of whose channels are large."""
    base = compression.open_base(str(folder))
    spread = torch.randn(32, generator=torch.Generator().manual_seed(3)).mul(1.5).exp()
    for layer in base.model.model.layers:
        layer.input_layernorm.weight = torch.nn.Parameter(spread, requires_grad=False)
        layer.post_attention_layernorm.weight = torch.nn.Parameter(spread.flip(0), requires_grad=False)
    return base


def inputs_of(base):
    block, seen = decoder_blocks(base.model)[0], {}
    Inputs.of_first_block(base.model, IDS).observe(block, lambda stack, x: seen.setdefault(stack.site, []).append(x[0]))
    return block, {site: torch.cat(each) for site, each in seen.items()}


@pytest.mark.parametrize("smooth", ["all", "norms"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scales_steps_and_codes_are_those_of_the_paper(base, alpha, smooth):
    recipe = f"smoothquant(alpha={alpha},activations=static,smooth={smooth},{SMALL})"
    result = compression.compress(base, recipe, calibration=IDS)

    block, seen = inputs_of(base)
    after, weights, steps = result.model.model.layers[0], {}, {}
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        weights[path] = block.layer(path).weight.clone()
    for site, x in reversed(seen.items()):
        scales = torch.ones(x.shape[1])
        for j in range(x.shape[1]) if smooth == "all" or site.of == "norm" else ():
            # o_proj: 4 heads of 8, of which each two read the same head of values
            same = [j] if site.of != "values" else [16 * (j // 16) + j % 8, 16 * (j // 16) + 8 + j % 8]
            largest = max(float(weights[path][:, k].abs().max()) for path in site.readers for k in same)
            scales[j] = max(float(x[:, k].abs().max()) for k in same) ** alpha / largest ** (1 - alpha)
        if site.of == "norm":
            norm = block.layer(site.producer).weight
            torch.testing.assert_close(after.get_submodule(site.producer).weight, norm / scales)
        else:
            own = scales.view(2, 2, 8)[:, 0].flatten() if site.of == "values" else scales
            weights[site.producer] /= own[:, None]
        for path in site.readers:
            weights[path] = weights[path] * scales
            steps[path] = float((x / scales).abs().max() / 127)
    for path, weight in weights.items():
        layer, step = after.get_submodule(path), weight.abs().amax(-1, keepdim=True) / 127
        moved = (layer.weight - (weight / step).round() * step).abs() / step
        assert float((moved > 1e-3).float().mean()) < 2e-3, path  # but for values between two steps
        assert pytest.approx(steps[path], rel=1e-5) == float(layer.input_part.step)


def test_activations_have_a_step_to_a_token(base):
    result = compression.compress(base, f"smoothquant({SMALL})", calibration=IDS)
    layer = result.model.model.layers[1].mlp.up_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))

    step = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(layer(x), (x / step).round() * step @ layer.weight.t(), rtol=1e-4, atol=1e-5)


def test_what_reaches_the_next_block_has_gone_through_rounded_activations(base):
    """Static steps of block 1 are those of inputs that block 0 made with its activations rounded."""
    result = compression.compress(base, f"smoothquant(activations=static,alpha=0,{SMALL})", calibration=IDS)
    seen = []
    result.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].abs().max()))
    first = compression.compress(
        base, f"smoothquant(activations=static,alpha=0,{SMALL})", calibration=IDS
    ).model.model.layers[0]
    before = []
    first.mlp.down_proj.register_forward_pre_hook(lambda _, x: before.append(x[0]))

    with torch.inference_mode():
        result.model(IDS, use_cache=False)

    step = float(result.model.model.layers[1].mlp.down_proj.input_part.step)
    assert pytest.approx(float(max(seen)) / 127, rel=0.1) == step


@pytest.mark.parametrize("activations", ["token", "static"])
def test_it_is_streamed_saved_and_opened_with_the_same_bits(folder, tmp_path, activations):
    recipe = f"smoothquant(activations={activations},{SMALL})"
    result = compression.compress(str(folder), recipe, calibration=IDS)

    opened = compression.load(result.save(tmp_path / "saved"))
    streamed = compression.load(compression.compress_to(tmp_path / "streamed", str(folder), recipe, calibration=IDS))

    assert torch.equal(logits(result.model), logits(opened.model))
    assert torch.equal(logits(result.model), logits(streamed.model))
    assert result.report == opened.report == streamed.report
    assert {"w8a8" if exact_here() else "simulated": 14} == result.kernels()
    assert ("vllm", "transformers") == result.portable


def test_what_cannot_be_is_refused(folder):
    with pytest.raises(RecipeError, match="must be from 0 to 1"):
        compression.Recipe.parse("smoothquant(alpha=1.5)")
    with pytest.raises(RecipeError, match="works on a whole block: it takes no settings per layer"):
        compression.Recipe.parse('smoothquant(layers={"*":null})')
