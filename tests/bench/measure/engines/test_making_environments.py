"""The script that makes the environments of the engines; what it installs here is on every new environment anyway."""

import os
from dataclasses import replace

import pytest
from scripts import benchmark

from bench.measure.engines.environments import ENGINES, Requirement, has_module

pytestmark = pytest.mark.process

make = benchmark("engine_environments").make
PIP = Requirement(module="pip", install=("pip",), variable="COMPRESSION_NONE_PYTHON", script="none.py")


def test_an_environment_is_made_once_and_anew_for_other_requirements(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "pip", PIP)
    python = make("pip", tmp_path)
    witness = tmp_path / "pip" / "witness"
    witness.touch()

    assert has_module(python, "pip")
    assert not has_module(python, "torch")
    assert python == make("pip", tmp_path)
    assert witness.exists()

    (tmp_path / "pip" / "complete").write_text("pip install pip==1")
    assert python == make("pip", tmp_path)
    assert not witness.exists()


def test_an_environment_that_cannot_be_made_is_an_error_in_pips_words_and_begun_anew(tmp_path, monkeypatch):
    nowhere = replace(PIP, install=("--no-index", "a-package-that-is-nowhere"), module="nowhere")
    monkeypatch.setitem(ENGINES, "pip", nowhere)

    with pytest.raises(SystemExit, match=r"must succeed, but ended with status 1: .*a-package-that-is-nowhere"):
        make("pip", tmp_path)
    monkeypatch.setitem(ENGINES, "pip", replace(PIP, module="nowhere"))
    with pytest.raises(SystemExit, match="must have the module nowhere after pip install pip, but has not"):
        make("pip", tmp_path)

    assert os.listdir(tmp_path) == ["pip"]
    assert not (tmp_path / "pip" / "complete").exists()
