"""Scaled positions of GGUF files: read and written as transformers computes them, or refused in words."""

import json

import gguf as library
import numpy as np
import pytest
import torch
from checkpoints import logits, says, transformers_model
from gguf_files import SIZES, write
from hypothesis import given
from hypothesis import strategies as st

import compression
from compression import CheckpointError, LayerError
from compression.checkpoints.formats import gguf_rope

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
SCALED = [LINEAR, YARN, YARN | {"beta_fast": 32.0, "beta_slow": 1, "truncate": True}, LLAMA3,
          LLAMA3 | {"low_freq_factor": 1.5, "original_max_position_embeddings": 32, "factor": 4.0}]  # fmt: skip


def model_of(rope, name="LlamaForCausalLM"):
    sizes = SIZES | {"rope_parameters": dict(rope), "max_position_embeddings": 64}
    return transformers_model(name, **sizes).eval()


def factors_by_hand(rope, head_dim):
    """As the converter of llama.cpp, one frequency at a time."""
    found, length = [], rope["original_max_position_embeddings"]
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wave < length / rope["high_freq_factor"]:
            found.append(1.0)
        elif wave > length / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (length / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", SCALED)
def test_what_is_written_opens_with_the_logits_of_transformers(tmp_path, rope):
    model = model_of(rope)
    model.save_pretrained(tmp_path / "base")

    again = compression.load(compression.compress(str(tmp_path / "base"), "fp16").save(tmp_path / "out", "gguf"))

    kept = {key: value for key, value in rope.items() if "beta" not in key and key != "truncate"}
    assert kept.items() <= again.model.config.rope_parameters.items()
    assert torch.equal(logits(model), logits(again.model))
    assert not torch.equal(logits(model), logits(model_of({"rope_type": "default", "rope_theta": rope["rope_theta"]})))


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_other_architectures_have_all_but_llama3(tmp_path, name):
    model_of(YARN, name).save_pretrained(tmp_path / "base")
    model_of(LLAMA3, name).save_pretrained(tmp_path / "other")

    again = compression.load(compression.compress(str(tmp_path / "base"), "fp16").save(tmp_path / "out", "gguf"))

    assert torch.equal(logits(model_of(YARN, name)), logits(again.model))
    with pytest.raises(LayerError, match=says("scaled positions: rope_type 'llama3'", "of Llama llama3")):
        compression.compress(str(tmp_path / "other"), "fp16").save(tmp_path / "2", "gguf")


@given(
    theta=st.floats(1e3, 1e7), factor=st.sampled_from([2.0, 8.0, 32.0]), size=st.sampled_from([16, 64, 128]),
    length=st.sampled_from([32, 8192, 2**17]), low=st.sampled_from([1.0, 2.0]),
)  # fmt: skip
def test_factors_are_those_of_the_converter(theta, factor, size, length, low):
    rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": 4.0,
            "original_max_position_embeddings": length}  # fmt: skip
    mine, theirs = gguf_rope.factors_of(rope, size).numpy(), factors_by_hand(rope, size)
    edge = np.abs(mine / theirs - 1) > 1e-4  # a frequency on the edge of a range may fall to either side

    assert edge.sum() <= 1


def of_keys(*pairs):
    def change(writer):
        for key, value in pairs:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add[type(value)](key if key.startswith("compression") else f"llama.rope.{key}", value)

    return change


def of_factors(factors):
    return lambda found: found | {"rope_freqs.weight": np.asarray(factors, dtype=np.float32)}


READ = {
    "no type": (of_keys(("scaling.factor", 4.0)), None, LINEAR),
    "old": (of_keys(("scale_linear", 4.0)), None, LINEAR),
    "none": (of_keys(("scaling.type", "none"), ("scaling.factor", 4.0)), None, None),
    "one": (of_keys(("scaling.type", "yarn"), ("scaling.factor", 1.0)), None, None),
    "yarn": (of_keys(("scaling.type", "yarn"), ("scaling.factor", 4.0), ("scaling.original_context_length", 16),
                     ("scaling.finetuned", True)), None, YARN),
    "context": (of_keys(("scaling.type", "yarn"), ("scaling.factor", 4.0)), None,
                YARN | {"original_max_position_embeddings": 64}),
    "llama3": (of_keys(), factors_by_hand(LLAMA3 | {"rope_theta": 1e4}, 16), LLAMA3 | {"rope_theta": 1e4}),
    "ones": (of_keys(), np.ones(8), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "factors", "rope"), READ.values(), ids=READ)
def test_files_of_others_are_read(tmp_path, change, factors, rope):
    tensors = (lambda found: found) if factors is None else of_factors(factors)
    model = write(tmp_path / "a.gguf", "F32", False, change=change, tensors=tensors)
    if rope is not None:
        expected = model_of(rope)
        expected.load_state_dict(model.state_dict())
        model = expected

    assert torch.equal(logits(model), logits(compression.load(tmp_path / "a.gguf").model))


SETTINGS = json.dumps({key: LLAMA3[key] for key in ("factor", *gguf_rope._LLAMA3)})
REFUSED = {
    "longrope": (of_keys(("scaling.type", "longrope")), None, ["'longrope' is not read", "none, linear, yarn"]),
    "factor": (of_keys(("scaling.factor", float("nan"))), None, ["factor = nan"]),
    "small": (of_keys(("scaling.factor", 0.5)), None, ["factor = 0.5", "at least 1"]),
    "text": (of_keys(("scaling.factor", "4")), None, ["factor = '4'"]),
    "attention": (of_keys(("scaling.attn_factor", 2.0)), None, ["attn_factor = 2.0", "must be 1.0"]),
    "mixed": (of_keys(("scaling.yarn_ext_factor", 0.5)), None, ["yarn_ext_factor = 0.5"]),
    "length": (of_keys(("scaling.type", "yarn"), ("scaling.factor", 4.0), ("scaling.original_context_length", 0)),
               None, ["original_context_length = 0"]),
    "beta": (of_keys(("scaling.type", "yarn"), ("scaling.factor", 4.0), ("scaling.yarn_beta_fast", 8.0)), None,
             ["yarn_beta_fast = 8.0", "must be 32.0"]),
    "alpha": (of_keys(("scaling.alpha", 4.0)), None, ["llama.rope.scaling.alpha = 4.0 is not read"]),
    "twice": (of_keys(("scaling.factor", 4.0)), np.full(8, 2.0), ["scaled twice"]),
    "unknown": (of_keys(), np.full(8, 2.0), ["rope_freqs.weight", "not those of Llama 3.1 to 3.3"]),
    "size": (of_keys(), np.full(4, 2.0), ["rope_freqs.weight"]),
    "contradiction": (of_keys((gguf_rope.SETTINGS, SETTINGS)), np.full(8, 2.0), ["contradicts", gguf_rope.SETTINGS]),
    "no setting": (of_keys((gguf_rope.SETTINGS, "{}")), np.full(8, 2.0), ["is no setting of llama3"]),
    "no number": (of_keys((gguf_rope.SETTINGS, SETTINGS.replace("8.0", "0"))), np.full(8, 2.0), ["above 0"]),
    "no json": (of_keys((gguf_rope.SETTINGS, "{")), np.full(8, 2.0), ["is no setting of llama3"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "factors", "words"), REFUSED.values(), ids=REFUSED)
def test_what_transformers_has_no_setting_for_is_refused(tmp_path, change, factors, words):
    tensors = (lambda found: found) if factors is None else of_factors(factors)
    write(tmp_path / "a.gguf", "F32", change=change, tensors=tensors)

    with pytest.raises(CheckpointError, match=says("a.gguf", *words)):
        compression.load(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (LINEAR | {"rope_type": "dynamic"}, ["rope_type 'dynamic'"]),
        (LINEAR | {"factor": 1.1}, ["rope.scaling.factor = 1.1", "fp32 would round"]),
        (YARN | {"attention_factor": 1.5}, ["attention_factor = 1.5"]),
        (YARN | {"truncate": False}, ["truncate = False"]),
        (YARN | {"beta_slow": 2.0}, ["beta_slow = 2.0"]),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, ["mscale = 0.7"]),
    ],
)
def test_what_llama_cpp_has_no_setting_for_is_not_written(tmp_path, rope, words):
    with pytest.raises(ValueError, match=says(*words)):
        gguf_rope.written(rope, "llama")


def test_the_tensor_is_stored_as_it_is_read(tmp_path):
    model_of(LLAMA3).save_pretrained(tmp_path / "base")
    first = compression.compress(str(tmp_path / "base"), "fp16").save(tmp_path / "1", "gguf")

    second = compression.load(first).save(tmp_path / "2", "gguf")

    found = [{each.name: each.data.tobytes() for each in library.GGUFReader(path / "model.gguf").tensors}
             for path in (first, second)]  # fmt: skip
    assert "rope_freqs.weight" in found[0] and found[0] == found[1]
    write(tmp_path / "half.gguf", "F32", change=lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.ones(8, dtype=np.float16)))  # fmt: skip
    with pytest.raises(CheckpointError, match=says("rope_freqs.weight is stored as F16")):
        compression.load(tmp_path / "half.gguf")
