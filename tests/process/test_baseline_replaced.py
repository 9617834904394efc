"""Baselines whose writer stops anywhere: the old one is there, or the new one, and nothing between."""

import builtins
import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from healthy_results import healthy_row, item_row, recorded
from processes import environment, running

from bench.errors import BaselineError
from bench.gate.verdicts import Baseline
from bench.results.items import Items, hashes_of


def baseline(scale):
    items = Items(hashes_of(range(60)), tuple(scale * (1 + place % 7) for place in range(60)), "real")
    return recorded([item_row("quality.nll", items), healthy_row(value=scale)])


OLD, NEW = baseline(1.0), baseline(1.5)
WITHOUT = recorded([healthy_row("efficiency.layers", value=56.0)])


class Stopped(BaseException):
    """A process that ends here."""


class Counted:
    """Operations on files, of which number `last` and all behind it fail."""

    def __init__(self, monkeypatch, last, error):
        self.made, self.last, self.error = 0, last, error
        for name in ("replace", "unlink", "fsync"):
            monkeypatch.setattr(os, name, self.counting(getattr(os, name)))
        opened = self.counting(builtins.open)
        monkeypatch.setattr(Path, "write_bytes", self.counting(Path.write_bytes))
        monkeypatch.setattr(builtins, "open", lambda file, mode="r", *a, **k: (
            opened if "w" in mode else OPEN)(file, mode, *a, **k))  # fmt: skip

    def counting(self, operation):
        def counted(*arguments, **options):
            self.made += 1
            if self.made >= self.last:
                raise self.error
            return operation(*arguments, **options)

        return counted


OPEN = builtins.open


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Stopped()], ids=["full", "stopped"]
)
@pytest.mark.parametrize(("before", "after"), [(OLD, NEW), (WITHOUT, NEW), (OLD, WITHOUT)])
def test_a_save_that_stops_at_any_operation_leaves_the_old_baseline_or_the_new(
    tmp_path, monkeypatch, error, before, after
):
    seen, last = set(), 0
    while True:
        last += 1
        folder = tmp_path / str(last)
        before.save(folder)
        with monkeypatch.context() as patch:
            operations = Counted(patch, last, error)
            with suppress(BaselineError, Stopped):
                after.save(folder)
        found = Baseline.find(folder, "reference", "nf4")
        assert found in (before, after)
        seen.add("old" if found == before else "new")
        if operations.made < last:
            break

    assert last > 3
    assert {"old", "new"} == seen
    assert after == Baseline.find(folder, "reference", "nf4")
    kept = after.items_file(folder)
    assert [kept] * (kept is not None) == list((folder / "reference").glob("items/*.json"))


WRITER = """
import sys
from pathlib import Path
from bench.gate.verdicts import Baseline
both = [Baseline.find(Path(folder), "reference", "nf4") for folder in sys.argv[2:]]
print("ready", flush=True)
while True:
    for each in both:
        each.save(Path(sys.argv[1]))
"""


@pytest.mark.process
def test_a_writer_that_is_killed_leaves_the_old_baseline_or_the_new(tmp_path):
    OLD.save(tmp_path)
    numbers, sources = random.Random(0), [tmp_path / "new", tmp_path / "old"]
    for folder, each in zip(sources, (NEW, OLD), strict=True):
        each.save(folder)
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, tmp_path, *sources]
        with running(command, env=environment(), stdout=subprocess.PIPE) as child:
            assert b"ready\n" == child.stdout.readline()
            time.sleep(numbers.uniform(0.0, 0.1))
            child.send_signal(signal.SIGKILL)
            assert -signal.SIGKILL == child.wait()
        assert Baseline.find(tmp_path, "reference", "nf4") in (OLD, NEW)
