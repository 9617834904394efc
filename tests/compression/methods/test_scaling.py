"""AWQ: its transform leaves the function alone, its search against loops with real forward passes, bad input."""

import copy
import dataclasses
import functools

import pytest
import torch
from checkpoints import logits, transformers_model
from exact_models import model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import affine_grids, gaussian, seeds, weights

import compression
from compression import LayerError, RecipeError
from compression.architectures import anatomy, table
from compression.architectures.decoder import Site, decoder_blocks
from compression.calibration.blockwise import Layer, SameInput, Scaling
from compression.calibration.observers import Hessian
from compression.methods.quantization.weight_only.awq import AWQ
from compression.numeric.channel_scales import SHRINKS, AwqScales, Producer, candidates, clipped, nearest
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import decode, quantize

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STACKS = {site.readers: site.producer for site in anatomy.sites((anatomy.LLAMA_ATTENTION, anatomy.LLAMA_MLP))}
SMALL = "samples=4,sequence_length=24"
IDS = torch.arange(96).view(4, 24) * 5 % 48


def inputs(cols, *, seed=0, tokens=60):
    """Inputs of a layer, correlated, a few channels of which are large."""
    x = gaussian(tokens, cols, seed=seed, std=1)
    x = x @ gaussian(cols, cols, seed=seed + 1, std=cols**-0.5) + 0.3 * x
    return x * gaussian(1, cols, seed=seed + 2, std=1.2).exp()


def hessian_of(x):
    return 2 * x.t() @ x / len(x)


def identity(cols):
    return Producer(torch.arange(cols), None)


# --- The transform ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RandomScales:
    """In the place of a search: scales of any size, drawn by a seed."""

    seed: int
    spread: float

    def search(self, readers, producer, dtype):
        channels = int(producer.channels.max()) + 1
        return 0.5, producer.divisible(gaussian(1, channels, seed=self.seed, std=self.spread)[0].exp())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledAtRandom(AWQ):
    how: RandomScales

    def transform(self):
        return self.how


@functools.cache
def tiny(architecture, dtype):
    return transformers_model(architecture, dtype=dtype).eval().requires_grad_(False)


def model_with_norms(architecture, dtype, seed):
    """A tiny model whose norms are of all sizes; some weights of them are negative or zero, as trained ones may be."""
    model = copy.deepcopy(tiny(architecture, dtype))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.data = (1 + gaussian(1, len(parameter), seed=seed + i, std=0.5)[0]).to(dtype)
            parameter.data[i % len(parameter)] = 0
    return model


def scaled(model, how):
    """The model in fp32, its blocks scaled and not rounded."""
    model = copy.deepcopy(model)
    method = ScaledAtRandom(how=how)
    for block in decoder_blocks(model):
        layers = {name: Layer(name, linear, method, linear.bias) for name, linear in block.linears()}
        for site in reversed(block.sites):
            readers = [layers[name] for name in site.names]
            before = layers.get(block.full(site.row.producer or ""))
            stacks = [
                SameInput([layers[block.full(path)] for path in paths], 0, Hessian(readers[0].linear.in_features))
                for paths in site.row.stacks
            ]
            scaling = Scaling(site, stacks, before)
            if scaling.refusal is None:
                scaling.divide(scaling.search()[1])
        for layer in layers.values():
            layer.linear.weight = torch.nn.Parameter(layer.scaled(), requires_grad=False)
            if layer.bias is not None:
                layer.linear.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
    return model.float()


def check_that_scaling_leaves_the_function_alone(architecture, dtype, seed, spread):
    model = model_with_norms(architecture, dtype, seed)
    expected = logits(copy.deepcopy(model).float())
    actual = logits(scaled(model, RandomScales(seed, spread)))

    assert float((actual - expected).norm() / expected.norm()) <= 1e-5


TRANSFORMS = (
    st.sampled_from(ARCHITECTURES),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seeds,
    st.floats(0, 2),
)


@settings(max_examples=8)
@given(*TRANSFORMS)
def test_scaling_leaves_the_function_in_fp32_as_it_was(architecture, dtype, seed, spread):
    check_that_scaling_leaves_the_function_alone(architecture, dtype, seed, spread)


@pytest.mark.parametrize("family", table.ARCHITECTURES)
def test_scaling_leaves_the_function_of_every_architecture_as_it_was(family):
    model = model_of(family, 3).float()
    expected = logits(model)

    actual = logits(scaled(model, RandomScales(5, 1.0)))

    assert float((actual - expected).norm() / expected.norm()) <= 1e-4


CHANNELS = Site.channels.fget


def of_another_head(site):
    """Heads of values are dealt out in turn, not to neighbours."""
    channels = CHANNELS(site)
    if site.row.producer != "self_attn.v_proj":
        return channels
    return channels.view(2, -1, site.block.head_size).transpose(0, 1).flatten()


BROKEN = {
    "norms are rounded and nothing makes up for it": (Producer, "divisible", lambda self, scales: scales),
    "the producer is not divided": (Producer, "divided", lambda self, scales: self.stored),
    "the rows before are not divided": (Layer, "scaled", lambda self: self.weight() * self.columns),
    "scales go to the heads of others": (Site, "channels", property(of_another_head)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_law_catches_a_broken_transform(broken, monkeypatch):
    monkeypatch.setattr(*BROKEN[broken])

    with pytest.raises(AssertionError):
        check_that_scaling_leaves_the_function_alone("Qwen2ForCausalLM", torch.bfloat16, 1, 1.0)


@given(seeds, st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.floats(0, 30))
def test_what_is_stored_is_divided_without_rounding_whatever_the_scales(seed, dtype, spread):
    stored = gaussian(1, 64, seed=seed, std=1)[0].to(dtype)
    stored[::7] = 0
    producer = Producer(torch.arange(64), stored)

    scales = producer.divisible(gaussian(1, 64, seed=seed + 1, std=spread)[0].clamp(-85, 85).exp())  # finite ones

    assert (scales > 0).all()
    torch.testing.assert_close(producer.divided(scales).float() * scales, stored.float(), rtol=1e-6, atol=0)


# --- The search -------------------------------------------------------------------------------------------------------


def loss(x, readers, scales):
    """Sum over the readers of |x Q(W s) / s - x W|^2 / |x W|^2, by forward passes in fp64."""
    total, x = 0.0, x.double()
    for weight, grid in readers:
        quantized = decode(grid, *quantize(grid, weight * scales)).double() / scales
        y = x @ weight.double().t()
        total += float((x @ quantized.t() - y).square().sum() / y.square().sum().clamp(min=1e-300))
    return total


def powers(x, ratios):
    """Eq. 5, `x` (tokens, channels)."""
    magnitude = x.square().mean(0).sqrt()
    magnitude = (magnitude / magnitude.mean()).clamp(min=1e-4)
    for i in range(ratios):
        scales = magnitude ** (i / ratios)
        yield scales / (scales.max() * scales.min()).sqrt()


@given(seeds, affine_grids, st.integers(1, 20))
def test_the_search_finds_what_a_loop_of_forward_passes_finds(seed, grid, ratios):
    x = inputs(64, seed=seed)
    readers = [(gaussian(rows, 64, seed=seed + rows), grid) for rows in (5, 3)]

    same = [(weight, grid, hessian_of(x)) for weight, grid in readers]
    _, scales = AwqScales(ratios, False).search(same, identity(64), torch.float32)

    tried = [wanted for _, wanted in candidates(hessian_of(x).diagonal().sqrt(), ratios)]
    torch.testing.assert_close(torch.stack(tried), torch.stack([*powers(x, ratios)]), rtol=1e-4, atol=0)
    # of the very same scales: the largest weight of a symmetric group is a tie, which the last bit decides
    assert loss(x, readers, scales) <= min(loss(x, readers, wanted) for wanted in tried) * (1 + 1e-3)


def never_worse_than_no_scaling(seed, weight, grid, duo_scaling):
    x, weight = inputs(64, seed=seed), weight.float()
    _, scales = AwqScales(20, duo_scaling).search([(weight, grid, hessian_of(x))], identity(64), torch.float32)

    return loss(x, [(weight, grid)], scales) <= loss(x, [(weight, grid)], torch.ones(64)) * (1 + 1e-3) + 1e-9


@given(seeds, weights(), affine_grids, st.booleans())
def test_scaling_is_never_worse_than_none_on_the_error_that_it_minimises(seed, weight, grid, duo_scaling):
    assert never_worse_than_no_scaling(seed, weight, grid, duo_scaling)


def test_the_law_catches_a_search_that_takes_its_last_candidate(monkeypatch):
    monkeypatch.setattr(
        AwqScales, "search", lambda self, readers, *_: [*candidates(readers[0][2].diag().sqrt(), 20)][-1]
    )
    grid = AffineGrid(bits=3, group_size=32, symmetric=False)

    assert not all(never_worse_than_no_scaling(seed, gaussian(6, 64, seed=seed), grid, False) for seed in range(8))


def group_errors(x, weight, quantized, size):
    """|x (W - Q)|^2 of each group by itself, (rows, groups)."""
    parts = [(x[:, i : i + size] @ (weight - quantized)[:, i : i + size].t()).square().sum(0)
             for i in range(0, weight.shape[1], size)]  # fmt: skip
    return torch.stack(parts, -1)


@given(seeds, weights(), affine_grids)
def test_each_group_takes_the_clipping_that_a_loop_of_forward_passes_takes(seed, weight, grid):
    x, weight = inputs(64, seed=seed), weight.float()
    size = 64 if grid.group_size == -1 else grid.group_size
    tried = []
    for shrink in SHRINKS:
        limit = shrink * weight.abs().view(len(weight), -1, size).amax(-1).repeat_interleave(size, 1)
        params = grid.fit(weight.clamp(-limit, limit))
        tried.append(group_errors(x, weight, decode(grid, grid.encode(weight, params), params), size))

    params = clipped(weight, hessian_of(x), grid, torch.float32)

    errors = group_errors(x, weight, decode(grid, grid.encode(weight, params), params), size)
    scale = group_errors(x, weight, torch.zeros_like(weight), size)
    assert (errors <= torch.stack(tried).amin(0) * (1 + 1e-3) + 1e-6 * scale).all()
    assert (errors <= tried[0] * (1 + 1e-3) + 1e-6 * scale).all()  # SHRINKS[0] clips nothing


@given(weights(), affine_grids)
def test_nearest_is_what_encoding_and_decoding_gives(weight, grid):
    weight = weight.float()
    params = grid.fit(weight)

    assert torch.equal(decode(grid, grid.encode(weight, params), params), nearest(weight, grid, params))


def slow_awq(module, seen, grid):
    """A block of Llama by the paper, stack by stack: dequantized weights by name, and norms. Every ratio and every
    clipping is tried by a forward pass of the layers; `seen` holds the inputs (tokens, cols) of each linear by name."""
    weights = {name: module.get_submodule(name).weight for stack in STACKS for name in stack}
    columns, rows, norms = {}, {name: torch.ones(len(weight)) for name, weight in weights.items()}, {}
    for stack, producer in STACKS.items():
        x, size = seen[stack[0]], len(module.get_submodule(producer).weight)
        shared = x.shape[1] // size  # heads of queries to one of values
        heads = x.square().mean(0).sqrt().view(-1, shared, 8 if shared > 1 else 1)
        tried = list(powers(heads.mean(1).flatten()[None], 20))
        wide = [own.view(len(heads), 1, -1).expand(heads.shape).flatten() for own in tried]
        losses = [loss(x, [(weights[name], grid) for name in stack], scales) for scales in wide]
        at = losses.index(min(losses))
        own, columns = tried[at], columns | dict.fromkeys(stack, wide[at])
        if producer in weights:
            rows[producer] = own
        else:
            norms[producer] = module.get_submodule(producer).weight / own
    quantized = {}
    for name, weight in weights.items():
        weight, x = weight * columns[name] / rows[name][:, None], seen[name] / columns[name]
        groups = []
        for group, part in zip(weight.split(grid.group_size, 1), x.split(grid.group_size, 1), strict=True):
            answers = []
            for shrink in SHRINKS:
                limit = shrink * group.abs().amax(-1, keepdim=True)
                params = grid.fit(group.clamp(-limit, limit))
                answers.append(decode(grid, grid.encode(group, params), params))
            errors = torch.stack([(part @ (answer - group).t()).square().sum(0) for answer in answers])
            groups.append(torch.stack(answers)[errors.argmin(0), torch.arange(len(group))])
        quantized[name] = torch.cat(groups, -1)
    return quantized, norms


def test_a_compressed_block_is_what_the_slow_reference_makes_of_it(folder):
    grid = AffineGrid(bits=3, group_size=16, symmetric=False)
    base, seen = compression.open_base(str(folder)), {}
    module = base.model.model.layers[0]
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1)})
        )
        for stack in STACKS for name in stack
    ]  # fmt: skip
    base.model(IDS)
    for hook in hooks:
        hook.remove()
    quantized, norms = slow_awq(module, seen, grid)

    result = compression.compress(base, f"awq(bits=3,group_size=16,{SMALL})", calibration=IDS)

    block, same = result.model.model.layers[0], []
    for name, weight in norms.items():
        torch.testing.assert_close(block.get_submodule(name).weight, weight)
    for name, weight in quantized.items():
        difference = (block.get_submodule(name).dequantize() - weight).abs().unflatten(-1, (-1, 16)).amax(-1)
        same.append((difference <= 1e-5).flatten())
    assert torch.cat(same).float().mean() >= 0.9  # a zero point of a range clipped on both sides is a tie: 3.5


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_output_error_of_each_layer_is_below_that_of_rounding_to_nearest(folder, rounding):
    result = compression.compress(
        str(folder), f"awq(bits=3,group_size=32,rounding={rounding},{SMALL})", calibration=IDS
    )

    for entry in result.report:
        if entry.outcome == "replaced" and entry.name != "norms":
            error, plain = (float(entry.detail.partition(f"{what} ")[2].split("(")[0].rstrip(") "))
                            for what in ("output error", "nearest:"))  # fmt: skip
            assert 0 < error < plain, entry


# --- Layers that stay, and bad input ----------------------------------------------------------------------------------


def details(result):
    return {entry.name.removeprefix("model.layers."): entry.detail for entry in result.report}


def test_a_stack_with_a_layer_that_stays_is_not_scaled_and_says_so(folder):
    layers = '{"*.0.self_attn.k_proj":null,"*.0.mlp.up_proj":null}'
    result = compression.compress(str(folder), f"awq(group_size=32,{SMALL},layers={layers})", calibration=IDS)

    found, block = details(result), result.model.model.layers[0]
    for name, reason in (("q_proj", "k_proj"), ("v_proj", "k_proj")):
        assert f"not scaled because model.layers.0.self_attn.{reason} stays" in found[f"0.self_attn.{name}"]
    for name in ("gate_proj", "down_proj"):
        assert "not scaled because model.layers.0.mlp.up_proj stays" in found[f"0.mlp.{name}"]
    assert "scales of ratio" in found["0.self_attn.o_proj"]
    assert "scales of ratio" in found["1.self_attn.k_proj"]
    base = compression.open_base(str(folder)).model.model.layers[0]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(base.get_submodule(norm).weight, block.get_submodule(norm).weight)


def test_layers_that_read_the_same_input_cannot_be_scaled_in_different_ways(folder):
    with pytest.raises(LayerError, match=r"scaled together.*v_proj is set to AwqScales\(ratios=5.*give both the same"):
        compression.compress(
            str(folder), f'awq(group_size=32,{SMALL},layers={{"*.v_proj":{{"n_grid":5}}}})', calibration=IDS
        )


def test_norms_are_reported_once_and_only_where_they_are_divided(folder):
    for steps, outcome in ((f"awq(group_size=32,{SMALL})", "replaced"), (f"gptq(group_size=32,{SMALL})", "kept")):
        report = compression.compress(str(folder), steps, calibration=IDS).report
        assert [outcome] == [entry.outcome for entry in report if entry.name == "norms"]


def test_inputs_that_are_not_finite_are_refused_naming_the_layers(folder):
    base = compression.open_base(str(folder))
    base.model.model.layers[0].input_layernorm.weight.data[3] = float("inf")

    with pytest.raises(LayerError, match=r"0\.mlp\.down_proj: the inputs of the calibration text .* not finite"):
        compression.compress(base, f"awq(group_size=32,{SMALL})", calibration=IDS)


@pytest.mark.parametrize(
    "text", ["awq(n_grid=0)", "awq(n_grid=1001)", "awq(group_size=4)", "awq(rounding=up)", "awq(damp=2)", "awq(bits=5)",
             "awq(samples=0)", "awq(clip=1)"]
)  # fmt: skip
def test_parameters_that_cannot_be_are_refused(text):
    with pytest.raises(RecipeError, match=r"awq\(.*(allowed|must|expected)"):
        compression.Recipe.parse(text)
