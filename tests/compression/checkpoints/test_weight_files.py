"""Which files of a folder are its weights: those that transformers opens, whatever lies beside them."""

import json
import shutil

import pytest
import torch
from checkpoints import logits, rewrite, says, transformers_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import compression
from compression import CheckpointError, open_base

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of two models: the first in shards with their index, the second in one file."""
    shards, single = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("single")
    transformers_model("LlamaForCausalLM").save_pretrained(shards, max_shard_size="20KB")
    other = transformers_model("LlamaForCausalLM")
    other.model.norm.weight.data += 1
    other.save_pretrained(single)
    assert (shards / INDEX).exists() and not (shards / "model.safetensors").exists()
    return shards, single


@pytest.fixture
def make(sets, tmp_path_factory):
    """A new folder of the files of the first, the second or both, a few of which can be left out."""

    def folder(*, shards, single, without=()):
        made = tmp_path_factory.mktemp("folder") / "tiny"
        for source, wanted in zip(sets, (shards, single), strict=True):
            for path in source.iterdir() if wanted else ():
                if path.name not in without:
                    made.mkdir(exist_ok=True)
                    shutil.copyfile(path, made / path.name)
        return made

    return folder


def norm(folder):
    return open_base(str(folder)).model.model.norm.weight


def by_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model.norm.weight


def foreign(folder):
    """What trainers, other formats and other libraries leave beside weights; some of it cannot even be opened."""
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "consolidated.safetensors")
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    save_file({"lm_head.weight": torch.full((48, 32), torch.nan)}, folder / "model.fp16.safetensors")
    for name in ("optimizer.safetensors", "optimizer.pt", "training_args.bin", "scheduler.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(b"no tensors")
    (folder / "checkpoint-1").mkdir()
    shutil.copyfile(folder / "consolidated.safetensors", folder / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize(("shards", "single"), [(True, False), (False, True)], ids=["index", "single"])
def test_files_that_are_no_weights_of_the_model_change_nothing(make, shards, single):
    folder = make(shards=shards, single=single)
    before, digest = norm(folder), open_base(str(folder)).digest

    foreign(folder)

    base = open_base(str(folder))
    assert torch.equal(before, base.model.model.norm.weight) and torch.equal(before, by_transformers(folder))
    assert digest == base.digest


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_index_of_files_that_are_gone_is_no_second_set(make, sets, data):
    names = sorted(path.name for path in sets[0].glob("*.safetensors"))
    gone = data.draw(st.sets(st.sampled_from(names), min_size=1))

    folder = make(shards=True, single=True, without=gone)

    assert torch.equal(norm(folder), by_transformers(folder))
    assert torch.equal(norm(folder), load_file(sets[1] / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', "[]", "{", '{"weight_map": {"a": "../b"}}'])
def test_so_is_one_that_is_damaged(make, content):
    folder = make(shards=False, single=True)
    (folder / INDEX).write_text(content)

    assert torch.equal(norm(folder), by_transformers(folder))


def test_two_sets_that_differ_are_refused_by_name(make):
    folder = make(shards=True, single=True)

    words = says("two sets of weights", "differ in model.norm.weight", "model.safetensors, which transformers", INDEX)
    with pytest.raises(CheckpointError, match=words):
        open_base(str(folder))
    with pytest.raises(CheckpointError, match=words):
        compression.compress_to(folder.parent / "out", str(folder), "rtn(group_size=8)")


@pytest.mark.parametrize("change", [{"extra": torch.ones(1)}, {"model.norm.weight": torch.ones(32).half()}], ids=str)
def test_so_are_sets_of_other_names_or_types(make, change):
    folder = make(shards=True, single=False)
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    save_file(tensors | change, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=says("two sets of weights", f"differ in {next(iter(change))}")):
        open_base(str(folder))


def test_two_sets_that_are_alike_are_one(make):
    folder = make(shards=True, single=False)
    before = norm(folder)
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert torch.equal(before, norm(folder))


def test_an_index_may_name_the_single_file(make):
    folder = make(shards=False, single=True)
    weight_map = {name: "model.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    assert torch.equal(norm(folder), by_transformers(folder))


@pytest.mark.parametrize("index", [False, True])
def test_what_the_configuration_names_comes_first(make, sets, index):
    folder = make(shards=True, single=True)
    named = "other.safetensors.index.json" if index else "other.safetensors"
    if index:
        (folder / INDEX).rename(folder / named)
    else:
        (folder / "model.safetensors").rename(folder / named)
    rewrite(folder / "config.json", transformers_weights=named)

    assert torch.equal(norm(folder), by_transformers(folder))
    written = compression.compress(str(folder), "fp16").save(folder.parent / "out")
    assert torch.equal(norm(folder), by_transformers(written))


@pytest.mark.parametrize("named", ["../other.safetensors", "/other.safetensors", "weights.bin", 3, "gone.safetensors"])
def test_a_configuration_that_names_no_such_file_is_refused(make, named):
    folder = make(shards=False, single=True)
    rewrite(folder / "config.json", transformers_weights=named)

    with pytest.raises(CheckpointError, match=says("config.json")):
        open_base(str(folder))


@pytest.mark.parametrize("name", ["../tiny2/model.safetensors", "/tmp/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(make, name):
    folder = make(shards=True, single=False)
    rewrite(folder / INDEX, weight_map={"model.norm.weight": name})

    with pytest.raises(CheckpointError, match=says(INDEX, name, "not in its folder")):
        open_base(str(folder))


def test_an_index_that_names_missing_files_is_refused(make):
    folder = make(shards=True, single=False)
    gone = min(folder.glob("*.safetensors"))
    gone.unlink()

    with pytest.raises(CheckpointError, match=says(f"{INDEX} names missing files: {gone.name}")):
        open_base(str(folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_an_index_that_names_nothing_is_refused_where_it_is_needed(make, content):
    folder = make(shards=True, single=False)
    (folder / INDEX).write_text(content)

    with pytest.raises(CheckpointError, match=INDEX):
        open_base(str(folder))


def test_a_tensor_in_two_files_is_refused(make):
    folder = make(shards=True, single=False)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    shared = next(name for name, file in weight_map.items() if file == first)
    path = folder / second
    save_file(load_file(path) | {shared: load_file(folder / first)[shared]}, path, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=says(f"tensor {shared} is also in another file")):
        open_base(str(folder))


def test_files_that_nothing_names_as_weights_are_named_in_the_refusal(make):
    folder = make(shards=True, single=False, without=[INDEX])

    with pytest.raises(CheckpointError, match=says("has neither model.safetensors nor", "model-00001-of-")):
        open_base(str(folder))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        by_transformers(folder)


def test_of_the_hub_only_the_weights_that_are_opened_are_fetched(make, monkeypatch):
    folder, fetched = make(shards=True, single=False), []

    def snapshot(text, *, allow_patterns, revision=None):
        fetched.append((allow_patterns, revision))
        if len(fetched) == 1:
            for path in folder.glob("model-*.safetensors"):
                path.rename(folder.parent / path.name)
        else:
            for name in allow_patterns:
                (folder.parent / name).rename(folder / name)
        return str(folder)

    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    expected = logits(open_base(str(folder)).model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)

    assert torch.equal(expected, logits(open_base("owner/name").model))
    assert "*.safetensors" not in fetched[0][0] and {"chat_template*", "*.json"} <= set(fetched[0][0])
    assert [(names, folder.name)] == fetched[1:]
