"""Folders that earlier versions wrote open as they did: the same layers, weights, bytes and products.

`data/schema_2` was written by the last version with that schema: small Qwen2 decoders with one layer for every way to
store one, tied and untied, and in expected.json what that version said of them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import rewrite

import compression
from compression import CheckpointError, LayerError
from compression.architectures.decoder import stored_layers
from compression.layers import legacy

WRITTEN = Path(__file__).with_name("data") / "schema_2"
KINDS = {
    "self_attn.q_proj": ("codes", "sum"),
    "self_attn.k_proj": ("codes", "codes"),
    "self_attn.v_proj": ("codes", "codes"),
    "self_attn.o_proj": ("codes", "codes"),
    "mlp.gate_proj": ("sparse", "sum"),
    "mlp.up_proj": ("sparse",),
    "mlp.down_proj": ("sum",),
}  # in the first block and the second


@pytest.fixture(params=["tied", "untied"])
def written(request):
    return WRITTEN / request.param


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def weights(model):
    dense = {name: layer.to_linear().weight for name, layer in stored_layers(model).items() if "embed" not in name}
    return dense | {"model.embed_tokens": model.get_submodule("model.embed_tokens").weight}


def test_every_layer_opens_with_the_weight_bytes_and_count_of_before(written):
    expected = json.loads((written / "expected.json").read_text())

    opened = compression.load(written)

    assert expected["weights"] == {name: digest(weight) for name, weight in weights(opened.model).items()}
    assert expected["stored_bytes"] == opened.stored_bytes
    assert expected["parameters"] == opened.parameters
    for number in (0, 1):
        for path, kinds in KINDS.items():
            layer = opened.model.get_submodule(f"model.layers.{number}.{path}")
            kind = layer.weight_part.kind if number < len(kinds) else None
            assert kind == (kinds[number] if number < len(kinds) else None)


def test_the_logits_are_those_of_before(written):
    pytest.importorskip("bitsandbytes")  # which one of the layers asks for
    expected = json.loads((written / "expected.json").read_text())["logits"]
    model = compression.load(written).model

    with torch.no_grad():
        found = model(torch.arange(24).view(2, 12) * 4 % 96).logits[:, -1, :8].float()

    torch.testing.assert_close(torch.tensor(expected), found, rtol=2e-2, atol=2e-2)  # kernels differ by processor


def test_saved_again_it_has_the_schema_of_today_and_the_same_bits(written, tmp_path):
    opened = compression.load(written)

    again = compression.load(opened.save(tmp_path / "again"))

    assert 3 == json.loads((tmp_path / "again" / "compression.json").read_text())["schema"]
    assert {name: digest(weight) for name, weight in weights(opened.model).items()} == {
        name: digest(weight) for name, weight in weights(again.model).items()
    }
    assert opened.stored_bytes == again.stored_bytes
    assert opened.report == again.report


def test_the_first_schema_opens_still(tmp_path):
    folder = shutil.copytree(WRITTEN / "untied", tmp_path / "old")
    (folder / "compressed.safetensors").rename(folder / "model.safetensors")
    manifest = json.loads((folder / "compression.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in ("digest", "files")} | {"schema": 1}
    (folder / "compression.json").write_text(json.dumps(old))

    opened, expected = (compression.load(each) for each in (folder, WRITTEN / "untied"))

    assert all(
        torch.equal(tensor, opened.model.state_dict()[name]) for name, tensor in expected.model.state_dict().items()
    )


PACKED = json.loads((WRITTEN / "untied" / "compression.json").read_text())["layers"]["model.layers.0.self_attn.v_proj"]
SPARSE = {"store": "bitmask", "pattern": None, "kept": 1, "in_features": 4, "out_features": 4, "bias": False,
          "dtype": "float32"}  # fmt: skip


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (7, "is not a table"),
        ({}, "it lacks"),
        ({"adapter": {"rank": 1, "scale": 1.0, "dtype": "float32"}, "base": {}}, "it lacks"),
        (SPARSE | {"store": "csr"}, "store='csr' must be one of bitmask, nm"),
        (SPARSE | {"pattern": [2, 4]}, "of a bitmask must be null"),
        (SPARSE | {"store": "nm"}, "must be two numbers"),
        (PACKED | {"permuted": 1}, "permuted"),
        (PACKED | {"more": 1}, "more"),
    ],
    ids=str,
)
def test_a_description_of_an_earlier_schema_that_cannot_be_is_refused(description, words):
    with pytest.raises(LayerError, match=words):
        legacy.translated(description)


def test_a_folder_of_an_earlier_schema_that_was_changed_is_refused(tmp_path):
    folder = shutil.copytree(WRITTEN / "untied", tmp_path / "old")
    layers = json.loads((folder / "compression.json").read_text())["layers"]
    layers["model.layers.0.self_attn.v_proj"]["grid"]["bits"] = 99
    rewrite(folder / "compression.json", layers=layers)

    with pytest.raises(CheckpointError, match=r"self_attn\.v_proj: bits=99"):
        compression.load(folder)
