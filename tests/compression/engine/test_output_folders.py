"""Where results are written: links, mount points and other disks are written to, or refused before any work."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import logits, transformers_model
from processes import completed

import compression
from compression import CheckpointError
from compression.__main__ import main
from compression.checkpoints.output import check_writable

RECIPE = "rtn(group_size=8)"


def saved_to(out, base):
    return compression.compress(str(base), RECIPE).save(out)


def streamed_to(out, base):
    return compression.compress_to(out, str(base), RECIPE)


def commanded_to(out, base):
    assert 0 == main([RECIPE, "--base", str(base), "--out", str(out)])
    return out


WRITERS = [saved_to, streamed_to, commanded_to]


def link(tmp_path):
    """A link to an empty folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    return tmp_path / "link"


def dangling(tmp_path):
    """A link to a folder that is to be made, a link among those above it."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "above").symlink_to(tmp_path / "deep")
    (tmp_path / "link").symlink_to(Path("above") / "new" / "er")
    return tmp_path / "link"


def empty(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o750)
    return tmp_path / "empty"


def disk():
    """An empty folder on another disk than temporary folders are on, or None."""
    import tempfile

    place = Path("/dev/shm")
    if place.is_dir() and os.access(place, os.W_OK) and os.stat(place).st_dev != os.stat(tempfile.gettempdir()).st_dev:
        return tempfile.TemporaryDirectory(dir=place)
    return None


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("make", [link, dangling, empty])
def test_a_link_and_an_empty_folder_are_filled(saved, tmp_path, make, write):
    out = make(tmp_path)
    was_a_link, mode = out.is_symlink(), out.stat().st_mode if out.exists() else None

    assert out == write(out, saved)

    assert was_a_link == out.is_symlink() and mode in (None, out.stat().st_mode)
    assert torch.equal(logits(compression.compress(str(saved), RECIPE).model), logits(compression.load(out).model))
    left = [path.name for folder in (out, out.resolve().parent, tmp_path) for path in folder.glob(".*")]
    assert [] == left
    assert "compression.json" in os.listdir(out)


@pytest.mark.parametrize("write", WRITERS)
def test_so_is_a_link_to_another_disk(saved, tmp_path, write):
    place = disk()
    if place is None:
        pytest.skip("there is no other disk to write to")
    with place as other:
        (tmp_path / "link").symlink_to(other)

        write(tmp_path / "link", saved)

        assert [] == [name for name in os.listdir(other) if name.startswith(".")]
        assert RECIPE == compression.load(tmp_path / "link").recipe.text


@pytest.mark.parametrize("write", WRITERS)
def test_so_is_an_empty_mount_point(saved, tmp_path, write):
    (point := tmp_path / "point").mkdir()
    mounted = completed(["mount", "-t", "tmpfs", "none", str(point)])
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        write(point, saved)
        assert RECIPE == compression.load(point).recipe.text
    finally:
        completed(["umount", str(point)], check=True)


def test_a_folder_that_nothing_can_be_renamed_to_is_filled(saved, tmp_path, monkeypatch):
    """As a mount point, where none can be had: a rename to it, and its removal, fail."""
    (point := tmp_path / "point").mkdir()
    replace, rmdir = os.replace, os.rmdir

    def refuse(path):
        if Path(path) == point:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", lambda a, b: (refuse(b), replace(a, b))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (refuse(b), replace(a, b))[1])
    monkeypatch.setattr(os, "rmdir", lambda path, **options: (refuse(path), rmdir(path, **options))[1])

    for write in WRITERS:
        write(point, saved)
        assert RECIPE == compression.load(point).recipe.text
        for path in point.iterdir():
            path.unlink()


def test_an_empty_folder_is_empty_again_where_filling_it_fails(saved, tmp_path, monkeypatch):
    out, replace, done = empty(tmp_path), os.replace, []

    def full_after_one(a, b):
        if Path(b).parent == out:
            if done:
                raise OSError(28, "No space left on device")
            done.append(b)
        return replace(a, b)

    result = compression.compress(str(saved), RECIPE)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_after_one)
        with pytest.raises(CheckpointError, match="No space left"):
            result.save(out)

    assert [] == os.listdir(out)
    assert RECIPE == compression.load(result.save(out)).recipe.text


def test_a_published_format_is_written_through_a_link(tmp_path):
    transformers_model("LlamaForCausalLM", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    out, steps = link(tmp_path), "rtn(group_size=16)"

    assert 0 == main([steps, "--base", str(tmp_path / "base"), "--out", str(out), "--format", "gptq"])

    assert steps == compression.load(out).recipe.text
    assert ["base", "link", "real"] == sorted(path.name for path in tmp_path.iterdir())


def circle(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    return tmp_path / "one"


def full(tmp_path):
    """A link to a folder that holds something."""
    out = link(tmp_path)
    (out / "notes.txt").write_text("mine")
    return out


@pytest.mark.parametrize("make", [circle, full])
@pytest.mark.parametrize("write", [streamed_to, saved_to])
def test_what_cannot_be_filled_is_refused(saved, tmp_path, make, write):
    out = make(tmp_path)

    with pytest.raises(CheckpointError, match="output folder"):
        write(out, saved)
    with pytest.raises(CheckpointError, match="output folder"):
        check_writable(out)


@pytest.mark.parametrize("steps", [RECIPE, "structured(keep_layers=1)"])
@pytest.mark.parametrize("format", ["own", "gptq"])
@pytest.mark.parametrize("make", [circle, full])
def test_the_command_refuses_it_before_any_weight_is_read(folder, tmp_path, capsys, make, steps, format):
    (folder / "model.safetensors").write_bytes(b"no tensors")

    assert 2 == main([steps, "--base", str(folder), "--out", str(make(tmp_path)), "--format", format])
    assert "error: output folder" in capsys.readouterr().err


@pytest.mark.parametrize("make", [link, dangling, empty])
def test_a_report_is_written_through_a_link(tmp_path, make):
    from report_rows import SIZE, row

    from bench.report.write import write

    out = make(tmp_path)

    assert all(path.exists() for path in write(out, [row(SIZE, 0.5, base_value=1.0)]))
    assert "tables.md" in os.listdir(out.resolve())


def test_a_report_behind_a_circle_of_links_is_refused(tmp_path):
    from bench.errors import OptionError
    from bench.report.write import writable

    with pytest.raises(OptionError, match="choose another folder"):
        writable(circle(tmp_path))
