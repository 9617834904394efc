"""Compressing block by block, interrupted: the same call goes on behind the last block, to the same bits."""

import json
import resource
import signal
import sys

import pytest
import torch
from block_by_block import BLOCKS, GPTQ, STATE, TWICE, Stop, deep_checkpoint, interrupt, same, tensors, write
from checkpoints import rewrite, transformers_model
from processes import running, wait_until
from safetensors.torch import load_file, save_file

import compression
from compression import CheckpointError
from compression.__main__ import main
from compression.engine import shards
from compression.files.atomic import digest_of_file


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return deep_checkpoint(tmp_path_factory.mktemp("base") / "deep")


@pytest.mark.parametrize(
    ("text", "after"), [("rtn(group_size=8)", 1), ("rtn(group_size=8)", BLOCKS), (TWICE, 0), (TWICE, 2), (TWICE, 3)]
)
def test_an_interrupted_run_goes_on_behind_the_last_finished_block(deep, tmp_path, text, after):
    done = []
    interrupt(tmp_path / "out", deep, text, after=after)
    with pytest.raises(CheckpointError, match="is not finished"):
        compression.load(tmp_path / "out")

    write(tmp_path / "out", deep, text, progress=lambda at, total, what: done.append(at))
    write(tmp_path / "whole", deep, text)

    assert list(range(after, BLOCKS + 1)) == done
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))
    reports = [compression.load(tmp_path / name).report for name in ("whole", "out")]
    assert reports[0] == reports[1]
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "out")]
    assert files[0] == files[1]


@pytest.mark.process
def test_a_killed_process_is_resumed_with_the_same_bits(tmp_path):
    """kill -9, which nothing in the process can answer, while blocks are being written."""
    blocks = 12
    transformers_model("LlamaForCausalLM", num_hidden_layers=blocks).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    arguments = [GPTQ, "--base", str(tmp_path / "base"), "--calibration", "random", "--device", "cpu", "--out"]
    with running([sys.executable, "-m", "compression", *arguments, out]) as process:
        wait_until(lambda: blocks_done(out) >= 1, process)
        process.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == process.returncode
    killed_at = blocks_done(out)
    assert 1 <= killed_at < blocks
    before = {path.name: path.stat().st_ino for path in out.glob("model-*")}

    assert 0 == main([*arguments, str(out)])
    assert 0 == main([*arguments, str(tmp_path / "whole")])

    assert same(tensors(tmp_path / "whole"), tensors(out))
    after = {path.name: path.stat().st_ino for path in out.glob("model-*")}
    finished = [f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors" for i in range(killed_at + 1)]
    assert all(before[name] == after[name] for name in finished)  # they were not written again
    assert not list(out.glob(".*"))


def blocks_done(folder):
    try:
        return json.loads((folder / STATE).read_text())["done"]
    except FileNotFoundError:
        return -1


def test_a_resumed_run_with_other_inputs_would_be_seen(deep, tmp_path):
    """Negative control of the comparison: inputs that are not those of the block give other bits."""
    out, stored = tmp_path / "out", tmp_path / "out" / "inputs-2-0.safetensors"
    interrupt(out, deep)
    save_file({name: 2 * tensor + 1 for name, tensor in load_file(stored).items()}, stored)
    state = json.loads((out / STATE).read_text())
    state["files"][stored.name] = digest_of_file(stored)
    rewrite(out / STATE, **state)

    write(out, deep)
    write(tmp_path / "whole", deep)

    whole, resumed = tensors(tmp_path / "whole"), tensors(out)
    changed = {name.split(".")[2] for name in whole if not torch.equal(whole[name], resumed[name])}
    assert changed == {"2", "3"}


def test_a_run_that_was_killed_while_it_finished_is_finished(deep, tmp_path, monkeypatch):
    def killed(path, *arguments, **options):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shards, "write_beside", killed)
        write(tmp_path / "out", deep)

    write(tmp_path / "out", deep)

    assert same(compression.compress(str(deep), GPTQ, calibration="random").model.state_dict(),
                compression.load(tmp_path / "out").model.state_dict())  # fmt: skip


def test_a_state_that_names_no_schema_is_read(deep, tmp_path):
    """Seals of schema 1; those that earlier versions wrote are of other code, and refused for that."""
    interrupt(tmp_path / "out", deep)
    rewrite(tmp_path / "out" / STATE, schema=...)
    assert 2 == blocks_done(tmp_path / "out")

    write(tmp_path / "out", deep)
    write(tmp_path / "whole", deep)

    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))


def test_what_an_interrupted_run_took_is_counted(deep, tmp_path):
    interrupt(tmp_path / "out", deep)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    state["cost"] |= {"seconds": 1000.0, "peak_bytes": 10**12}
    rewrite(tmp_path / "out" / STATE, **state)

    cost = compression.load(write(tmp_path / "out", deep)).cost

    assert 1000 < cost.seconds < 1100
    assert (10**12, 48) == (cost.peak_bytes, cost.calibration_tokens)


def test_a_disk_that_is_full_leaves_what_is_done_and_the_same_call_goes_on(deep, tmp_path):
    """A limit on the size of files makes the system refuse a write, as a full disk does."""
    recipe = 'rtn(group_size=8,layers={"model.layers.[23].*":null})'  # dense blocks are larger than packed ones
    write(tmp_path / "whole", deep, recipe)
    sizes = [(tmp_path / "whole" / f"model-0000{i}-of-00005.safetensors").stat().st_size for i in (3, 4)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert sizes[0] < sizes[1]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes) // 2, limits[1]))
        with pytest.raises(CheckpointError, match=r"cannot be written: .*2 blocks now, and the same command goes on"):
            write(tmp_path / "out", deep, recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 2 == blocks_done(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))

    write(tmp_path / "out", deep, recipe)

    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))


def test_the_command_goes_on_with_an_interrupted_run_and_says_so(deep, tmp_path, capsys):
    arguments = [GPTQ, "--base", str(deep), "--calibration", "random", "--device", "cpu"]
    interrupt(tmp_path / "out", deep)

    assert 0 == main([*arguments, "--out", str(tmp_path / "out"), "--json"])

    captured = capsys.readouterr()
    assert "is not finished: 2 blocks are done; resuming after them" in captured.err
    opened = compression.load(tmp_path / "out")
    facts = json.loads(captured.out)
    assert (opened.stored_bytes, opened.kernels(), opened.cost.peak_bytes) == (
        facts["stored_bytes"], facts["kernels"], facts["peak_bytes"]
    )  # fmt: skip
