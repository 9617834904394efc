"""A copy that computes in fp32: the stored weights, shared where no conversion is needed."""

import copy

import pytest
import torch
from tiny_models import TOKENS, fresh_base, logits

import compression
from compression.layers.float32 import bytes_in_float32, in_float32

pytestmark = pytest.mark.usefixtures("tiny_shapes")

RECIPES = ("fp16", "nf4(group_size=32)", "rtn(bits=8,group_size=-1)", "rtn(bits=4,group_size=32,embeddings=8)",
           "llm_int8", "magnitude(store=bitmask)", "magnitude(pattern=2:4,store=nm)")  # fmt: skip


@pytest.fixture(params=RECIPES)
def model(request):
    base, _ = fresh_base("tiny-qwen2-bf16")
    with torch.inference_mode():
        found = compression.compress(base, request.param).model
        logits(found)  # which binds kernels
    return found


def tensors(model):
    return {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}


@torch.inference_mode()
def test_the_copy_computes_as_the_converted_model_does_and_the_model_as_before(model):
    before = logits(model).clone()

    wide = in_float32(model)

    assert torch.float32 == logits(wide).dtype
    assert torch.equal(logits(copy.deepcopy(model).float()), logits(wide))
    assert torch.equal(before, logits(model))
    assert torch.bfloat16 == before.dtype


@torch.inference_mode()
def test_every_weight_of_the_copy_is_the_stored_one(model):
    wide = in_float32(model)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(module.weight.float(), wide.get_submodule(name).weight)
        elif isinstance(module, compression.layers.Linear):
            assert torch.equal(module.dequantize(torch.float32), wide.get_submodule(name).dequantize())


@torch.inference_mode()
def test_what_needs_no_conversion_is_shared_and_the_rest_is_counted(model):
    wide = in_float32(model)

    added = [tensor for address, tensor in tensors(wide).items() if address not in tensors(model)]
    assert all(tensor.dtype == torch.float32 for tensor in added)
    assert bytes_in_float32(model) == sum(tensor.nbytes for tensor in added)
    assert 0 == bytes_in_float32(wide)


@torch.inference_mode()
def test_a_model_in_fp32_is_shared_whole():
    base, _ = fresh_base("tiny-llama-fp32")

    wide = in_float32(base.model)

    assert tensors(wide).keys() == tensors(base.model).keys()
    assert torch.equal(logits(base.model), logits(wide))


@torch.inference_mode()
def test_tied_embeddings_stay_tied():
    base, _ = fresh_base("tiny-qwen2-bf16")

    wide = in_float32(base.model)

    assert wide.get_input_embeddings().weight is wide.get_output_embeddings().weight


@torch.inference_mode()
def test_a_packed_layer_of_the_copy_rounds_no_result_to_bf16():
    base, _ = fresh_base("tiny-llama")
    model = compression.compress(base, "rtn(bits=4,group_size=32)").model
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))

    layer = in_float32(model).get_submodule("model.layers.0.self_attn.q_proj")

    y = layer(x)
    torch.testing.assert_close(y, layer.reference(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, y.bfloat16().float())
    assert TOKENS.shape == logits(in_float32(model)).shape[:2]
