"""What a run gives to a Ray cluster and takes back from it, as far as no cluster is needed to see it."""

import sys
from collections import Counter

import pytest
from commands import RTN, SIZE
from small_runs import make_base, measured, options

from bench import test_efficiency as efficiency
from bench.results.journal import now, read, resume
from bench.session.grid.driver import needs_of, shared_by
from bench.session.session import Workbench
from bench.session.worker_place import Worker, placed

pytest_plugins = ["pytester"]
RECIPE = "rtn(group_size=32)"
MEASUREMENTS = {"artefact": efficiency.test_size, "cost": efficiency.test_cost}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    make_base(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ray", "auto", "-n", "2"), "--ray and -n both share the recipes"),
        (("--ray", "nonsense"), "--ray must be auto or the HOST:PORT of a cluster, not 'nonsense'"),
        (("--ray", "auto"), "--ray needs Ray"),
    ],
    ids=["-n", "address", "not installed"],
)
def test_what_cannot_be_is_refused_before_a_cluster_is_asked(run, pytester, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(SIZE, "--model", RTN, *arguments)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    assert words in result.stdout.str() + result.stderr.str()
    journal = pytester.path / ".bench" / "journal.jsonl"
    assert not journal.exists() or not journal.read_text()


def test_a_recipe_needs_threads_and_memory_for_base_result_and_a_process_that_opens_one(root, tmp_path):
    import torch

    workbench = Workbench(options(root, "fp16", RECIPE, journal=tmp_path / "journal.jsonl"))
    needs = needs_of(workbench)
    base = workbench.plans["fp16"].base_bytes  # which is stored in 32 bits, and opened in 16
    workbench.close()

    assert {(torch.get_num_threads(), 0)} == {(each.cpus, each.gpus) for each in needs.values()}
    assert 0 < needs[RECIPE].memory - needs["fp16"].memory < 2 * base
    assert needs["fp16"].memory > 2 * base


def test_times_are_refused_where_recipes_share_a_machine_and_taken_where_one_has_it_alone():
    alone, shared = (Worker("r", 0.0, 0, 6, True, True, shared_by(count)) for count in (1, 2))

    assert ("cpu", None) == placed("cpu", alone, 0)
    device, words = placed("cpu", shared, 0)
    assert "cpu" == device and "timings are refused: up to 2 recipes at a time share the CPUs" in words
    assert ("cuda", None) == placed("cuda", Worker("r", 0.0, 0, 6, True, True, None), 0)


def test_a_run_that_is_announced_is_not_gone_on_with_by_another(root, tmp_path):
    journal = tmp_path / "journal.jsonl"
    first = Workbench(options(root, RECIPE, journal=journal))
    first.announce()
    assert None is resume(journal)
    assert first.journal.run == resume(journal, first.journal.run).run  # its own workers go on with it
    first.close()
    assert first.journal.run == resume(journal).run


def rows_in(journal):
    """How often each metric was measured."""
    records = read(journal).records
    return Counter(each["metric"] for each in records if each["kind"] == "row" and each["status"] == "ok")


def test_what_a_worker_measured_is_done_for_the_next_though_its_times_were_refused(root, tmp_path):
    journal = tmp_path / "journal.jsonl"
    driver = Workbench(options(root, RECIPE, journal=journal, gate="off"))
    driver.announce()
    common = {"journal": journal, "gate": "off", "resume": True, "run": driver.journal.run, "shared": shared_by(2)}
    following = Workbench(options(root, RECIPE, **common))  # it opened the journal before anything was in it
    worker = Workbench(options(root, RECIPE, **common))
    for test in MEASUREMENTS.values():
        test(worker, worker.options.recipes[0])
    worker.close()  # as one that is killed: its run has no end
    written = rows_in(journal)

    since = now(journal)
    following.reread()
    assert [] == measured(following, measurements=MEASUREMENTS)
    driver.gather(since=since, killed="")

    assert {1} == set(written.values()) and written == rows_in(journal)
    assert written.keys() == {row.metric for row in driver.rows.values() if row.status == "ok"}
    assert {"ok", "not_available"} == {row.status for row in driver.rows.values()}
    driver.close()
