"""Compressing into a folder block by block: the same bits as in memory, and what happens when it is interrupted."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from checkpoints import logits, says, transformers_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compression
from compression import CheckpointError, RecipeError
from compression import _stream as stream
from compression.__main__ import main
from compression._artefact import outline
from compression._blocks import Inputs
from compression._checkpoint import build, locate
from compression._files import digest_of_file
from compression._shapes import SHAPES
from compression._weights import open_weights

GPTQ = "gptq(group_size=8,samples=4,sequence_length=12)"
TWICE = f"{GPTQ}-gptq(bits=2,group_size=8,samples=2,sequence_length=8)"
STATE = "compression.state.json"
BLOCKS = 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint of four blocks."""
    folder = tmp_path_factory.mktemp("base") / "deep"
    transformers_model("LlamaForCausalLM", num_hidden_layers=BLOCKS).save_pretrained(folder)
    return folder


def write(folder, base, recipe=GPTQ, **options):
    return compression.compress_to(folder, str(base), recipe, **{"calibration": "random"} | options)


def tensors(folder):
    """Every tensor of a folder by name, whatever file it is in."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):
    pass


def stop_after(blocks):
    def progress(done, total, what):
        if done == blocks:
            raise Stop

    return progress


def interrupt(folder, base, recipe=GPTQ, *, after=2):
    with pytest.raises(Stop):
        write(folder, base, recipe, progress=stop_after(after))


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "fp16",
        "rtn(bits=3,group_size=8)",
        "nf4(group_size=32)",
        "hqq(group_size=8)",
        GPTQ,
        "gptq(group_size=8,act_order=true,samples=4,sequence_length=12)",
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
    index = json.loads((tmp_path / "stream/model.safetensors.index.json").read_text())
    assert expected.stored_bytes == index["metadata"]["total_size"]
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


# --- Interrupted ------------------------------------------------------------------------------------------------------


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


def test_a_killed_process_is_resumed_with_the_same_bits(tmp_path):
    """kill -9, which nothing in the process can answer, while blocks are being written."""
    blocks = 12
    transformers_model("LlamaForCausalLM", num_hidden_layers=blocks).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    arguments = [GPTQ, "--base", str(tmp_path / "base"), "--calibration", "random", "--device", "cpu", "--out"]
    deadline = time.monotonic() + 600
    with subprocess.Popen([sys.executable, "-m", "compression", *arguments, str(out)]) as process:
        try:
            while blocks_done(out) < 1 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
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
    (out / STATE).write_text(json.dumps(state))

    write(out, deep)
    write(tmp_path / "whole", deep)

    whole, resumed = tensors(tmp_path / "whole"), tensors(out)
    changed = {name.split(".")[2] for name in whole if not torch.equal(whole[name], resumed[name])}
    assert changed == {"2", "3"}


def test_a_run_that_was_killed_while_it_finished_is_finished(deep, tmp_path, monkeypatch):
    def killed(path, *arguments, **options):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(stream, "write_beside", killed)
        write(tmp_path / "out", deep)

    write(tmp_path / "out", deep)

    assert same(compression.compress(str(deep), GPTQ, calibration="random").model.state_dict(),
                compression.load(tmp_path / "out").model.state_dict())  # fmt: skip


def test_what_an_interrupted_run_took_is_counted(deep, tmp_path):
    interrupt(tmp_path / "out", deep)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    state["cost"] |= {"seconds": 1000.0, "peak_bytes": 10**12}
    (tmp_path / "out" / STATE).write_text(json.dumps(state))

    cost = compression.load(write(tmp_path / "out", deep)).cost

    assert 1000 < cost.seconds < 1100
    assert (10**12, 48) == (cost.peak_bytes, cost.calibration_tokens)


# --- What is refused --------------------------------------------------------------------------------------------------


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

    said = says(*words, "repeat that command, give another folder, or delete this one")
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
    (tmp_path / "out" / STATE).write_text(json.dumps(state))

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
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)

    said = says(f"{name}.safetensors is not what was written there")
    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", deep)


def test_a_folder_that_holds_something_else_is_refused_before_any_weight_is_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    said = says("is there already; give a new or an empty one")
    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out", folder, recipe="rtn")


def test_so_is_a_folder_that_is_finished(deep, tmp_path):
    write(tmp_path / "out", deep)

    with left_as_it_is(tmp_path / "out"), pytest.raises(CheckpointError, match=says("is there already")):
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


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_model_method(monkeypatch):
    """A registered method that takes the model as a whole."""
    from dataclasses import dataclass

    from compression import _registry

    monkeypatch.setattr(_registry, "METHODS", dict(_registry.discover()))

    @_registry.method("whole_test", leaves="dense")
    @dataclass(frozen=True, kw_only=True)
    class Whole(_registry.Method):
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


def test_the_command_goes_on_with_an_interrupted_run_and_says_so(deep, tmp_path, capsys):
    arguments = [GPTQ, "--base", str(deep), "--calibration", "random", "--device", "cpu"]
    interrupt(tmp_path / "out", deep)

    assert 0 == main([*arguments, "--out", str(tmp_path / "out"), "--json"])

    captured = capsys.readouterr()
    assert "is not finished: 2 blocks are done, going on behind them" in captured.err
    opened = compression.load(tmp_path / "out")
    facts = json.loads(captured.out)
    assert (opened.stored_bytes, opened.kernels(), opened.cost.peak_bytes) == (
        facts["stored_bytes"], facts["kernels"], facts["peak_bytes"]
    )  # fmt: skip
