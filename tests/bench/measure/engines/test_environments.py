"""Which Python an engine has."""

import os
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import says

import bench
from bench.errors import EngineError, OptionError
from bench.measure.engines import environments
from bench.measure.engines.environments import ENGINES, Requirement, has_module, python_of, pythons

NOWHERE = Requirement(module="a_module_that_is_nowhere", install=("nowhere==1",), variable="COMPRESSION_NOWHERE_PYTHON",
                      script="none.py")  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An environment with the module."""
    folder = tmp_path_factory.mktemp("environment") / "other"
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / f"{NOWHERE.module}.py").write_text("raise ImportError('it is only looked for')")
    return folder / "bin" / "python"


@pytest.fixture
def bare(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    monkeypatch.setitem(ENGINES, "nowhere", NOWHERE)
    monkeypatch.delenv(NOWHERE.variable, raising=False)


def test_an_engine_that_is_installed_here_needs_no_other_python(monkeypatch):
    monkeypatch.delenv(ENGINES["transformers"].variable, raising=False)

    assert Path(sys.executable) == python_of("transformers")


def test_a_python_that_is_named_comes_first(other, monkeypatch):
    monkeypatch.setenv(NOWHERE.variable, "/no/such/python")

    assert other == python_of("nowhere", {"nowhere": other})


@pytest.mark.parametrize("module", [NOWHERE.module, "json"])
def test_the_variable_names_a_python_whether_the_engine_is_installed_here_or_not(other, monkeypatch, module):
    monkeypatch.setitem(ENGINES, "nowhere", replace(NOWHERE, module=module))
    monkeypatch.setenv(NOWHERE.variable, str(other))

    assert other == python_of("nowhere")
    monkeypatch.delenv(NOWHERE.variable)
    if module == "json":
        assert Path(sys.executable) == python_of("nowhere")


def test_without_any_the_error_names_all_three_ways():
    words = ("--runtime-python nowhere=PATH", "COMPRESSION_NOWHERE_PYTHON", "pip install nowhere==1",
             "benchmarks/engine_environments.py")  # fmt: skip
    with pytest.raises(EngineError, match=says(*words)):
        python_of("nowhere")


def test_a_python_that_is_named_and_lacks_the_engine_is_an_error_and_no_other_is_tried(other, bare, monkeypatch):
    monkeypatch.setenv(NOWHERE.variable, str(other))
    command = f"{bare} -m pip install nowhere==1"

    with pytest.raises(EngineError, match=says(f"{bare} must have the module {NOWHERE.module}", command)):
        python_of("nowhere", {"nowhere": bare})
    monkeypatch.setenv(NOWHERE.variable, str(bare))
    with pytest.raises(EngineError, match=says(command)):
        python_of("nowhere")


@pytest.mark.parametrize("name", ["none", "no-python"])
def test_what_is_no_python_is_an_error(tmp_path, name):
    path = tmp_path / name
    if name == "no-python":
        path.write_text("#!/bin/sh\necho 'what is -P?' >&2\nexit 2\n")
        path.chmod(0o755)

    with pytest.raises(EngineError, match=says(f"{path} must be a Python from 3.11 on, but", "Name another")):
        python_of("nowhere", {"nowhere": path})


def test_modules_of_this_python_are_not_seen_by_another(bare, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    assert has_module(sys.executable, "mine")
    assert not has_module(bare, "mine")


def test_the_key_of_a_judge_is_not_given_to_an_engine(monkeypatch):
    monkeypatch.setenv("BENCH_JUDGE_KEY", "secret")

    assert "secret" not in environments.environment_of(sys.executable).values()


@pytest.mark.parametrize(("pairs", "words"), [
    (["vllm"], "must be NAME=PATH, not 'vllm'"),
    (["vllm="], "must be NAME=PATH, not 'vllm='"),
    (["sglang=/x"], "one of transformers, vllm, llama.cpp, nowhere, not 'sglang'"),
    (["vllm=/x", "vllm=/y"], "must name vllm once, not by /x and /y"),
])  # fmt: skip
def test_pairs_that_name_no_python_are_refused(pairs, words):
    with pytest.raises(OptionError, match=says(words)):
        pythons(pairs)


def test_torch_transformers_and_numpy_have_the_versions_that_this_project_is_tested_with():
    pins = set((Path(bench.__file__).parents[1] / "constraints.txt").read_text().splitlines())

    assert set(ENGINES["transformers"].install) <= pins
    assert {"torch", "numpy"} == {
        each.partition("==")[0] for name in ("vllm", "llama.cpp") for each in pins.intersection(ENGINES[name].install)
    }


def test_every_engine_has_the_file_that_its_python_runs():
    folder = Path(environments.__file__).with_name("processes")

    assert [] == [name for name, need in ENGINES.items() if name != "nowhere" and not (folder / need.script).is_file()]
