"""rounding=gptq of methods that round weights: the scales of nearest with the codes of GPTQ, and exports as before."""

import copy
import functools

import pytest
import torch
from checkpoints import logits, transformers_model

import compression
from compression import RecipeError, layers
from compression.architectures.decoder import decoder_blocks, stored_layers
from compression.calibration.capture import Inputs, Seen
from compression.calibration.observers import Hessian, Reaching
from compression.layers.dense import Dense
from compression.layers.transforms import Permutation, Rotation
from compression.numeric import packing
from compression.numeric.grouping import quantize
from compression.numeric.rounding import Factored, relative_error

IDS = torch.randint(48, (8, 24), generator=torch.Generator().manual_seed(4))
SMALL = "samples=8,sequence_length=24"
METHODS = {
    "int8": "int8({})", "int8-static": "int8(activations=static,{})", "fp8": "fp8({})",
    "fp8-static": "fp8(activations=static,{})", "nvfp4": "nvfp4({})", "mxfp4": "mxfp4({})",
    "rtn_fp": "rtn_fp(element=e2m1,group_size=16,scale=e4m3,{})", "smoothquant": "smoothquant({})",
    "smoothquant-static": "smoothquant(activations=static,{})",
}  # fmt: skip
LAYER_METHODS = [METHODS[name] for name in ("int8", "fp8-static", "nvfp4", "mxfp4", "rtn_fp")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounding") / "base"
    transformers_model("LlamaForCausalLM").save_pretrained(folder)
    return compression.open_base(str(folder))


@pytest.fixture
def block(base):
    return decoder_blocks(copy.deepcopy(base.model))[0]


@pytest.fixture(scope="module")
def compressed(base):
    return functools.cache(
        lambda method, rounding: compression.compress(
            base, method.format(f"{SMALL},rounding={rounding}"), calibration=IDS
        )
    )


def seen_of(base, block):
    return Seen(block, Inputs.of_first_block(base.model, IDS))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_scales_and_what_enters_are_those_of_nearest_and_codes_are_not(compressed, method):
    """In the first block, before which nothing differs."""
    nearest, gptq = (compressed(method, rounding).model.model.layers[0] for rounding in ("nearest", "gptq"))

    one, other = nearest.state_dict(), gptq.state_dict()
    assert one.keys() == other.keys()
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert {name for name in one if name.endswith(".weight_part.codes")} == differ


@pytest.mark.parametrize("method", LAYER_METHODS, ids=LAYER_METHODS)
def test_codes_are_those_of_gptq_on_what_the_layer_reads_and_outputs_are_nearer(base, block, compressed, method):
    hessians = seen_of(base, block).inputs(Hessian)
    one, other = (compressed(method, rounding).model.model.layers[0] for rounding in ("nearest", "gptq"))
    errors = []

    for name, linear in block.linears():
        nearest, gptq = (each.get_submodule(name.removeprefix(f"{block.name}.")).weight_part for each in (one, other))
        _, params = quantize(gptq.grid, linear.weight)
        codes = Factored.of(hessians[name], 0.01).codes(linear.weight, gptq.grid, params)
        assert torch.equal(codes, packing.unpack(gptq.canonical(), gptq.grid.bits, gptq.shape[1])), name
        errors.append([relative_error(linear.weight, part.value(), hessians[name]) for part in (gptq, nearest)])

    assert torch.tensor(errors).sum(0).diff() > 0


def test_smoothquant_takes_the_hessian_of_the_block_that_it_has_scaled(base):
    """Where all columns get the same scale, it is `int8`, with the same codes."""
    alike = copy.deepcopy(base)
    with torch.no_grad():
        for block in decoder_blocks(alike.model):
            for _, linear in block.linears():
                linear.weight.clamp_(-0.02, 0.02)
                linear.weight[0] = linear.weight[:, 0] = 0.02

    one, other = (compression.compress(alike, f"{name}rounding=gptq,{SMALL})", calibration=IDS).model.model.layers[0]
                  for name in ("int8(", "smoothquant(alpha=0,"))  # fmt: skip

    for path in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(one.get_submodule(path).weight_part.codes, other.get_submodule(path).weight_part.codes)


@pytest.mark.parametrize("method", [METHODS[name] for name in ("int8", "fp8", "mxfp4", "rtn_fp", "smoothquant")])
def test_it_is_exported_and_opened_as_the_nearest_form_is(compressed, tmp_path, method):
    nearest, gptq = (compressed(method, rounding) for rounding in ("nearest", "gptq"))

    again = compression.load(gptq.save(tmp_path / "out", "compressed-tensors"))

    assert nearest.portable == gptq.portable
    assert nearest.published_formats == gptq.published_formats
    assert nearest.kernels() == gptq.kernels()
    assert torch.equal(logits(gptq.model), logits(again.model))


TURN = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("part", [Rotation(TURN), Permutation(ORDER)])
def test_what_reaches_the_weights_has_gone_through_what_the_layer_does_before(base, block, part):
    before = seen_of(base, block).inputs(Hessian)
    for path in ("self_attn.q_proj", "mlp.up_proj"):
        linear = block.layer(path)
        block.replace(block.full(path), layers.Linear(Dense(part(linear.weight)), linear.bias, input_part=part))

    seen = seen_of(base, block).at_weights(Reaching)

    assert before.keys() == seen.keys()
    for name, hessian in before.items():
        moved = name.endswith(("q_proj", "up_proj"))
        wanted = part(part(hessian).t().contiguous()).t() if moved else hessian
        torch.testing.assert_close(seen[name].hessian, wanted, rtol=1e-4, atol=1e-4)


def test_layers_that_read_the_same_share_one_factorization(base, monkeypatch):
    made, of = [], Factored.of
    monkeypatch.setattr(Factored, "of", lambda *arguments: made.append(of(*arguments)) or made[-1])

    compression.compress(base, f"mxfp4(rounding=gptq,{SMALL})", calibration=IDS)

    assert 2 * 4 == len(made)  # q/k/v, o, gate/up and down of two blocks


def test_layers_may_be_rounded_to_nearest_or_kept(base):
    steps = f'mxfp4(rounding=gptq,{SMALL},layers={{"*.0.*":null,"*.down_proj":{{"rounding":"nearest"}}}})'
    result, nearest = compression.compress(base, steps, calibration=IDS), compression.compress(base, "mxfp4")

    assert all(name.startswith("model.layers.1.") for name in stored_layers(result.model))
    one, other = (each.model.model.layers[1] for each in (result, nearest))
    assert torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight)
    assert not torch.equal(one.mlp.up_proj.weight, other.mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["mxfp4", "rtn_fp", "int8", "fp8"])
def test_nearest_reads_no_text_and_gptq_does(method):
    texts = (f"{method}(rounding={each})" for each in ("nearest", "gptq"))
    nearest, gptq = (compression.Recipe.parse(text).steps[0].method for text in texts)

    assert (None, (128, 512)) == (nearest.calibration, gptq.calibration)
    assert (False, True) == (nearest.fits_hessian, gptq.fits_hessian)


def test_what_cannot_be_is_refused(base):
    with pytest.raises(RecipeError, match=r"int8\(damp=2.0\): allowed are 0 to 1"):
        compression.Recipe.parse("int8(damp=2)")
    with pytest.raises(RecipeError, match=r"allowed are nearest, gptq"):
        compression.Recipe.parse("fp8(rounding=up)")
    with pytest.raises(RecipeError, match=r"'\*.o_proj' cannot have rounding=gptq .* set rounding=gptq for the whole"):
        compression.compress(base, 'int8(layers={"*.o_proj":{"rounding":"gptq"}})')
