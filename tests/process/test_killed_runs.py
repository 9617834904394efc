"""Runs that are killed at random moments, and runs on a full disk: nothing finished is lost, nothing counted twice."""

import json
import os
import resource
import sys
from contextlib import contextmanager

import pytest
from checkpoints import says
from processes import HELPERS, completed
from small_runs import MEASUREMENTS, make_base, one_run, options

from bench.errors import JournalError
from bench.results.journal import read
from bench.session.session import Failure, Workbench
from compression import Recipe

RECIPE = "rtn(group_size=32)"


def test_of_a_run_that_is_killed_again_and_again_nothing_is_lost_or_counted_twice_and_it_completes():
    """`python tests/helpers/kills.py 100` kills a hundred; each look at the journal is an assertion there."""
    done = completed(
        [sys.executable, HELPERS / "kills.py", "24", str(os.environ.get("KILLS_SEED", 0))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])

    assert 24 == seen["kills"]
    assert seen["completed"] >= 6 and seen["within_the_run"] >= 4


def test_a_perplexity_of_fewer_windows_than_a_batch_is_not_measured_again_by_the_run_that_goes_on(tmp_path):
    make_base(tmp_path)
    few = {"protocol": {"name": "default", "samples": 2, "length": 32, "stride": None}}
    stopped = Workbench(options(tmp_path, RECIPE, **few))
    MEASUREMENTS["perplexity"](stopped, Recipe.parse(RECIPE))
    stopped.finish(passed=True, interrupted=True)
    stopped.close()

    assert [] == one_run(tmp_path, RECIPE, resume=True, **few).failing
    rows = [each for each in read(tmp_path / "journal.jsonl").records if each["kind"] == "row"]
    assert 1 == sum(each["metric"] == "quality.perplexity" for each in rows)


@contextmanager
def room_for(size):
    """Files of this process grow to so many bytes and no further, as on a full disk; also the one pytest writes to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_rows_are_kept_and_written_once_there_is_room(tmp_path):
    make_base(tmp_path)
    undisturbed = one_run(tmp_path, RECIPE, journal=tmp_path / "undisturbed.jsonl").rows
    workbench = Workbench(options(tmp_path, RECIPE))
    recipe = Recipe.parse(RECIPE)
    with room_for(300), pytest.raises(JournalError, match=says("journal.jsonl cannot be written", "File too large")):
        MEASUREMENTS["artefact"](workbench, recipe)
    assert "" == workbench.journal.path.read_text()
    MEASUREMENTS["perplexity"](workbench, recipe)
    MEASUREMENTS["divergence"](workbench, recipe)

    assert [] == workbench.finish(passed=False)
    workbench.close()
    rows = {(row.recipe, row.key): row for row in read(tmp_path / "journal.jsonl").rows()}
    assert undisturbed.keys() == rows.keys()
    assert [row.value for row in undisturbed.values()] == [rows[name].value for name in undisturbed]


def test_a_disk_that_stays_full_is_said_at_the_end_and_never_passes(tmp_path):
    make_base(tmp_path)
    workbench = Workbench(options(tmp_path, RECIPE))
    with room_for(300), pytest.raises(JournalError):
        MEASUREMENTS["artefact"](workbench, Recipe.parse(RECIPE))
    with room_for(300), pytest.raises(JournalError, match="cannot be written"):
        workbench.finish(passed=True)
    workbench.close()

    assert [] == read(tmp_path / "journal.jsonl").records


def test_an_artefact_that_does_not_fit_on_the_disk_leaves_rows_that_say_so_and_the_rest_completes(tmp_path):
    make_base(tmp_path, intermediate_size=2048)
    workbench = Workbench(options(tmp_path, RECIPE))
    recipe = Recipe.parse(RECIPE)
    with room_for(2**17), pytest.raises(Failure, match="memory could not be measured"):
        workbench.measure("memory", recipe, lambda: (workbench.artefact_folder(recipe), None))
    MEASUREMENTS["artefact"](workbench, recipe)
    workbench.finish(passed=False)
    workbench.close()

    rows = read(tmp_path / "journal.jsonl").rows()
    assert {"failed"} == {row.status for row in rows if row.of == "memory"}
    assert all("File too large" in row.reason for row in rows if row.of == "memory")
    assert {"ok"} == {row.status for row in rows if row.of == "artefact"}
