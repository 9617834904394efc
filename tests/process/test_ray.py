"""A cluster of Ray with two workers: what it measures is what one process measures, whatever befalls a worker."""

import os
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from processes import completed

import bench
from bench.results.journal import read, resume
from bench.results.row import REFUSED

pytest.importorskip("ray", reason="Ray is not installed (extra ray)")

QUALITY = os.path.join(os.path.dirname(bench.__file__), "test_quality.py")
EFFICIENCY = os.path.join(os.path.dirname(bench.__file__), "test_efficiency.py")
LOSES_WORKER, LOSES_PROCESS = "rtn(group_size=32)", "rtn(bits=8,group_size=32)"
RECIPES = ("fp16", LOSES_WORKER, "nf4(group_size=32)", LOSES_PROCESS)
TESTS = (f"{EFFICIENCY}::test_size", f"{EFFICIENCY}::test_cost", f"{QUALITY}::test_perplexity")
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "400"}

SABOTAGE = """
import os, signal
from bench import test_quality
from bench.session.session import Workbench

measure, dying = Workbench.measure, {"rtn(group_size=32)": os.getppid, "rtn(bits=8,group_size=32)": os.getpid}

def once(self, of, recipe, *arguments, **given):
    flag = f"died-{recipe.text}"
    if of == "perplexity" and recipe.text in dying and ("ALWAYS" in os.environ or not os.path.exists(flag)):
        self._begin(of, recipe, self.chosen(recipe))  # what has begun leaves word of that
        open(flag, "w").close()
        os.kill(dying[recipe.text](), signal.SIGKILL)
        signal.pause()
    return measure(self, of, recipe, *arguments, **given)

if "SABOTAGE" in os.environ and "COMPRESSION_BENCH_WORKER" in os.environ:
    Workbench.measure = once
"""

OTHER_VERSIONS = """
import importlib.metadata, os

if "OTHER_VERSIONS" in os.environ and "COMPRESSION_CHANNEL" in os.environ:  # on a node
    importlib.metadata.version = lambda name: "0.1"
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with a checkpoint and a text; a run of it is `run(...)`."""
    from checkpoints import TINY, transformers_model

    from compression.checkpoints.base import byte_tokenizer

    root = tmp_path_factory.mktemp("repository")
    transformers_model("LlamaForCausalLM", **TINY | {"vocab_size": 300}).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    (root / "data").mkdir()
    (root / "data" / "test.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day. " * 60)
    (root / "sabotage.py").write_text(SABOTAGE)
    (root / "sitecustomize.py").write_text(OTHER_VERSIONS)

    def run(*arguments, recipes=RECIPES, **environment):
        command = [
            *(sys.executable, "-m", "pytest", "-p", "bench.session.plugin", "-p", "sabotage", "-p", "no:cacheprovider"),
            *(*TESTS, "--base", "./tiny", "--data", "data", "--model", ",".join(recipes)),
            *("--length", "32", "--samples", "4", "--prompt-tokens", "8", "--max-new-tokens", "4"),
            *("--rootdir", ".", "-c", os.devnull, *arguments),
        ]
        path = os.pathsep.join([os.path.dirname(os.path.dirname(bench.__file__)), str(root)])
        known = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **RAY}
        done = completed(command, cwd=root, env=os.environ | known | environment)
        return SimpleNamespace(ret=done.returncode, said=done.stdout + done.stderr)

    alone = run("--journal", "alone.jsonl", "--update-baselines")
    assert alone.ret == 0, alone.said
    return SimpleNamespace(root=root, run=run)


@pytest.fixture(scope="module")
def disturbed(repository):
    """A run of a cluster in which one worker and one process of another are killed, and the run completes."""
    return repository.run("--ray", "auto", "--journal", "ray.jsonl", SABOTAGE="1")


def rows_of(repository, journal):
    return {(row.recipe, row.key): row for row in read(repository.root / journal).rows()}


def test_a_cluster_gives_the_rows_of_one_process_and_the_same_verdict(repository, disturbed):
    alone, together = rows_of(repository, "alone.jsonl"), rows_of(repository, "ray.jsonl")

    assert disturbed.ret == 0, disturbed.said
    assert set(alone) == set(together)
    refused = {name for name, row in together.items() if str(row.reason).startswith(REFUSED)}
    machine = {name for name in together if "compression_peak" in name[1] or "compression_s" in name[1]}
    assert len(alone.keys() - refused - machine) >= 30
    for name in alone.keys() - refused - machine:
        assert (alone[name].value, alone[name].items) == (together[name].value, together[name].items)
    [gate] = [line for line in disturbed.said.splitlines() if line.startswith("gate")]
    assert " passed, 0 failed" in gate


def test_nothing_is_measured_twice_though_a_worker_and_a_process_are_killed(repository, disturbed):
    for recipe in (LOSES_WORKER, LOSES_PROCESS):
        assert (repository.root / f"died-{recipe}").exists()
        assert f"{recipe}: started again, since its worker died," in disturbed.said
    records = read(repository.root / "ray.jsonl").records
    written = Counter((each["recipe"], each["metric"], str(each["params"])) for each in records if each["kind"] == "row"
                      and each["status"] == "ok")  # fmt: skip
    assert {1} == set(written.values())
    assert 1 == len({each["run"] for each in records}) and "passed" == records[-1]["status"]
    assert None is resume(repository.root / "ray.jsonl")
    assert f"{len(RECIPES) * len(TESTS)} passed in" in disturbed.said  # each test once


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--base", "random:mistral-7b"), {}, "fp16 needs 1 CPU, 0 GPUs and"),
        ((), {"OTHER_VERSIONS": "1"}, "torch is 0.1 there and"),
        (("--max-new-tokens", "999"), {}, "exceed the"),
    ],
    ids=["too little memory", "other versions", "an option"],
)
def test_what_cannot_be_is_refused_in_words_before_anything_is_measured(repository, arguments, environment, words):
    done = repository.run("--ray", "auto", "--journal", "refused.jsonl", *arguments, **environment)

    assert pytest.ExitCode.USAGE_ERROR == done.ret and words in done.said, done.said
    assert "INTERNALERROR" not in done.said and "Traceback" not in done.said
    assert not (repository.root / "refused.jsonl").exists() or not (repository.root / "refused.jsonl").read_text()


def test_a_recipe_that_ends_its_worker_every_time_fails_and_the_others_are_measured(repository):
    done = repository.run("--ray", "auto", "--journal", "dies.jsonl", recipes=RECIPES[:2], ALWAYS="1", SABOTAGE="1")

    assert pytest.ExitCode.TESTS_FAILED == done.ret, done.said
    assert f"{LOSES_WORKER}: its worker died 4 times" in done.said and "INTERNALERROR" not in done.said
    rows = rows_of(repository, "dies.jsonl")
    assert {"ok"} == {row.status for row in rows.values() if row.recipe == "fp16" and row.of == "perplexity"}
    lost = {(row.status, row.of) for row in rows.values() if row.recipe == LOSES_WORKER and row.status != "ok"}
    assert ("failed", "perplexity") in lost
    ends = [each["status"] for each in read(repository.root / "dies.jsonl").records if each["kind"] == "end"]
    assert ["failed"] == ends


def test_a_compressed_folder_is_the_same_from_a_node(repository, tmp_path):
    def compress(name, *arguments):
        command = [sys.executable, "-m", "compression", LOSES_WORKER, "--base", str(repository.root / "tiny")]
        known = {"PYTHONPATH": os.path.dirname(os.path.dirname(bench.__file__)), "OMP_NUM_THREADS": "1", **RAY}
        done = completed([*command, "--out", str(tmp_path / name), *arguments], cwd=tmp_path, env=os.environ | known)
        assert 0 == done.returncode, done.stderr
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}, done.stdout

    (alone, _), (there, said) = compress("alone"), compress("there", "--ray", "auto")
    assert alone and alone == there
    assert "stored_bytes" in said
