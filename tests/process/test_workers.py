"""Several workers of pytest-xdist: what they measure together is what one process measures, whatever befalls one."""

import json
import os
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from checkpoints import says
from processes import completed

import bench
from bench.gate.verdicts import Baseline
from bench.metrics import all_metrics
from bench.results.journal import Journal, read, resume
from bench.session import worker_place, workers
from bench.session.worker_place import Worker, placed

pytest.importorskip("xdist")

EFFICIENCY = os.path.join(os.path.dirname(bench.__file__), "test_efficiency.py")
QUALITY = os.path.join(os.path.dirname(bench.__file__), "test_quality.py")
SOUND = ("fp16", "rtn(group_size=32)", "nf4(group_size=32)")
DIES, LOSES, EATS = "rtn(bits=2,group_size=32)", "rtn(bits=3,group_size=32)", "rtn(bits=8,group_size=32)"
MEASURED = {
    f"{EFFICIENCY}::test_size": "artefact",
    f"{EFFICIENCY}::test_cost": "cost",
    f"{EFFICIENCY}::test_generation": "generation",
    f"{QUALITY}::test_perplexity": "perplexity",
}

SABOTAGE = """
import os, signal
from compression.methods.quantization.weight_only.rtn import RTN

sound = RTN.compress_linear

def compress_linear(self, linear, context):
    import torch
    if context is None:  # it is asked what it stores
        return sound(self, linear, context)
    if self.bits == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if self.bits == 3:
        raise torch.AcceleratorError("CUDA error: device lost")
    if self.bits == 8:
        raise torch.OutOfMemoryError("CUDA out of memory: 9 GiB wanted")
    return sound(self, linear, context)

if "SABOTAGE" in os.environ:
    RTN.compress_linear = compress_linear
if "GROWN" in os.environ:
    from bench.metrics import size

    size.stored = lambda model, stored=size.stored: stored(model) + 1
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with a checkpoint, a text, and a baseline that one process recorded; a run of it is `run(...)`."""
    from checkpoints import TINY, transformers_model

    from compression.checkpoints.base import byte_tokenizer

    root = tmp_path_factory.mktemp("repository")
    transformers_model("LlamaForCausalLM", **TINY | {"vocab_size": 300}).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    (root / "data").mkdir()
    (root / "data" / "test.txt").write_text("The quick brown fox jumps over the lazy dog, twice a day. " * 60)
    (root / "sabotage.py").write_text(SABOTAGE)

    def run(*arguments, recipes=SOUND, **environment):
        plugins = ("-p", "bench.session.plugin", "-p", "sabotage", "-p", "no:cacheprovider")
        command = [
            *(sys.executable, "-m", "pytest", *plugins, *MEASURED),
            *("--base", "tiny", "--data", "data", "--model", ",".join(recipes), "--length", "32", "--samples", "4"),
            *("--prompt-tokens", "8", "--max-new-tokens", "4", "--runs", "2", "--warmup-runs", "0"),
            *("--rootdir", ".", "-c", os.devnull, *arguments),
        ]
        path = os.pathsep.join([os.path.dirname(os.path.dirname(bench.__file__)), "."])
        known = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = completed(command, cwd=root, env=os.environ | known | environment)
        return SimpleNamespace(ret=done.returncode, said=done.stdout + done.stderr)

    alone = run("--journal", "alone.jsonl", "--update-baselines")
    assert alone.ret == 0, alone.said
    return SimpleNamespace(root=root, run=run)


@pytest.fixture(scope="module")
def interrupted(repository):
    """A run of two workers in which one is killed, one loses its device, and one recipe has not enough memory."""
    return repository.run("-n", "2", "--journal", "together.jsonl", recipes=(DIES, LOSES, EATS, *SOUND), SABOTAGE="1")


def _rows(repository, journal):
    return read(repository.root / journal).rows()


TIMES = {each.name for each in all_metrics().values() if each.kind == "timing" and each.of in ("cost", "generation")}


def test_two_workers_give_the_rows_of_one_process_and_refuse_times(repository, interrupted):
    alone = {(row.recipe, row.key): row for row in _rows(repository, "alone.jsonl")}
    together = {(row.recipe, row.key): row for row in _rows(repository, "together.jsonl") if row.recipe in SOUND}

    assert set(alone) == set(together)
    refused = {name: row for name, row in together.items() if row.status == "not_available"}
    assert TIMES == {row.metric for row in refused.values()}
    assert all("2 workers share cpu" in row.reason for row in refused.values())
    exact = {name for name in alone.keys() - refused.keys() if alone[name].metric != "efficiency.compression_peak_mb"}
    assert len(exact) >= 30
    for name in exact:
        assert (alone[name].value, alone[name].items) == (together[name].value, together[name].items)
    [gate] = [line for line in interrupted.said.splitlines() if line.startswith("gate")]
    assert " pass" in gate and "missing" not in gate and "regressed" not in gate
    failed = [line for line in interrupted.said.splitlines() if line.startswith("FAILED")]
    assert failed and not any(f"[{recipe}" in line for line in failed for recipe in SOUND)


def test_each_recipe_is_measured_at_one_worker(repository, interrupted):
    files = sorted(repository.root.glob("together*.jsonl"))
    assert len(files) >= 2
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    where = [{each["recipe"] for each in of_one if each["kind"] == "begin"} for of_one in lines]
    for recipe in SOUND:
        assert 1 == sum(recipe in recipes for recipes in where)


def test_a_killed_worker_a_lost_device_and_too_little_memory_leave_rows_that_say_so_and_the_rest_completes(
    repository, interrupted
):
    rows = _rows(repository, "together.jsonl")
    reasons = {recipe: {(row.status, row.reason) for row in rows if row.recipe == recipe and row.of == "artefact"}
               for recipe in (DIES, LOSES, EATS)}  # fmt: skip

    assert 1 == interrupted.ret
    [(status, reason)] = reasons[DIES]
    assert "failed" == status and "the process that measured this was killed" in reason
    assert {("failed", "AcceleratorError: CUDA error: device lost")} == reasons[LOSES]
    assert {("out_of_memory", "OutOfMemoryError: CUDA out of memory: 9 GiB wanted")} == reasons[EATS]
    for recipe in SOUND:
        assert set(MEASURED.values()) == {row.of for row in rows if row.recipe == recipe}
    assert "the process that measured this was killed" in interrupted.said
    ends = [each["status"] for each in read(repository.root / "together.jsonl").records if each["kind"] == "end"]
    assert ["failed"] == ends
    assert 1 == len({row.run for row in rows})


def test_a_recipe_that_ended_a_worker_is_not_tried_again_and_its_other_rows_say_so(repository, interrupted):
    for recipe in (DIES, LOSES):
        others = [row for row in _rows(repository, "together.jsonl") if row.recipe == recipe and row.of != "artefact"]
        assert {"cost", "generation", "perplexity"} == {row.of for row in others}
        assert all(
            f"while measuring {recipe}; this run does not try it again, a run with --resume does" in row.reason
            for row in others
        )
    assert 2 == interrupted.said.count("replacing crashed worker")
    records = read(repository.root / "together.jsonl").records
    begun = Counter((each["recipe"], each["of"]) for each in records if each["kind"] == "begin")

    assert {1} == set(begun.values())
    assert {(recipe, "artefact") for recipe in (DIES, LOSES, EATS, *SOUND)} <= set(begun)


def test_the_run_goes_on_with_two_workers_and_their_rows_are_recorded(repository, interrupted):
    before = read(repository.root / "together.jsonl")
    done = {(row.recipe, row.key) for row in before.rows() if row.status == "ok"}

    again = repository.run("-n", "2", "--journal", "together.jsonl", "--resume", "--update-baselines",
                           recipes=(DIES, LOSES, EATS, *SOUND))  # fmt: skip

    assert again.ret == 0, again.said
    records = read(repository.root / "together.jsonl").records
    assert 1 == len({each["run"] for each in records}) and "passed" == records[-1]["status"]
    times = Counter((each["recipe"], each["metric"], *each["params"].items()) for each in records
                    if each["kind"] == "row" and each["status"] == "ok"
                    and each["of"] in ("artefact", "cost", "perplexity"))  # fmt: skip
    assert {1} == set(times.values())  # what had all its rows, but for times that are refused again
    rows = _rows(repository, "together.jsonl")
    assert len(rows) == len({(row.recipe, row.key) for row in rows})
    assert done < {
        (row.recipe, row.key) for row in read(repository.root / "together.jsonl").rows() if row.status == "ok"
    }
    for recipe in (DIES, LOSES, EATS):
        recorded = Baseline.find(repository.root / "baselines", "tiny", recipe)
        assert {"efficiency.stored_bytes", "efficiency.bits_per_parameter"} <= set(recorded.sections[""].rows)
    kept = Baseline.find(repository.root / "baselines", "tiny", SOUND[1])
    timed = {entry.metric for device in kept.devices for entry in kept.sections[device].rows.values()}
    assert timed > TIMES  # what one process recorded is not gone because times were refused
    assert None is resume(repository.root / "together.jsonl")


def test_a_size_that_grew_fails_a_run_whose_workers_have_no_test_for_it(repository):
    grown = repository.run(
        "-n", "1", "-k", "test_perplexity", "--journal", "grown.jsonl", recipes=SOUND[1:2], GROWN="1"
    )

    assert pytest.ExitCode.TESTS_FAILED == grown.ret, grown.said
    assert "1 passed" in grown.said and f"{SOUND[1]}: efficiency.stored_bytes regressed" in grown.said


def test_what_cannot_be_is_refused_in_the_words_of_one_process(repository):
    refused = repository.run("-n", "1", "--journal", "refused.jsonl", "--max-new-tokens", "999", recipes=SOUND[:2])

    assert pytest.ExitCode.USAGE_ERROR == refused.ret
    assert "--max-new-tokens 999" in refused.said and "exceed the" in refused.said
    assert "INTERNALERROR" not in refused.said and "Traceback" not in refused.said


# --- Without processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "place", "count", "gpus", "expected", "words"),
    [
        ("cuda", 0, 2, 2, "cuda:0", None),
        ("cuda", 1, 2, 4, "cuda:1", None),
        ("cuda", 3, 4, 2, "cuda:1", "4 workers share 2 GPUs; give -n 2"),
        ("cuda:1", 0, 2, 4, "cuda:1", "2 workers share cuda:1"),
        ("cuda", 0, 1, 2, "cuda", None),
        ("cpu", 1, 2, 0, "cpu", "2 workers share cpu; run without -n"),
        ("cpu", 0, 1, 0, "cpu", None),
    ],
)
def test_a_worker_has_a_device_of_its_own_or_takes_no_times(device, place, count, gpus, expected, words):
    here, shared = placed(device, Worker("r", 0.0, place, count, True), gpus)

    assert expected == here
    assert (words is None) == (shared is None) and (words or "") in (shared or "")


class Node:
    """What pytest-xdist tells hooks of a worker."""

    def __init__(self, count=2):
        self.workerinput = {"workercount": count}


def _controller(tmp_path, **given):
    options = {"--journal": tmp_path / "journal.jsonl", "--resume": False} | given
    config = SimpleNamespace(getoption=options.get, getvalue={"dist": "loadgroup"}.get)
    return workers.Controller(config)


def test_a_worker_that_replaces_a_crashed_one_takes_its_place_and_no_other(tmp_path):
    controller, nodes = _controller(tmp_path), [Node() for _ in range(4)]
    for node in nodes[:2]:
        controller.pytest_configure_node(node)
    controller.pytest_testnodedown(nodes[0])
    controller.pytest_configure_node(nodes[2])
    controller.pytest_testnodedown(nodes[1])
    controller.pytest_configure_node(nodes[3])

    told = [Worker(**node.workerinput[worker_place.KEY]) for node in nodes]
    assert [0, 1, 0, 1] == [each.place for each in told]
    assert 1 == len({each.run for each in told})


def test_all_workers_go_on_with_the_run_that_the_controller_found(tmp_path):
    with Journal(tmp_path / "journal.jsonl", run="unfinished") as journal:
        journal.start({})
    controller, node = _controller(tmp_path, **{"--resume": True}), Node()
    controller.pytest_configure_node(node)

    assert "unfinished" == node.workerinput[worker_place.KEY]["run"]


def test_a_damaged_journal_stops_the_workers_before_they_start(tmp_path):
    (tmp_path / "journal.jsonl").write_text("not a record\n")

    with pytest.raises(pytest.UsageError, match=says("journal.jsonl:1", "python -m bench mend")):
        _controller(tmp_path, **{"--resume": True}).pytest_configure_node(Node())
