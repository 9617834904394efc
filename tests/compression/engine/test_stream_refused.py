"""Compressing block by block: what is refused, and that what lies in the folder stays as it is."""

import fcntl
import json
import os
from contextlib import contextmanager

import pytest
import torch
from block_by_block import GPTQ, STATE, deep_checkpoint, interrupt, write
from checkpoints import logits, rewrite, says
from safetensors.torch import load_file, save_file

import compression
from compression import CheckpointError, RecipeError
from compression.__main__ import main


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return deep_checkpoint(tmp_path_factory.mktemp("base") / "deep")


@contextmanager
def left_as_it_is(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "rtn(group_size=8)"}, ["another recipe", GPTQ, "rtn(group_size=8)"]),
        ({"seed": 1}, ["another seed: 0, now 1"]),
        ({"calibration": torch.ones(4, 12, dtype=torch.int64)}, ["another calibration text"]),
    ],
    ids=["recipe", "seed", "calibration"],
)
def test_what_a_run_with_other_settings_left_is_not_gone_on_with(deep, tmp_path, options, words):
    interrupt(tmp_path / "out", deep)

    said = says(*words, "repeat that command, or give another folder", "delete it to start again")
    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", deep, **options)


def test_nor_what_one_of_another_base_left(deep, saved, tmp_path):
    interrupt(tmp_path / "out", deep)

    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=says("another base digest")):
        write(tmp_path / "out", saved)


@pytest.mark.parametrize("key", ["version of torch", "version of transformers", "code of this package"])
def test_nor_what_other_code_left(deep, tmp_path, key):
    interrupt(tmp_path / "out", deep)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    state["identity"][key] += "1"
    rewrite(tmp_path / "out" / STATE, **state)

    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=says(f"another {key}")):
        write(tmp_path / "out", deep)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"identity": {}}', b'{"identity": 1, "cost": {}, "reports": []}']
)
def test_a_state_that_is_damaged_is_refused(deep, tmp_path, content):
    interrupt(tmp_path / "out", deep)
    (tmp_path / "out" / STATE).write_bytes(content)

    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=says(f"{STATE} is damaged", "delete")):
        write(tmp_path / "out", deep)


@pytest.mark.parametrize("name", ["model-00001-of-00005", "model-00003-of-00005", "inputs-2-0"])
@pytest.mark.parametrize("change", ["missing", "truncated", "replaced"])
def test_files_that_are_not_what_was_written_are_refused(deep, tmp_path, name, change):
    interrupt(tmp_path / "out", deep)
    path = tmp_path / "out" / f"{name}.safetensors"
    words = "is missing" if change == "missing" else "is corrupt: its SHA-256 does not match"
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)

    said = says(f"{name}.safetensors {words}", f"delete {tmp_path / 'out'} to start again")
    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", deep)


def test_a_folder_that_holds_something_else_is_refused_before_any_weight_is_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    said = says("already exists; give a new or an empty one")
    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", folder, recipe="rtn")


def test_so_is_a_folder_that_is_finished(deep, tmp_path):
    write(tmp_path / "out", deep)

    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=says("already exists")):
        write(tmp_path / "out", deep)


def test_two_processes_do_not_write_to_one_folder(deep, tmp_path):
    interrupt(tmp_path / "out", deep)
    other = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = says("another process is writing to")
        with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
            write(tmp_path / "out", deep)
    finally:
        os.close(other)
    write(tmp_path / "out", deep)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_where_nothing_can_be_written_no_weight_is_read(folder):
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="output folder /proc/self/out cannot be written"):
        write("/proc/self/out", folder, "rtn")


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    save_file({"model.embed_tokens.weight": torch.ones(48, 32)}, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM: missing"):
        write(tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_a_compressed_folder_is_no_base(deep, tmp_path):
    write(tmp_path / "out", deep)

    with pytest.raises(CheckpointError, match="is compressed already"):
        write(tmp_path / "again", tmp_path / "out")


@pytest.fixture
def whole_model_method(monkeypatch):
    """A registered method that takes the model as a whole."""
    from dataclasses import dataclass

    from compression.methods.base import ModelMethod
    from compression.recipes import registry

    monkeypatch.setattr(registry, "METHODS", dict(registry.discover()))

    @registry.method("whole_test", leaves="dense")
    @dataclass(frozen=True, kw_only=True)
    class Whole(ModelMethod):
        """Halves the last norm."""

        def apply(self, model, context):
            model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight / 2)
            return model


def test_a_method_for_whole_models_is_refused_and_by_the_command_run_in_memory(
    whole_model_method, deep, tmp_path, capsys
):
    with pytest.raises(RecipeError, match="cannot be compressed block by block: whole_test works on the whole model"):
        write(tmp_path / "out", deep, "whole_test-rtn(group_size=8)")

    assert 0 == main(["whole_test-rtn(group_size=8)", "--base", str(deep), "--out", str(tmp_path / "out")])

    assert "whole_test works on the whole model at once: the model is held in memory" in capsys.readouterr().err
    halved = compression.load(tmp_path / "out").model
    plain = compression.load(write(tmp_path / "plain", deep, "rtn(group_size=8)")).model
    assert torch.allclose(logits(halved), logits(plain) / 2)
