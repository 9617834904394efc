"""What comes with a checkpoint is read and never run: not if the answer to every question is yes."""

import ast
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import rewrite, says, transformers_model
from processes import completed

import bench
import compression
from bench.errors import OptionError
from bench.measure.judge.clarity import SmallModel
from compression import CheckpointError
from compression.checkpoints.base import byte_tokenizer

ROOTS = [Path(package.__file__).parent for package in (compression, bench)]
CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""
MAPS = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
OPENINGS = {
    "a base": "compression.open_base({folder!r}).tokenizer",
    "its tokenizer": "compression.locate({folder!r}).tokenizer",
    "a recipe": "compression.compress({folder!r}, 'nf4(group_size=32)')",
    "an artefact": "compression.load({folder!r}).tokenizer",
    "a fluency model": "clarity.SmallModel({folder!r})",
}


@pytest.fixture
def evil(tmp_path):
    """A checkpoint of a model type that nobody knows, with code beside it that leaves a file."""
    folder = tmp_path / "evil"
    transformers_model("LlamaForCausalLM", vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rewrite(folder / "config.json", model_type="evil", auto_map=MAPS)
    rewrite(folder / "tokenizer_config.json", tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})  # fmt: skip
    (folder / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return folder


def answered_yes(folder, *openings):
    """What each way to open the folder raises, in a process that is told yes as often as it asks."""
    code = "import compression\nfrom bench.measure.judge import clarity\n"
    for opening in openings:
        code += f"try:\n    {opening.format(folder=str(folder))}\n"
        code += "except Exception as error:\n    print(type(error).__name__, str(error).replace(chr(10), ' '))\n"
    done = completed(
        [sys.executable, "-c", code],
        input="y\n" * 1000,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")},
    )
    assert "Do you wish to run" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_code_beside_a_checkpoint_is_never_run_whatever_is_answered(evil, tmp_path):
    said = answered_yes(evil, *OPENINGS.values())

    assert len(OPENINGS) == len(said), said
    assert not (tmp_path / "mark").exists()
    assert "model_type 'evil' is not that of LlamaForCausalLM" in said[0]
    assert all("Error" in line.split()[0] for line in said)
    assert not (tmp_path / "modules").exists()


@pytest.mark.process
def test_the_code_would_have_run(evil, tmp_path):
    """Negative control: transformers itself asks, and runs it."""
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(evil)!r})"
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    completed([sys.executable, "-c", code], input="y\n" * 9, env=env)

    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_model_type_that_is_not_the_architectures_is_refused(evil, architecture):
    rewrite(evil / "config.json", architectures=[architecture], model_type="mistral")

    with pytest.raises(CheckpointError, match=says("model_type 'mistral' is not that of", architecture, "never run")):
        _ = compression.locate(str(evil)).config


def test_a_pickle_is_opened_by_nothing_even_as_the_weights_of_a_fluency_model(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "mark").write_text, ("it ran",))

    folder = tmp_path / "pickled"
    transformers_model("LlamaForCausalLM").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle)

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can run code when opened and is not read"):
        compression.open_base(str(folder))
    with pytest.raises(OptionError, match="cannot be opened"):
        SmallModel(str(folder))
    assert not (tmp_path / "mark").exists()


def calls():
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.name}:{node.lineno}", ast.unparse(node.func), node


def test_every_call_that_could_load_code_says_that_it_must_not():
    """A new call of the kind fails here until it says so."""
    said = {}
    for where, name, node in calls():
        words = {each.arg: ast.unparse(each.value) for each in node.keywords}
        if name == "nn.Embedding.from_pretrained":
            continue  # torch's, of a tensor
        if name.endswith((".from_pretrained", "SentenceTransformer", "AutoModelForCausalLM.from_config")):
            if name.endswith("from_config") and "memory_process" in where:
                continue  # of a configuration made there
            said[where, name] = words.get("trust_remote_code") == "False"
        elif name == "torch.load":
            said[where, name] = words.get("weights_only") == "True"
        elif name.rpartition(".")[0] in ("pickle", "dill", "joblib", "marshal", "shelve") or name in ("eval", "exec"):
            # which runs programs in a jail; and what processes of one run say to each other, as torch.distributed does
            said[where, name] = "warden" in where or "messages" in where
        elif name.endswith("np.load"):
            said[where, name] = "allow_pickle" not in words

    assert len(said) >= 8
    assert [] == sorted(place for place, safe in said.items() if not safe)


def test_what_stands_in_a_configuration_does_not_choose_how_it_is_run(tmp_path):
    transformers_model("LlamaForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel",
            auto_map=MAPS, trust_remote_code=True)  # fmt: skip

    model = compression.open_base(str(tmp_path)).model

    assert "sdpa" == model.config._attn_implementation
    assert not hasattr(model.config, "auto_map")
    assert json.loads((tmp_path / "config.json").read_text())["trust_remote_code"]
