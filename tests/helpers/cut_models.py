"""Small decoders to cut and what they are cut by; and the slow reference, a whole model with parts silenced."""

import copy
import functools

import pytest
import torch
from checkpoints import transformers_model

import compression
from compression.architectures.decoder import decoder_blocks
from compression.architectures.random_shapes import SHAPES
from compression.checkpoints.base import build, byte_tokenizer

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SIZES = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
IDS = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(1))
HEADS = "structured(keep_layers=none,keep_kv_heads=3"
LAYERS = "structured(keep_kv_heads=none,keep_layers="
NF4 = "nf4(group_size=32)"
CUTS = ("structured(keep_layers=3)", f"{NF4}-structured(keep_layers=3)", "p(ratio=0.3,round_to=32)")
FOLDERS = {}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """Checkpoints that transformers wrote, one to an architecture, in every module that imports this; `opened` reads
    them."""
    for family in FAMILIES:
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or family != "Qwen2ForCausalLM"}
        model = transformers_model(family, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # ones and zeros would hide one that is left out
                    parameter.data.normal_(1 if "norm" in name else 0, 0.3)
        folder = tmp_path_factory.mktemp("base") / family
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        FOLDERS[family] = folder
    yield
    FOLDERS.clear()
    compressed.cache_clear()


def opened(family="MistralForCausalLM", edit=None):
    base = compression.open_base(str(FOLDERS[family]))
    if edit is not None:
        edit(base.model)
    return base


@functools.cache
def compressed(family, recipe):
    return compression.compress(opened(family), recipe, calibration=IDS)


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def without(model, layers=(), heads=(), neurons=()):
    """The slow reference: the whole model, with the parts that go cut off from the residual stream by zeros."""
    model = copy.deepcopy(model)
    for i, block in enumerate(decoder_blocks(model)):
        attention, mlp = block.module.self_attn, block.module.mlp
        queries, kv_heads = block.heads
        for head in range(kv_heads) if i in layers else heads:
            width = queries // kv_heads * attention.head_dim
            attention.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
        mlp.down_proj.weight.data[:, slice(None) if i in layers else list(neurons)] = 0
    return model


def skeleton(shape):
    """A model of published shapes, without weights."""
    return build(SHAPES[shape], torch.bfloat16, device="meta")
