"""Compressed models on disk: what is written, what opens again, and with which words the rest is refused."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from checkpoints import change_tensors, logits, rewrite, says

import compression
from compression import CheckpointError
from compression.checkpoints.base import open_base
from compression.checkpoints.output import check_writable


@pytest.fixture(scope="session")
def written(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "nf4"
    return compression.compress(str(saved), "rtn(bits=3,group_size=8)").save(folder)


@pytest.fixture
def artefact(written, tmp_path):
    copied = tmp_path / "artefact"
    copied.mkdir()
    for path in written.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def test_a_dense_result_is_a_checkpoint_that_transformers_opens(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    result = compression.compress(str(saved), "fp16")
    result.save(tmp_path / "dense")

    assert ("transformers", "vllm") == result.portable[:2]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval()
    assert torch.equal(logits(result.model), logits(opened))
    assert torch.equal(logits(result.model), logits(open_base(str(tmp_path / "dense")).model))


def test_a_compressed_folder_is_no_base(artefact):
    with pytest.raises(CheckpointError, match=says("is compressed already", "compression.load")):
        open_base(str(artefact))


def test_a_base_is_no_compressed_folder(folder):
    with pytest.raises(CheckpointError, match=says("has no compression.json", "as a base")):
        compression.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_manifest_that_is_not_json_is_refused(artefact, content):
    (artefact / "compression.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=says("compression.json is not JSON")):
        compression.load(artefact)


def test_a_manifest_of_another_schema_is_refused(artefact):
    rewrite(artefact / "compression.json", schema=99)

    with pytest.raises(CheckpointError, match=says("schema 99; this version reads 1 to 3")):
        compression.load(artefact)


LAYER = "model.layers.0.mlp.up_proj"
CODES = f"{LAYER}.weight_part.codes"


@pytest.mark.parametrize("key", ["recipe", "base", "executed", "cost", "report", "layers"])
@pytest.mark.parametrize("value", [..., "text", 3], ids=["missing", "text", "number"])
def test_a_manifest_with_a_part_missing_or_of_another_type_is_refused(artefact, key, value):
    rewrite(artefact / "compression.json", **{key: value})

    with pytest.raises(CheckpointError, match=says("compression.json is damaged or incomplete")):
        compression.load(artefact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layers: layers.update(nonsense=layers[LAYER]), ["nonsense"]),
        (lambda layers: layers.update({"model.norm": layers[LAYER]}), ["model.norm is no linear layer"]),
        (lambda layers: layers[LAYER]["weight"].pop("dtype"), ["dtype"]),
        (lambda layers: layers[LAYER]["weight"].update(dtype="float17"), ["float17"]),
        (lambda layers: layers[LAYER].update(in_features=24), [LAYER]),
        (lambda layers: layers[LAYER]["weight"]["grid"].update(kind="wood"), ["wood"]),
        (lambda layers: layers[LAYER]["weight"]["grid"].update(bits=9), ["bits=9"]),
        (lambda layers: layers[LAYER]["weight"]["grid"].update(group_size=7), ["does not divide"]),
        (lambda layers: layers[LAYER]["weight"]["grid"].update(colour=1), ["colour"]),
    ],
)
def test_a_manifest_whose_layers_cannot_be_is_refused(artefact, change, words):
    layers = json.loads((artefact / "compression.json").read_text())["layers"]
    change(layers)
    rewrite(artefact / "compression.json", layers=layers)

    with pytest.raises(CheckpointError, match=says("compression.json is damaged or incomplete", *words)):
        compression.load(artefact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(CODES), [f"missing {CODES}"]),
        (lambda t: t.update({f"{LAYER}.more": torch.ones(1)}), [f"unknown {LAYER}.more"]),
        (lambda t: t.update({CODES: t[CODES][:, 1:].contiguous()}), [f"{CODES} has shape"]),
        (lambda t: t.update({CODES: t[CODES].float()}), [f"{CODES} is stored as"]),
        (lambda t: t[f"{LAYER}.weight_part.scales"].fill_(math.nan), [f"{LAYER}.weight_part.scales has NaN"]),
    ],
)
def test_an_artefact_whose_tensors_do_not_fit_is_refused(artefact, change, words):
    change_tensors(artefact, change)

    with pytest.raises(CheckpointError, match=says(*words)):
        compression.load(artefact)


@pytest.mark.parametrize("name", ["compressed.safetensors", "config.json"])
def test_an_artefact_without_a_file_is_refused(artefact, name):
    (artefact / name).unlink()

    with pytest.raises(CheckpointError, match=says(name)):
        compression.load(artefact)


@pytest.mark.parametrize("files", [..., [], "compressed.safetensors", [1], ["../tiny/model.safetensors"], ["."]])
def test_a_manifest_that_names_no_files_in_its_folder_is_refused(artefact, files):
    rewrite(artefact / "compression.json", files=files)

    with pytest.raises(CheckpointError, match=says("compression.json")):
        compression.load(artefact)


def test_layers_without_their_entry_in_the_manifest_are_refused(artefact):
    rewrite(artefact / "compression.json", layers={})

    with pytest.raises(CheckpointError, match=says("unknown", ".codes")):
        compression.load(artefact)


# --- Where it is written ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = compression.compress(str(folder), "fp16")

    with pytest.raises(CheckpointError, match="already exists; give a new or an empty one"):
        result.save(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_in_the_place_of_the_output_is_refused(folder):
    with pytest.raises(CheckpointError, match="already exists"):
        check_writable(folder / "config.json")


def test_an_output_below_a_file_is_refused(folder):
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(folder / "config.json" / "out")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_an_output_where_nothing_can_be_written_is_refused():
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(Path("/proc/self/out"))


def test_a_new_folder_and_an_empty_one_are_taken_and_leave_no_trace(saved, tmp_path):
    result = compression.compress(str(saved), "fp16")
    (tmp_path / "empty").mkdir()

    check_writable(tmp_path / "new" / "er")
    result.save(tmp_path / "new" / "er")
    result.save(tmp_path / "empty")

    assert ["empty", "new"] == sorted(path.name for path in tmp_path.iterdir())
    assert ["er"] == [path.name for path in (tmp_path / "new").iterdir()]


def test_a_save_that_fails_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    result = compression.compress(str(saved), "fp16")

    def disk_is_full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", disk_is_full)

    with pytest.raises(CheckpointError, match="cannot be written: no space left"):
        result.save(tmp_path / "out")
    assert [] == list(tmp_path.iterdir())


def test_the_manifest_is_strict_json_that_tells_how_the_model_was_made(written):
    manifest = json.loads((written / "compression.json").read_text(), parse_constant=pytest.fail)
    opened = compression.load(written)

    assert "rtn(bits=3,group_size=8)" == manifest["text"] == opened.recipe.text
    assert ["rtn(bits=3,group_size=8)"] == manifest["executed"]
    assert {"text": "tiny", "digest": opened.base[1]} == manifest["base"]
    assert manifest["report"] == [dataclasses.asdict(entry) for entry in opened.report]
