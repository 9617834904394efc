"""GGUF files: what is read is what transformers and the library `gguf` read, and what cannot be is refused in words."""

import struct

import gguf as library
import numpy as np
import pytest
import torch
from checkpoints import TOKENS, says
from gguf_files import in_pairs, opened_model, write
from hypothesis import given
from hypothesis import strategies as st

import compression
from compression import CheckpointError
from compression.checkpoints.formats import gguf


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3))
def test_the_order_of_heads_is_changed_back(heads, half, columns):
    weight = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)

    assert np.array_equal(weight, gguf.rotated_by_halves(in_pairs(weight, heads), heads))


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_full_precision_is_the_model_that_it_was_written_of(tmp_path, tied):
    model = write(tmp_path / "a.gguf", "F32", tied)

    again = opened_model(tmp_path / "a.gguf")

    assert tied == again.config.tie_word_embeddings
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_tensor_is_what_transformers_reads(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    write(tmp_path / "a.gguf", kind)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).state_dict()
    ours = opened_model(tmp_path / "a.gguf").state_dict()

    assert theirs.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {kind, "F32"} == set(gguf.open_file(tmp_path / "a.gguf").types.values())


@given(st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    write(folder / "a.gguf", "Q8_0")
    content = (folder / "a.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(content[: int(len(content) * share)])

    for opens in (opened_model, compression.load):
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            opens(folder / "cut.gguf")


def without(key):
    def change(writer):
        del writer.kv_data[0][key]

    return change


def changed(key, value, kind=None):
    def change(writer):
        old = writer.kv_data[0][key]
        kind_of = old.type if kind is None else library.GGUFValueType[kind]
        writer.kv_data[0][key] = type(old)(value=value, type=kind_of)

    return change


def with_tensor(name, values):
    return {"tensors": lambda found: found | {name: values.astype(np.float32)}}


REFUSED = {
    "big endian": ({"endian": library.GGUFEndian.BIG}, ["byte order"]),
    "split": ({"change": lambda writer: writer.add_uint16("split.count", 3)}, ["one of 3 parts", "--merge"]),
    "experts": ({"change": lambda writer: writer.add_expert_count(8)}, ["llama.expert_count = 8"]),
    "no size": ({"change": without("llama.block_count")}, ["has no llama.block_count"]),
    "attention": ({"change": lambda writer: writer.add_float32("llama.attention.scale", 2.0)}, ["attention.scale"]),
    "partial": ({"change": lambda writer: writer.add_rope_dimension_count(8)}, ["a part of each head"]),
    "heads": ({"change": changed("llama.attention.head_count_kv", 3)}, ["num_key_value_heads=3 does not divide"]),
    "no heads": ({"change": changed("llama.attention.head_count", 0)}, ["num_attention_heads"]),
    "layers": ({"change": changed("llama.block_count", 2**20)}, ["num_hidden_layers"]),
    "epsilon": ({"change": changed("llama.attention.layer_norm_rms_epsilon", float("nan"))}, ["rms_norm_eps"]),
    "text": ({"change": changed("llama.attention.head_count", "four", kind="STRING")}, ["num_attention_heads"]),
    "parts": ({"change": lambda writer: writer.add_string("split.count", "x")}, ["one of 'x' parts"]),
    "twice": (with_tensor("blk.00.attn_norm.weight", np.ones(64)), ["no place"]),
    "router": (with_tensor("blk.0.ffn_gate_inp.weight", np.ones((32, 32))), ["ffn_gate_inp", "no place"]),
    "shape": (with_tensor("output_norm.weight", np.ones(32)), ["model.norm.weight has shape (32,)"]),
    "missing": ({"tensors": lambda found: dict(list(found.items())[:-1])}, ["missing model.norm.weight"]),
    "nan": (with_tensor("output_norm.weight", np.full(64, np.nan)), ["model.norm.weight has NaN"]),
}


@pytest.mark.parametrize("opens", [opened_model, compression.load], ids=["dense", "as stored"])
@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_says_why(tmp_path, options, words, opens):
    write(tmp_path / "a.gguf", "Q8_0", **options)

    with pytest.raises(CheckpointError, match=says(*words)):
        opens(tmp_path / "a.gguf")


def test_another_architecture_is_refused_with_those_that_are_read(tmp_path):
    writer = library.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    for opens in (gguf.open_file, compression.load):
        with pytest.raises(CheckpointError, match=says("'mamba'", "llama, qwen2, qwen3")):
            opens(tmp_path / "a.gguf")


def test_values_that_change_nothing_are_passed_over(tmp_path):
    def neutral(writer):
        writer.add_rope_scaling_type(library.RopeScalingType.NONE)
        writer.add_expert_count(0)
        writer.add_rope_dimension_count(16)

    model = write(tmp_path / "a.gguf", "F32", change=neutral)

    assert torch.equal(model(TOKENS).logits, opened_model(tmp_path / "a.gguf")(TOKENS).logits)


def test_a_count_that_the_file_does_not_hold_is_refused_before_it_is_counted(tmp_path):
    """By the library it is: 2^40 turns, and as much memory."""
    key = b"general.architecture"
    head = struct.pack("<IIQQ", int.from_bytes(b"GGUF", "little"), 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for kind in (4, 8):
        (tmp_path / "a.gguf").write_bytes(head + struct.pack("<IIQ", 9, kind, 2**40))
        with pytest.raises(CheckpointError, match="is no GGUF file, or is damaged: it"):
            gguf.open_file(tmp_path / "a.gguf")


@given(st.binary(max_size=200), st.integers(0, 3))
def test_no_bytes_behind_the_head_do_more_than_be_refused(tmp_path_factory, noise, tensors):
    path = tmp_path_factory.mktemp("noise") / "a.gguf"
    path.write_bytes(struct.pack("<IIQQ", int.from_bytes(b"GGUF", "little"), 3, tensors, 2) + noise)

    with pytest.raises(CheckpointError):
        gguf.open_file(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04 a zip file", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)

    with pytest.raises(CheckpointError, match="is no GGUF file, or is damaged"):
        gguf.open_file(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="is no file"):
        gguf.open_file(tmp_path)
