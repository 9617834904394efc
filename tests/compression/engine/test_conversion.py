"""Checkpoints converted piece by piece: the tensors of a whole conversion, a block of memory, and runs that resume."""

import fcntl
import functools
import json
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from block_by_block import STATE, Stop, same, stop_after, tensors
from checkpoints import logits, says, transformers_model
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import running, wait_until

import compression
from compression import CheckpointError, CompressionError, LayerError
from compression.__main__ import main
from compression.architectures.random_shapes import SHAPES
from compression.checkpoints.base import build
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.opening import open_unread
from compression.cost import CostMeter
from compression.engine import shards
from compression.engine.conversion import convert

SYMMETRIC = "rtn(group_size=32,symmetric=true)"
BLOCKS = 4
SOURCES = ("streamed", *formats.names())  # what is compressed block by block, and what is saved
CASES = [  # architecture, tied, steps
    ("LlamaForCausalLM", False, SYMMETRIC),
    ("LlamaForCausalLM", False, "nf4(group_size=32,double_quant=true)"),
    ("LlamaForCausalLM", True, "gguf(type=q8_0)"),
    ("Qwen2ForCausalLM", True, "rtn(group_size=32)"),
    ("Qwen2ForCausalLM", True, "llm_int8"),
    ("Qwen2ForCausalLM", True, "rtn(bits=8,group_size=32,symmetric=true,embeddings=8)"),
    ("Qwen2MoeForCausalLM", False, "rtn_fp(element=e2m1,group_size=16,scale=e4m3)"),
    ("Phi3ForCausalLM", False, "rtn(group_size=32)"),
    ("GptOssForCausalLM", False, "rtn(group_size=32)"),
    ("LlamaForCausalLM", False, "magnitude"),
]


def made(folder, architecture="LlamaForCausalLM", recipe=SYMMETRIC, *, tied=False, blocks=2):
    """A small model in bf16, compressed."""
    model = transformers_model(architecture, tied=tied, dtype=torch.bfloat16, hidden_size=64, intermediate_size=64,
                               num_hidden_layers=blocks)  # fmt: skip
    model.save_pretrained(folder, max_shard_size="40KB")
    return compression.compress(str(folder), recipe)


def outcome(write):
    """None, or why it was refused."""
    try:
        write()
    except CompressionError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A compressed model of four blocks in our own format."""
    folder = tmp_path_factory.mktemp("deep")
    return made(folder / "base", blocks=BLOCKS).save(folder / "own")


# --- What is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model of a case in a format, if that holds it, made when it is first asked for; else None."""

    @functools.cache
    def result_of(case):
        folder, (architecture, tied, steps) = tmp_path_factory.mktemp("case"), case
        return folder, made(folder / "base", architecture, steps, tied=tied)

    @functools.cache
    def folder_of(case, name):
        folder, result = result_of(case)
        if name == "streamed":
            return compression.compress_to(folder / name, str(folder / "base"), case[2])
        return None if outcome(lambda: result.save(folder / name, name)) else folder / name

    return folder_of


@settings(max_examples=4, deadline=None)
@given(case=st.sampled_from(CASES), source=st.sampled_from(SOURCES), target=st.sampled_from(formats.names()),
       after=st.integers(0, 2))  # fmt: skip
def test_a_format_becomes_another_as_it_does_at_once(saved, case, source, target, after):
    with tempfile.TemporaryDirectory() as folder:
        check_pair(saved(case, source) or saved(case, "own"), target, Path(folder), after)


def check_pair(path, target, folder, after=None):
    """Converted piece by piece, interrupted in between, a checkpoint is what it is if it is opened and saved."""
    whole, out = folder / "whole", folder / "out"
    expected = outcome(lambda: compression.load(path).save(whole, target))
    if after is not None and expected is None:
        with suppress(Stop):
            convert(open_unread(str(path)), out, target, stop_after(after))

    if not out.exists() or (out / STATE).exists():
        assert expected == outcome(lambda: convert(open_unread(str(path)), out, target)), target

    assert (expected is None) == out.exists()
    if expected is None:
        check_alike(whole, out)


@pytest.mark.process
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_every_format_becomes_every_other_as_it_does_at_once(saved, tmp_path, case):
    for source in SOURCES:
        for target in formats.names():
            if (path := saved(case, source)) is not None:
                (tmp_path / f"{source}-{target}").mkdir()
                check_pair(path, target, tmp_path / f"{source}-{target}")


def check_alike(whole, out):
    """The same tensors, and the same files beside them but for what names the files of weights."""
    assert same(tensors(whole), tensors(out))
    beside = [{path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"
               and path.name not in ("compression.json", "model.safetensors.index.json")}
              for folder in (whole, out)]  # fmt: skip
    assert beside[0] == beside[1]
    first, second = compression.load(whole), compression.load(out)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert (first.recipe, first.report, first.notes) == (second.recipe, second.report, second.notes)


@pytest.mark.parametrize("target", ["own", "gguf"])
def test_so_does_a_dense_checkpoint(tmp_path, target):
    made(tmp_path / "base", blocks=3)
    compression.compress(str(tmp_path / "base"), "fp16").save(tmp_path / "whole", target)

    convert(open_unread(str(tmp_path / "base")), tmp_path / "out", target)

    check_alike(tmp_path / "whole", tmp_path / "out")


def test_columns_in_another_order_are_seen_before_anything_is_written(tmp_path):
    result = made(tmp_path / "base", recipe="fp16")
    result = compression.compress(str(tmp_path / "base"), "gptq(group_size=32,static_groups=false,samples=4,"
                                  "sequence_length=12)", calibration="random")  # fmt: skip
    result.save(tmp_path / "gptq", "gptq")
    assert all(layer.weight_part.permutation is not None
               for layer in compression.architectures.decoder.stored_layers(result.model).values())  # fmt: skip

    convert(open_unread(str(tmp_path / "gptq")), tmp_path / "own", "own")
    with pytest.raises(LayerError, match=says("activation order")):
        convert(open_unread(str(tmp_path / "gptq")), tmp_path / "awq", "awq", lambda *told: pytest.fail("it began"))

    assert torch.equal(logits(result.model), logits(compression.load(tmp_path / "own").model))


def test_an_index_names_the_file_of_every_tensor_and_transformers_reads_it(tmp_path):
    from transformers import AutoModelForCausalLM

    made(tmp_path / "base", blocks=3)
    for target in ("own", "gptq"):
        source = tmp_path / "base"
        if target == "gptq":
            source = compression.compress_to(tmp_path / "rtn", str(source), SYMMETRIC)
        convert(open_unread(str(source)), tmp_path / target, target)
        index = json.loads((tmp_path / target / "model.safetensors.index.json").read_text())
        assert tensors(tmp_path / target).keys() == index["weight_map"].keys()
        assert 4 == len(set(index["weight_map"].values())) == len(list((tmp_path / target).glob("*.safetensors")))
        assert sum(tensor.nbytes for tensor in tensors(tmp_path / target).values()) == index["metadata"]["total_size"]

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="auto").eval()
    assert torch.equal(logits(compression.open_base(str(tmp_path / "base")).model), logits(opened))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["own", "gguf"])
def test_memory_holds_a_block_and_not_the_model(monkeypatch, tmp_path, target):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
              "dtype": "float32", "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024,
              "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    monkeypatch.setitem(SHAPES, "deep", config)
    skeleton = build(config, torch.float32, device="meta")
    block, whole = (4 * sum(p.numel() for p in part.parameters()) for part in (skeleton.model.layers[0], skeleton))
    compression.compress_to(tmp_path / "in", "random:deep", "fp16")

    for path in (tmp_path / "in").glob("tokenizer*"):  # of bytes, for which llama.cpp has no name
        path.unlink()

    with CostMeter("cpu") as meter:
        convert(open_unread(str(tmp_path / "in")), tmp_path / "out", target)

    assert block / 2 <= meter.cost(0).peak_bytes <= 6 * block < whole / 2


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2, BLOCKS])
def test_an_interrupted_run_goes_on_behind_the_last_finished_block(deep, tmp_path, after):
    done = []
    with pytest.raises(Stop):
        convert(open_unread(str(deep)), tmp_path / "out", "gptq", stop_after(after))
    with pytest.raises(CheckpointError, match="is not finished"):
        compression.load(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()

    convert(open_unread(str(deep)), tmp_path / "out", "gptq", lambda at, total, what: done.append(at))
    convert(open_unread(str(deep)), tmp_path / "whole", "gptq")

    assert [after, *range(after + (after > 0), BLOCKS + 1)] == done
    assert_equal_folders(tmp_path / "whole", tmp_path / "out")


def assert_equal_folders(one, other):
    assert [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one,)] == [
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (other,)
    ]


def test_a_run_that_was_killed_while_it_finished_is_finished(deep, tmp_path, monkeypatch):
    def killed(folder, *arguments, **options):
        (folder / "config.json").write_text("{}")
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(shards, "write_beside", killed)
        convert(open_unread(str(deep)), tmp_path / "out", "gptq")
    assert not (tmp_path / "out" / "config.json").exists()

    convert(open_unread(str(deep)), tmp_path / "out", "gptq")
    convert(open_unread(str(deep)), tmp_path / "whole", "gptq")

    assert_equal_folders(tmp_path / "whole", tmp_path / "out")


def test_of_a_format_of_one_file_nothing_is_left_and_it_begins_anew(deep, tmp_path):
    with pytest.raises(Stop):
        convert(open_unread(str(deep)), tmp_path / "out", "gguf", stop_after(2))
    assert [] == list(tmp_path.iterdir())

    convert(open_unread(str(deep)), tmp_path / "out", "gguf")
    assert ["model.gguf"] == [path.name for path in (tmp_path / "out").iterdir()]


@pytest.mark.process
def test_a_killed_process_is_resumed_with_the_same_bits(tmp_path):
    """kill -9, which nothing in the process can answer, while blocks are being written."""
    blocks, out = 24, tmp_path / "out"
    made(tmp_path / "base", blocks=blocks).save(tmp_path / "in")
    arguments = ["convert", str(tmp_path / "in")]
    with running([sys.executable, "-m", "compression", *arguments, out, "--format", "gptq"]) as process:
        wait_until(lambda: blocks_done(out) >= 1, process)
        process.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == process.returncode
    killed_at = blocks_done(out)
    assert 1 <= killed_at < blocks
    before = {path.name: path.stat().st_ino for path in out.glob("model-*")}

    assert 0 == main([*arguments, str(out), "--format", "gptq"])
    assert 0 == main([*arguments, str(tmp_path / "whole"), "--engine", "gptqmodel"])

    assert_equal_folders(tmp_path / "whole", out)
    after = {path.name: path.stat().st_ino for path in out.glob("model-*")}
    finished = [f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors" for i in range(killed_at + 1)]
    assert all(before[name] == after[name] for name in finished)  # they were not written again


def blocks_done(folder):
    try:
        return json.loads((folder / STATE).read_text())["done"]
    except FileNotFoundError:
        return -1


def test_the_command_goes_on_with_an_interrupted_run_and_says_so(deep, tmp_path, capsys):
    out = str(tmp_path / "out")
    with pytest.raises(Stop):
        convert(open_unread(str(deep)), out, "compressed-tensors", stop_after(2))

    assert 0 == main(["convert", str(deep), out, "--engine", "vllm"])  # whose first format would be another one

    captured = capsys.readouterr()
    assert "is not finished: 2 blocks are done; resuming after them" in captured.err
    assert "format: compressed-tensors\n" in captured.out


def test_what_was_killed_behind_compressing_names_the_command_that_goes_on(deep, tmp_path, capsys):
    base, out = str(deep.parent / "base"), tmp_path / "out"
    compression.compress_to(tmp_path / "out.own", base, SYMMETRIC)
    with pytest.raises(Stop):
        convert(open_unread(str(tmp_path / "out.own")), out, "gptq", stop_after(2))

    assert 2 == main([SYMMETRIC, "--base", base, "--out", str(out), "--format", "gptq"])

    command = f"convert {out}.own {out} --format gptq"
    assert command in capsys.readouterr().err
    assert 0 == main(command.split())
    assert compression.load(out).published_formats


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_what_is_not_finished_is_left_as_it_is_by_every_other_command(deep, tmp_path, capsys):
    out = str(tmp_path / "out")
    other = made(tmp_path / "base").save(tmp_path / "other")
    with pytest.raises(Stop):
        convert(open_unread(str(deep)), out, "gptq", stop_after(2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    for arguments, words in (
        (["convert", str(deep), out, "--format", "own"], ["made with another format: 'gptq', now 'own'"]),
        (["convert", str(deep), out, "--format", "gguf"], ["already exists"]),
        (["convert", str(other), out, "--format", "gptq"], ["made with another source"]),
        (["convert", out, f"{out}2", "--format", "own"], ["is not finished"]),
        ([SYMMETRIC, "--base", str(tmp_path / "base"), "--out", out], ["made with another command: 'convert'"]),
    ):
        assert 2 == main(arguments)
        said = " ".join(capsys.readouterr().err.split())
        assert [] == [word for word in words if word not in said], said
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_two_processes_do_not_write_to_one_folder(deep, tmp_path):
    with pytest.raises(Stop):
        convert(open_unread(str(deep)), tmp_path / "out", "gptq", stop_after(2))
    other = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing to"):
            convert(open_unread(str(deep)), tmp_path / "out", "gptq")
    finally:
        os.close(other)
    convert(open_unread(str(deep)), tmp_path / "out", "gptq")


@pytest.fixture
def rounded(tmp_path):
    """A model of which one layer, in its third block, has scales that fp16 does not hold."""
    result = made(tmp_path / "base", blocks=BLOCKS)
    part = result.model.model.layers[2].mlp.up_proj.weight_part
    part.scales = part.scales.float() * (1 + 2**-20)
    return result.save(tmp_path / "in")


@pytest.mark.parametrize(("format", "words"), [("gptq", "would round its scales"), ("gguf", "in fp16, which would")])
def test_what_a_block_refuses_leaves_no_folder_and_names_the_layer(rounded, tmp_path, format, words):
    told = []
    with pytest.raises(LayerError, match=says(words, "model.layers.2.mlp.up_proj")):
        convert(open_unread(str(rounded)), tmp_path / "out", format, lambda done, total, what: told.append(done))

    assert 2 == told[-1]
    assert {"in", "base"} == {path.name for path in tmp_path.iterdir()}


def test_an_engine_gets_the_next_format_where_values_do_not_fit_the_first(rounded, tmp_path, capsys):
    assert 0 == main(["convert", str(rounded), str(tmp_path / "out"), "--engine", "vllm"])
    assert "format: compressed-tensors\n" in capsys.readouterr().out

    assert 2 == main(["convert", str(rounded), str(tmp_path / "other"), "--engine", "llama.cpp"])
    assert "no format holds this model for llama.cpp: format gguf stores scales in fp16" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_block_that_is_damaged_leaves_no_folder(deep, tmp_path):
    result = compression.load(deep)
    result.model.model.layers[2].mlp.up_proj.weight_part.scales[0, 0] = float("nan")
    source = result.save(tmp_path / "in")

    with pytest.raises(CheckpointError, match=says("model.layers.2.mlp.up_proj", "NaN or infinite")):
        convert(open_unread(str(source)), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
