"""Adapters: the identity at first, the same function merged, nothing else trained; against peft."""

import pytest
import torch
from checkpoints import transformers_model
from hypothesis import given
from hypothesis import strategies as st
from packed_layers import holds, pack_linear, sparse_linear
from strategies import gaussian, seeds
from torch import nn

import compression
from compression import LayerError, RecipeError
from compression.architectures import decoder
from compression.checkpoints.size import stored_bytes
from compression.layers.linear import Linear
from compression.layers.low_rank import LowRank
from compression.numeric.grids import AffineGrid, Int8RowGrid
from compression.numeric.normal_float import NF4Grid
from compression.training.adapters import adapted_layers, adapter_of, attach, detach, merge, without_adapter
from compression.training.settings import LINEARS, LoraSettings, Objective
from compression.training.trainer import Settings, train

ROWS, COLS = 64, 128
ALL = LoraSettings(rank=4, alpha=8, dropout=0.0, targets=LINEARS)
IDS = torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))
ONCE = Settings(epochs=3, learning_rate=1e-2, batch=8, accumulation=1, clip=1.0)
PLAIN = Objective(alpha=0, temperature=1)


def dense(weight, bias=None):
    linear = nn.Linear(COLS, ROWS, bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def pruned(weight):
    return weight * (weight.abs() >= weight.abs().median())


def two_of_four(weight):
    groups = weight.view(ROWS, -1, 4)
    return groups.masked_fill(groups.abs().argsort(-1).argsort(-1) < 2, 0).view(ROWS, COLS)


BASES = {
    "dense": dense,
    "pruned": lambda w: dense(pruned(w)),
    "bitmask": lambda w: sparse_linear(pruned(w), None),
    "2:4": lambda w: sparse_linear(two_of_four(w), None, (2, 4)),
    "nf4": lambda w: pack_linear(w, None, NF4Grid()),
    "rtn": lambda w: pack_linear(w, None, AffineGrid(bits=3, group_size=32, symmetric=False)),
    "int8": lambda w: pack_linear(w, None, Int8RowGrid(), threshold=6.0),
    "int8-torch": lambda w: pack_linear(w, None, AffineGrid(bits=8, group_size=-1, symmetric=False)),
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def weight_of(layer):
    return layer.dequantize(torch.float32) if holds(layer, "codes") else layer.weight


def beside(base, adapter):
    """A layer with an adapter beside what it is made of."""
    own = Linear.of(base)
    return own.with_weight(*own.weight_part.summands, adapter)


def base_of(layer):
    """The layer without its adapter."""
    return without_adapter(layer).simplest()


def drawn(rank, scale, **options):
    return LowRank.drawn(ROWS, COLS, rank, scale, torch.Generator().manual_seed(0), **options)


def adapted(base, seed=0):
    """An adapter that has been trained, held at zero where the base of floats is zero."""
    floats = not holds(base, "codes") and bool((base.weight == 0).any())
    a, b = gaussian(4, COLS, seed=seed, std=1), gaussian(ROWS, 4, seed=seed + 1, std=1)
    adapter = LowRank(a, b, 0.5, mask=base.weight != 0 if floats else None)
    return beside(base, adapter.requires_grad_(True))


def in_a_model(layer):
    """A model whose first q_proj is the layer."""
    model = transformers_model("LlamaForCausalLM", hidden_size=COLS, intermediate_size=COLS)
    model.model.layers[0].self_attn.set_submodule("q_proj", layer)
    return model


# --- Layers -----------------------------------------------------------------------------------------------------------


@bases
def test_at_first_it_is_the_identity_bit_for_bit(base):
    own, x = base(gaussian(ROWS, COLS)), gaussian(5, COLS, std=1)
    expected = own(x)
    layer = beside(own, drawn(8, 2.0))

    assert torch.equal(expected, layer(x))
    assert adapter_of(layer).a.abs().max() > 0


@bases
def test_its_output_and_gradients_are_those_of_the_equation(base):
    layer, x = adapted(base(gaussian(ROWS, COLS))), gaussian(40, COLS, std=1).requires_grad_(True)
    theirs = x.detach().clone().requires_grad_(True)
    adapter = adapter_of(layer)
    a, b = (p.detach().clone().requires_grad_(True) for p in (adapter.a, adapter.b))
    mask = torch.ones(ROWS, COLS) if adapter.mask is None else adapter.mask

    y = layer(x)
    want = theirs @ (weight_of(base_of(layer)) + 0.5 * mask * (b @ a)).t()
    seen = gaussian(40, ROWS, seed=7, std=1)
    (y * seen).sum().backward()
    (want * seen).sum().backward()

    low = layer.input_part is not None  # rounds x to 8 bits
    torch.testing.assert_close(y, want, rtol=2e-2 if low else 1e-4, atol=5e-2 if low else 1e-4)
    torch.testing.assert_close((a.grad, b.grad), (adapter.a.grad, adapter.b.grad), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [BASES[name] for name in ("bitmask", "nf4", "rtn")], ids=["bitmask", "nf4", "rtn"])
def test_dense_weights_are_not_kept_for_the_way_back(base):
    layer, kept = base(gaussian(ROWS, COLS)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(gaussian(40, COLS, std=1).requires_grad_(True)).sum().backward()

    assert ROWS * COLS not in kept


@given(seeds, st.sampled_from(["dense", "pruned", "bitmask", "2:4"]))
def test_merged_into_floats_it_computes_the_same_and_zeros_stay(seed, name):
    layer, x = adapted(BASES[name](gaussian(ROWS, COLS, seed=seed)), seed), gaussian(5, COLS, seed=seed, std=1)
    model, before = in_a_model(layer), weight_of(base_of(layer)).clone()
    want, zeros = layer(x), before == 0

    lost = merge(model)
    found = model.model.layers[0].self_attn.q_proj

    torch.testing.assert_close(want, found(x), rtol=1e-5, atol=1e-4)
    assert type(base_of(layer)) is type(found)
    assert (found.weight[zeros] == 0).all() and not torch.equal(before, found.weight)
    assert list(lost) == ["model.layers.0.self_attn.q_proj"] and max(lost.values()) < 1e-5


def test_an_adapter_that_is_not_held_at_zeros_fills_them():
    layer = adapted(dense(pruned(gaussian(ROWS, COLS))))
    adapter_of(layer).mask = None

    assert (layer.to_linear().weight == 0).sum() < (base_of(layer).weight == 0).sum()


@pytest.mark.parametrize("base", [BASES[name] for name in ("nf4", "rtn", "int8")], ids=["nf4", "rtn", "int8"])
def test_packed_codes_keep_their_adapter_and_merging_into_them_says_what_it_loses(base):
    layer = adapted(base(gaussian(ROWS, COLS, std=1)))
    codes, wanted = layer.state_dict()["weight_part.0.codes"].clone(), layer.to_linear().weight
    grid = layer.weight_part.summands[0].grid
    model = in_a_model(layer)

    assert {"model.layers.0.self_attn.q_proj": 0.0} == merge(model)
    assert model.model.layers[0].self_attn.q_proj is layer
    assert torch.equal(codes, layer.state_dict()["weight_part.0.codes"])

    (lost,) = merge(model, packed=True).values()
    found = model.model.layers[0].self_attn.q_proj
    error = (found.dequantize(torch.float32) - wanted).norm() / adapter_of(layer).product().detach().norm()
    assert holds(found, "codes") and found.weight_part.grid == grid
    assert float(error) == pytest.approx(lost, rel=1e-4)
    assert 0 < lost < 1


def test_in_bf16_the_sum_is_rounded_once():
    layer = adapted(dense(gaussian(ROWS, COLS, dtype=torch.bfloat16)))
    exact = base_of(layer).weight.float() + adapter_of(layer).product()

    assert torch.equal(exact.bfloat16(), layer.to_linear().weight)


@bases
def test_against_peft(base):
    """On a dense layer of the same weight, which is what peft knows."""
    peft = pytest.importorskip("peft")
    layer, x = adapted(base(gaussian(ROWS, COLS))), gaussian(6, COLS, seed=5, std=1).requires_grad_(True)
    adapter = adapter_of(layer)
    if adapter.mask is not None:
        adapter.mask = torch.ones(ROWS, COLS, dtype=torch.bool)  # peft has none
    model = nn.ModuleDict({"q": dense(weight_of(base_of(layer)).detach().clone())})
    config = peft.LoraConfig(r=4, lora_alpha=2, lora_dropout=0.0, target_modules=["q"], bias="none")
    theirs = peft.inject_adapter_in_model(config, model)["q"]
    theirs.lora_A["default"].weight.data.copy_(adapter.a.data)
    theirs.lora_B["default"].weight.data.copy_(adapter.b.data)
    other = x.detach().clone().requires_grad_(True)

    ours, wanted = layer(x), theirs(other)
    ours.square().sum().backward()
    wanted.square().sum().backward()

    low = layer.input_part is not None
    close = {"rtol": 5e-2, "atol": 5e-2 * float(wanted.detach().abs().max())} if low else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(ours, wanted, **close)
    if not low:
        torch.testing.assert_close(adapter.a.grad, theirs.lora_A["default"].weight.grad, **close)
        torch.testing.assert_close(adapter.b.grad, theirs.lora_B["default"].weight.grad, **close)
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-2)
    theirs.merge()
    torch.testing.assert_close(layer.to_linear().weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_layers_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    weight = gaussian(ROWS, COLS)
    theirs = bnb.nn.Linear4bit(COLS, ROWS, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
    theirs.to("cpu")
    theirs(gaussian(1, COLS))  # quantizes
    model, x = in_a_model(theirs), gaussian(40, COLS, seed=3, std=1).requires_grad_(True)
    before = theirs.weight.data.clone()

    layer = attach(model, ALL)["model.layers.0.self_attn.q_proj"]
    adapter = adapter_of(layer)
    adapter.b.data.normal_(generator=torch.Generator().manual_seed(0))
    layer(x).sum().backward()

    dequantized = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state).float()
    want = (dequantized + adapter.product()).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, want, rtol=1e-2, atol=1e-2)
    assert adapter.a.grad is not None and theirs.weight.grad is None
    merge(model)
    assert base_of(layer) is theirs and torch.equal(before, theirs.weight.data)


# --- Models -----------------------------------------------------------------------------------------------------------


def compressed(recipe, saved):
    return compression.compress(str(saved), recipe, calibration=IDS)


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


RECIPES = ("fp16", "nf4(group_size=32)", "rtn(group_size=32)", "magnitude(store=bitmask)", "magnitude")
recipes = pytest.mark.parametrize("text", RECIPES)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LINEARS], ids=["qv", "all"])
@recipes
def test_only_adapters_are_trained_and_detaching_gives_back_what_was(text, targets, saved, tmp_path):
    model = decoder.copy_sharing_tensors(compressed(text, saved).model)
    before = tensors(model)
    adapters = attach(model, LoraSettings(rank=4, alpha=8, dropout=0.0, targets=targets))
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    found = train(model, IDS, PLAIN, ONCE, tmp_path / "runs")

    assert len(adapters) == 2 * (2 if len(targets) == 2 else 7)  # of Llama
    assert asking == {f"{name}.weight_part.{len(layer.weight_part.summands) - 1}.{which}"
                      for name, layer in adapters.items() for which in "ab"}  # fmt: skip
    assert found.losses[-1] < found.losses[0]
    assert all(adapter_of(layer).b.abs().max() > 0 for layer in adapters.values())
    detach(model)
    assert before.keys() == model.state_dict().keys()
    assert [] == [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]


@recipes
def test_a_checkpoint_holds_the_adapters_alone_and_a_finished_run_is_read(text, saved, tmp_path):
    from safetensors import safe_open

    models = [decoder.copy_sharing_tensors(compressed(text, saved).model) for _ in range(2)]
    adapters = [attach(model, ALL) for model in models]
    first, second = (train(model, IDS, PLAIN, ONCE, tmp_path / "runs") for model in models)

    assert first == second
    for name, layer in adapters[0].items():
        assert torch.equal(adapter_of(layer).b, adapter_of(adapters[1][name]).b)
    (path,) = first.folder.glob("checkpoint-*/model.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {f"{name}.weight_part.1.{which}" for name in adapters[0] for which in "ab"}


def test_codes_grids_and_scales_of_adapters_are_part_of_what_a_run_is_of(saved, tmp_path):
    def folder(text, settings=ALL):
        model = decoder.copy_sharing_tensors(compressed(text, saved).model)
        attach(model, settings)
        return train(model, IDS, PLAIN, ONCE, tmp_path / "runs").folder

    others = (
        folder("rtn(group_size=32)"), folder("rtn(group_size=32,symmetric=true)"), folder("fp16"),
        folder("fp16", LoraSettings(rank=4, alpha=4, dropout=0.0, targets=LINEARS)),
        folder("fp16", LoraSettings(rank=4, alpha=8, dropout=0.5, targets=LINEARS)),
        folder("fp16", LoraSettings(rank=4, alpha=8, dropout=0.0, targets=LINEARS, seed=1)),
    )  # fmt: skip

    assert len(others) == len(set(others))


def test_training_gives_every_tensor_its_dtype_back(tmp_path):
    model = transformers_model("Qwen2ForCausalLM", dtype=torch.bfloat16)  # has biases
    affine = AffineGrid(bits=4, group_size=32, symmetric=True)
    for name, grid in (("q_proj", NF4Grid(group_size=32)), ("k_proj", affine)):
        for layer in model.model.layers:
            linear = layer.self_attn.get_submodule(name)
            layer.self_attn.set_submodule(name, pack_linear(linear.weight, linear.bias, grid))
    for layer in model.model.layers:
        layer.mlp.up_proj = sparse_linear(layer.mlp.up_proj.weight, None)
    model.requires_grad_(False)
    before, size = {name: t.dtype for name, t in tensors(model).items()}, stored_bytes(model)
    adapters = [adapter_of(layer) for layer in attach(model, ALL).values()]
    train(model, IDS, PLAIN, ONCE, tmp_path / "runs")
    detach(model)

    for each in (*(adapter.a for adapter in adapters), *(adapter.b for adapter in adapters)):
        assert torch.float32 == each.dtype and not torch.equal(each, each.bfloat16().float())  # never rounded
    assert before == {name: t.dtype for name, t in tensors(model).items()}
    assert size == stored_bytes(model)
    assert {torch.bfloat16} == {layer.dtype for layer in decoder.stored_layers(model).values()}


def test_a_second_adapter_on_a_layer_is_refused_and_nothing_changes():
    model = transformers_model("LlamaForCausalLM")
    attach(model, LoraSettings(rank=2, targets=("v_proj",)))
    before = list(adapted_layers(model))

    with pytest.raises(LayerError, match=r"model\.layers\.0\.self_attn\.v_proj: this layer already has an adapter"):
        attach(model, ALL)
    assert before == list(adapted_layers(model))


def test_adapters_of_one_seed_are_the_same_and_those_of_layers_are_not():
    first, second, other = (
        attach(transformers_model("LlamaForCausalLM"), settings)
        for settings in (ALL, ALL, LoraSettings(rank=4, seed=1))
    )
    name, below = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))

    def drawn_for(adapters, name):
        return adapter_of(adapters[name]).a

    assert torch.equal(drawn_for(first, name), drawn_for(second, name))
    assert not torch.equal(drawn_for(first, name), drawn_for(first, below))
    assert not torch.equal(drawn_for(first, name), drawn_for(other, name))


def test_dropout_acts_in_training_alone():
    own, x = dense(gaussian(ROWS, COLS)), gaussian(5, COLS, std=1)
    layer = beside(own, drawn(4, 1.0, dropout=0.5))
    adapter_of(layer).b.data.fill_(1.0)

    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"alpha": 0.0}, r"alpha=0\.0: must be above 0"),
        ({"dropout": 1.0}, r"dropout=1\.0: allowed are 0 to below 1"),
        ({"targets": ("q",)}, r"targets=\('q',\): allowed are some of q_proj, "),
        ({"targets": ()}, r"targets=\(\): allowed are"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(RecipeError, match=words):
        LoraSettings(**change)
