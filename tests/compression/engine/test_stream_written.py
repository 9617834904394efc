"""Compressing into a folder block by block: the same bits as in memory, and no more memory than blocks need."""

import json

import pytest
import torch
from block_by_block import BLOCKS, GPTQ, TWICE, deep_checkpoint, same, tensors, write
from checkpoints import logits, transformers_model
from safetensors import safe_open

import compression
from compression.architectures.random_shapes import SHAPES
from compression.calibration.capture import Inputs
from compression.checkpoints.base import build, locate
from compression.checkpoints.opening import outline
from compression.checkpoints.weights import open_weights


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return deep_checkpoint(tmp_path_factory.mktemp("base") / "deep")


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "fp16",
        "rtn(bits=3,group_size=8)",
        "nf4(group_size=32)",
        "hqq(group_size=8)",
        GPTQ,
        "gptq(group_size=8,static_groups=false,samples=4,sequence_length=12)",
        "awq(group_size=8,samples=4,sequence_length=12)",
        f"hqq(group_size=8)-{GPTQ}",
        TWICE,
        'gptq(group_size=8,samples=4,sequence_length=12,layers={"*.0.*":null,"*.down_proj":{"bits":8}})',
    ],
)
def test_a_model_compressed_block_by_block_is_the_one_compressed_in_memory(deep, tmp_path, text):
    expected = compression.compress(str(deep), text, calibration="random")
    expected.save(tmp_path / "memory")

    opened = compression.load(write(tmp_path / "stream", deep, text))

    assert same(tensors(tmp_path / "memory"), tensors(tmp_path / "stream"))
    assert torch.equal(logits(expected.model), logits(opened.model))
    assert (expected.report, expected.executed, expected.base, expected.recipe) == (
        opened.report, opened.executed, opened.base, opened.recipe
    )  # fmt: skip
    assert expected.cost.calibration_tokens == opened.cost.calibration_tokens
    assert opened.cost.seconds > 0
    assert json.loads((tmp_path / "memory/config.json").read_text()) == json.loads(
        (tmp_path / "stream/config.json").read_text()
    )


@pytest.mark.parametrize("text", ["rtn(group_size=8)", GPTQ])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"])
def test_so_is_one_with_tied_embeddings_biases_several_files_or_in_bf16(tmp_path, architecture, text):
    model = transformers_model(architecture, tied="Qwen2" in architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    expected = compression.compress(str(tmp_path / "base"), text, calibration="random")

    opened = compression.load(write(tmp_path / "stream", tmp_path / "base", text))

    assert same(expected.model.state_dict(), opened.model.state_dict())
    told = outline(tmp_path / "stream")
    for count in ("stored_bytes", "parameters", "report", "portable"):
        assert getattr(expected, count) == getattr(opened, count) == getattr(told, count), count
    assert expected.stored_bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "stream").values())
    assert expected.kernels() == told.kernels("cpu")


def test_every_block_has_a_file_of_its_own_and_an_index_that_transformers_reads(deep, tmp_path):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "out", deep, "fp16")

    for i in range(BLOCKS):
        with safe_open(tmp_path / "out" / f"model-{i + 2:05d}-of-00005.safetensors", framework="pt") as file:
            assert {f"model.layers.{i}"} == {".".join(name.split(".")[:3]) for name in file.keys()}  # noqa: SIM118
    assert not [path.name for path in (tmp_path / "out").iterdir() if "state" in path.name or "inputs" in path.name]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert torch.equal(logits(compression.open_base(str(deep)).model), logits(opened))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values()) == index["metadata"]["total_size"]


@pytest.fixture
def tiny_shape(monkeypatch):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True,
              "dtype": "bfloat16", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", config)
    return config


def test_random_weights_are_the_same_whatever_is_asked_for_and_in_which_order(tiny_shape):
    whole = compression.open_base("random:tiny", seed=3).model.state_dict()
    weights = open_weights(locate("random:tiny"), seed=3)

    for name in reversed(weights.headers):
        assert torch.equal(whole[name], weights.read([name])[name]), name
    matrices = [tensor for tensor in weights.read(weights.headers).values() if tensor.ndim == 2]
    for i, first in enumerate(matrices):
        assert not any(first.shape == other.shape and torch.equal(first, other) for other in matrices[i + 1 :])


def test_random_weights_do_not_depend_on_the_number_of_blocks(tiny_shape, monkeypatch):
    name = "model.layers.1.mlp.up_proj.weight"
    before = open_weights(locate("random:tiny")).read([name])[name]

    monkeypatch.setitem(SHAPES, "tiny", tiny_shape | {"num_hidden_layers": 2})

    assert torch.equal(before, open_weights(locate("random:tiny")).read([name])[name])


def test_a_random_base_is_compressed_block_by_block_with_its_tokenizer(tiny_shape, tmp_path):
    expected = compression.compress("random:tiny", GPTQ)

    opened = compression.load(compression.compress_to(tmp_path / "out", "random:tiny", GPTQ))

    assert same(expected.model.state_dict(), opened.model.state_dict())
    assert "ab" == opened.tokenizer.decode(opened.tokenizer("ab").input_ids)


def test_blocks_behind_the_last_that_a_recipe_changes_are_not_run(deep, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Inputs, "advance", lambda self, block: ran.append(block.name))
    recipe = 'gptq(group_size=8,samples=4,sequence_length=12,layers={"model.layers.0.*":{},"*":null})'

    opened = compression.load(write(tmp_path / "out", deep, recipe))

    assert [] == ran
    assert 7 == sum(entry.outcome == "replaced" for entry in opened.report)
    assert BLOCKS * 7 + 3 == len(opened.report)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_memory_holds_a_block_and_not_the_model(monkeypatch, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
              "dtype": "float32", "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024,
              "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    monkeypatch.setitem(SHAPES, "deep", config)
    skeleton = build(config, torch.float32, device="meta")
    block, whole = (4 * sum(p.numel() for p in part.parameters()) for part in (skeleton.model.layers[0], skeleton))

    opened = compression.load(compression.compress_to(tmp_path / "out", "random:deep", "rtn"))
    in_memory = compression.compress("random:deep", "rtn")

    assert block <= opened.cost.peak_bytes <= 6 * block < whole / 2
    assert in_memory.cost.peak_bytes > 2 * block  # the meter sees what is held: 16 packed blocks of an eighth each
