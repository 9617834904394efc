"""Checkpoints that hqq and torchao make themselves, opened with the bits that they dequantize to."""

import json

import pytest
import torch
from checkpoints import transformers_model
from read_only_formats import SIZES, hqq_config, hqq_setting
from safetensors.torch import save_file

import compression
from compression.architectures import decoder
from compression.errors import install_command

pytestmark = pytest.mark.filterwarnings("ignore")


def compared(folder, expected):
    layers = decoder.stored_layers(compression.load(folder).model)
    assert expected.keys() == layers.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, layers[name].weight_part.value(weight.dtype)), name


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "size"), [(8, None), (4, 64), (3, 64), (3, 16), (2, 16)])
def test_layers_of_hqq(tmp_path, bits, size, dtype, view):
    """In fp32; of `compute_dtype` fp16 the library itself is asked for fp32."""
    reason = f"hqq is not installed: {install_command('hqq')}"
    library = pytest.importorskip("hqq.core.quantize", reason=reason)
    model = transformers_model("LlamaForCausalLM", **SIZES)
    setting = library.BaseQuantizeConfig(nbits=bits, group_size=size, axis=1, view_as_float=view)
    assert hqq_setting(bits, size, view_as_float=view) == setting
    expected = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            layer = library.HQQLinear(linear, setting, compute_dtype=dtype, device="cpu")
            model.set_submodule(name, layer)
            meta = {key: each.float() if isinstance(each, torch.Tensor) else each for key, each in layer.meta.items()}
            expected[name] = library.Quantizer.dequantize(layer.W_q, meta | {"compute_dtype": torch.float32})
    tensors = {name: each.contiguous() for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
    folder = tmp_path / "in"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": hqq_config(setting)}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    compared(folder, expected)


TORCHAO = {
    "int8": lambda q: q.Int8WeightOnlyConfig(),
    "int8 groups": lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)),
    "int8 tensor": lambda q: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
    "float8": lambda q: q.Float8WeightOnlyConfig(),
    "float8 tensor": lambda q: q.Float8WeightOnlyConfig(granularity=q.PerTensor()),
    "int4": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
    "int4 asymmetric": lambda q: q.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=q.PerGroup(32), mapping_type=q.MappingType.ASYMMETRIC
    ),
    "int3": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=q.PerAxis(0)),
    "by name": lambda q: q.FqnToConfig({"_default": q.Int8WeightOnlyConfig(), "model.layers.0.mlp.down_proj": None,
                                        "re:.*up_proj": q.IntxWeightOnlyConfig(weight_dtype=torch.int4)}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TORCHAO)
def test_checkpoints_that_transformers_saves_with_torchao(tmp_path, kind, dtype):
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    transformers_model("LlamaForCausalLM", dtype=dtype, **SIZES).save_pretrained(tmp_path / "base")
    config = TorchAoConfig(TORCHAO[kind](library))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype, quantization_config=config)
    model.save_pretrained(tmp_path / "in")
    expected = {
        name: linear.weight.dequantize()
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and hasattr(linear.weight, "qdata")
    }

    assert expected
    compared(tmp_path / "in", expected)
