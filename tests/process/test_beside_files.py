"""What goes with a checkpoint besides weights: every folder that is written has it, unchanged."""

import json
import shutil

import pytest
from checkpoints import says, transformers_model

import compression
from compression import CheckpointError
from compression.__main__ import main

GENERATION = {  # as published chat models have it; transformers refuses to write such sampling settings
    "bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": False, "temperature": 0.6, "top_p": 0.9,
    "transformers_version": "4.40.0",
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
BESIDE = {
    "generation_config.json": json.dumps(GENERATION),
    "chat_template.jinja": TEMPLATE,
    "additional_chat_templates/tools.jinja": "tools",
    "tokenizer.model": "\0 what sentencepiece wrote",
    "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2",
}
LEFT = ("README.md", "optimizer.pt", "modeling_own.py")  # of a base, and nothing that belongs to what is made of it


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of one block in fp16 with a tokenizer and all that published ones have beside the weights."""
    import torch

    from compression.checkpoints.base import byte_tokenizer

    folder = tmp_path_factory.mktemp("base") / "tiny"
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 258}
    transformers_model("LlamaForCausalLM", dtype=torch.float16, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    for name in LEFT:
        (folder / name).write_text("x")
    return folder


def written_in_memory(base, out, recipe, format):
    return compression.compress(str(base), recipe).save(out, format)


def written_block_by_block(base, out, recipe, format):
    assert "own" == format
    return compression.compress_to(out, str(base), recipe)


def written_by_the_command(base, out, recipe, format):
    assert 0 == main([recipe, "--base", str(base), "--out", str(out), "--format", format])
    return out


def written_twice(base, out, recipe, format):
    """What is opened from an artefact of ours, whose base may be gone, is saved again."""
    compression.compress(str(base), recipe).save(out.with_name("first"), format)
    return compression.load(out.with_name("first")).save(out, format)


def kept_by_the_cache(base, out, recipe, format):
    from compression.engine.kept_steps import StepCache

    store = StepCache(out.with_name("cache"), keep=lambda steps: True)
    compression.compress(str(base), recipe, cache=store).save(out, format)
    compression.compress(str(base), recipe, cache=store)  # reads what was kept, folders in it included
    (kept,) = (store.folder / "steps").iterdir()
    return kept


WRITERS = [
    *((write, recipe, "own")
      for write in (written_in_memory, written_block_by_block, written_by_the_command, kept_by_the_cache)
      for recipe in ("magnitude(scope=row)", "rtn(group_size=32)")),
    (written_twice, "rtn(group_size=32)", "own"),
    (written_in_memory, "structured(keep_layers=1,keep_kv_heads=1)", "own"),
    (written_by_the_command, "structured(keep_layers=1,keep_kv_heads=1)", "own"),
    *((write, "rtn(group_size=32,symmetric=true)", format)
      for write in (written_in_memory, written_by_the_command, written_twice) for format in ("gptq", "awq")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "steps", "format"), WRITERS, ids=lambda value: getattr(value, "__name__", str(value).partition("(")[0])
)
def test_every_writer_copies_it(base, tmp_path, write, steps, format):
    out = write(base, tmp_path / "out", steps, format)

    copied = [*BESIDE, "tokenizer.json", "tokenizer_config.json"]
    assert {name: (base / name).read_bytes() for name in copied} == {name: (out / name).read_bytes() for name in copied}
    assert [] == [name for name in LEFT if (out / name).exists()]
    if format != "own":
        return
    opened = compression.load(out)
    assert [1, 2] == opened.model.generation_config.eos_token_id
    assert {"default": TEMPLATE, "tools": "tools"} == opened.tokenizer.chat_template
    expected = compression.open_base(str(base)).tokenizer
    assert expected("What?").input_ids == opened.tokenizer("What?").input_ids
    assert type(expected) is type(opened.tokenizer)


@pytest.mark.parametrize("steps", ["fp16", "rtn(group_size=32)", "structured(keep_layers=1,keep_kv_heads=1)"])
def test_a_model_keeps_how_its_texts_are_generated(base, steps):
    settings = compression.compress(str(base), steps).model.generation_config

    assert ([1, 2], False, 0.6, 0.9) == (
        settings.eos_token_id, settings.do_sample, settings.temperature, settings.top_p
    )  # fmt: skip


def test_large_text_beside_a_tokenizer_is_left_alone(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    with open(tmp_path / "base" / "corpus.txt", "wb") as corpus:
        corpus.truncate(2**28 + 1)  # more than is read of a file that describes something; nothing of it is on disk

    before, beside = (compression.locate(str(folder)).tokenizer("a") for folder in (base, tmp_path / "base"))
    assert before == beside


def test_a_base_that_says_nothing_of_it_gets_no_defaults(saved, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in saved.iterdir():
        if path.name != "generation_config.json":
            (bare / path.name).write_bytes(path.read_bytes())
    out = compression.compress(str(bare), "fp16").save(tmp_path / "out")

    assert not (out / "generation_config.json").exists()
    assert (
        compression.load(out).model.generation_config
        is None
        is compression.open_base(str(bare)).model.generation_config
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_one_is_refused_before_any_work(folder, tmp_path, content):
    (folder / "generation_config.json").write_bytes(content)

    for open_it in (compression.open_base, lambda text: compression.compress_to(tmp_path / "out", text, "fp16")):
        with pytest.raises(CheckpointError, match=says("generation_config.json")):
            open_it(str(folder))
    assert not (tmp_path / "out").exists()
