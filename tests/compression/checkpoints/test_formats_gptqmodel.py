"""Against GPTQModel, where it is installed (the extra `gptqmodel`): what it writes, and what it makes of ours."""

import os

import pytest
import torch
from checkpoints import logits, transformers_model
from packed_layers import coded_linear, pack_linear
from published import random_layer
from strategies import gaussian

import compression
from compression import BackendError
from compression.architectures import decoder
from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.stores import affine_store
from compression.errors import install_command
from compression.numeric import packing
from compression.numeric.grids import AffineGrid
from compression.numeric.grouping import quantize

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def gptqmodel():
    """Imported late: it takes half a minute and prints."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    return pytest.importorskip("gptqmodel", reason=f"gptqmodel is not installed: {install_command('gptqmodel')}")


def dense(layer):
    linear = torch.nn.Linear(*reversed(layer.weight_part.codes.shape), bias=False)
    linear.weight.data = layer.weight(torch.float32)
    return linear


def read(tensors, published):
    return affine_store(published).read(tensors, 64, 128, torch.float16).value()


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gptq_layer_that_gptqmodel_packed_dequantizes_to_the_same_bits(bits, desc_act, symmetric, version):
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = random_layer(64, 128, bits, 32, symmetric=symmetric, desc_act=desc_act, seed=bits)
    theirs = TorchLinear(bits=bits, group_size=32, desc_act=desc_act, sym=symmetric, in_features=128, out_features=64,
                         bias=False, pack_dtype=torch.int32, register_buffers=True)  # fmt: skip
    theirs.pack(dense(layer), layer.scales.float(), layer.zeros, layer.g_idx.int())
    theirs.post_init()
    weight = theirs.dequantize_weight().t()
    if version == "gptq":
        convert_gptq_v2_to_v1_format_module(theirs, QuantizeConfig(bits=bits, group_size=32))

    tensors = {key: getattr(theirs, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
    published = Published(quant_method="gptq", bits=bits, group_size=32, symmetric=symmetric, version=version)
    assert torch.equal(weight, read(tensors, published))


def test_an_awq_layer_that_gptqmodel_packed_dequantizes_to_the_same_bits():
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    layer = random_layer(64, 128, 4, 32)
    theirs = AwqTorchLinear(bits=4, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64)
    theirs.pack(dense(layer), layer.scales, layer.zeros)

    tensors = {key: getattr(theirs, key) for key in ("qweight", "qzeros", "scales")}
    weight = dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, 32).t()
    published = Published(quant_method="awq", bits=4, group_size=32, symmetric=False, version="gemm")
    assert torch.equal(weight.half(), read(tensors, published))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize(
    ("format", "steps", "permuted"),
    [
        ("gptq", "rtn(group_size=16)", False),
        ("gptq", "rtn(group_size=16,symmetric=true)", True),
        ("gptq", "rtn(bits=3,group_size=16)", False),
        ("gptq", "rtn(bits=2,group_size=16,symmetric=true)", False),
        ("gptq", "rtn(bits=8,group_size=-1)", False),
        ("awq", "rtn(group_size=16)", False),
    ],
)
def test_what_we_write_computes_the_same_in_transformers(tmp_path, architecture, format, steps, permuted):
    from transformers import AutoModelForCausalLM

    transformers_model(architecture, dtype=torch.float16, hidden_size=64).save_pretrained(tmp_path / "base")
    result = compression.compress(str(tmp_path / "base"), steps)
    for name, layer in decoder.stored_layers(result.model).items() if permuted else ():
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
        codes = packing.unpack(layer.weight_part.codes, layer.weight_part.grid.bits, layer.in_features)
        result.model.set_submodule(name, coded_linear(codes, layer.weight_part.parameters_of_grid(), layer.bias,
                                                                 layer.weight_part.grid, dtype=layer.dtype,
                                                                 permutation=order))  # fmt: skip
    result.save(tmp_path / "out", format)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float16)

    ours = logits(result.model).float()
    assert (logits(theirs).float() - ours).norm() <= 1e-3 * ours.norm()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "permuted", "dtype"),
    [
        (4, 32, True, False, torch.bfloat16),
        (4, 64, False, True, torch.float16),
        (4, -1, True, False, torch.bfloat16),
        (2, 32, False, False, torch.bfloat16),  # this and the next are compiled first, which takes a minute
        (3, 32, True, True, torch.float16),
    ],
)
def test_its_kernels_multiply_our_layers(bits, group, symmetric, permuted, dtype):
    grid = AffineGrid(bits=bits, group_size=group, symmetric=symmetric)
    codes, params = quantize(grid, gaussian(64, 128, std=0.02).to(dtype))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)) if permuted else None
    layer = coded_linear(codes, params, gaussian(1, 64, std=0.1)[0].to(dtype), grid, dtype=dtype,
                                    permutation=order, backend="gptqmodel")  # fmt: skip
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}

    for rows in (1, 5):
        x = gaussian(rows, 128, std=1).to(dtype)
        y, expected = layer(x).float(), layer.reference(x.float())
        assert (y - expected).norm() <= 2e-2 * expected.norm()

    assert "gptqmodel" == layer.kernel_name()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_its_kernels_multiply_a_published_checkpoint(tmp_path, format):
    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16, hidden_size=64).save_pretrained(tmp_path / "base")
    compression.compress(str(tmp_path / "base"), "rtn(group_size=32)").save(tmp_path / "out", format)

    ours = compression.load(tmp_path / "out")
    theirs = compression.load(tmp_path / "out", backend="gptqmodel")

    assert {"gptqmodel": 14} == theirs.kernels()
    expected = logits(ours.model).float()
    assert (logits(theirs.model).float() - expected).norm() <= 2e-2 * expected.norm()


def test_what_its_kernels_cannot_take_is_refused_with_words():
    grid = AffineGrid(bits=4, group_size=32, symmetric=True)
    layer = pack_linear(gaussian(64, 128), None, grid, backend="gptqmodel")

    with pytest.raises(BackendError, match="fp16 or bf16 only"):
        layer.kernel_name()


def test_a_kernel_that_takes_a_layer_and_fails_on_it_is_said():
    grid = AffineGrid(bits=4, group_size=16, symmetric=True)
    layer = pack_linear(gaussian(64, 128).bfloat16(), None, grid, backend="gptqmodel")

    with pytest.raises(BackendError, match="of gptqmodel fails on 64 x 128 in groups of 16"):
        layer(gaussian(1, 128).bfloat16())
