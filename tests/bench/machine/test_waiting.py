"""What a thread waits for a processor that others have is told apart from what it does and from what it sleeps."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from processes import completed, running

from bench.machine import cpu_wait
from bench.machine.cpu_wait import moments

RIVAL = """
import os, sys

os.sched_setaffinity(0, {int(sys.argv[1])})
print(flush=True)
parent = os.getppid()
while os.getppid() == parent:  # which ends it, unless it is killed itself
    pass
"""
STARVED = """
import json, os, sys, time
from bench.machine.cpu_wait import moments

os.sched_setaffinity(0, {int(sys.argv[1])})
steps, waited = [], 0.0
with moments() as moment:
    while waited < 0.3:
        begin, own = moment(), time.thread_time()
        sum(range(1_000_000))  # long enough to be interrupted, and no call of the system in between
        did, end = time.thread_time() - own, moment()
        waited += end.waited_s - begin.waited_s
        steps.append([end.clock_s - begin.clock_s, did, end.waited_s - begin.waited_s])
print(json.dumps(steps))
"""

with moments() as moment:
    COUNTS = moment().waited_s is not None
counted = pytest.mark.skipif(not COUNTS, reason="this system does not count what threads wait for a processor")


@counted
def test_what_rivals_on_the_same_processor_take_is_waited_and_all_else_is_not():
    core = str(min(os.sched_getaffinity(0)))
    with ExitStack() as held:
        for _ in range(2):
            rival = held.enter_context(running([sys.executable, "-c", RIVAL, core], stdout=subprocess.PIPE))
            rival.stdout.readline()
        done = completed([sys.executable, "-c", STARVED, core], check=True)

    steps = json.loads(done.stdout)
    walls, waits = (sum(each[place] for each in steps) for place in (0, 2))
    assert 0.3 <= waits < walls
    assert all(did - 1e-5 <= wall - waited for wall, did, waited in steps)  # what it did is never taken off


def test_a_wait_between_the_two_readings_is_on_both_or_on_neither(tmp_path, monkeypatch):
    counted, clock = tmp_path / "schedstat", iter([10.0, 13.0, 14.0])

    def interrupted():
        now = next(clock)
        if now == 10:  # the processor is taken right after the clock was read, for three seconds
            counted.write_text("5 4000000000 6")
        return now

    counted.write_text("5 1000000000 6")
    monkeypatch.setattr(cpu_wait, "_COUNTED", str(counted))
    monkeypatch.setattr(time, "perf_counter", interrupted)

    with moments() as moment:
        assert [(13.0, 4.0), (14.0, 4.0)] == [moment(), moment()]


@counted
def test_sleep_is_no_waiting():
    with moments() as moment:
        begin = moment()
        time.sleep(0.05)
        end = moment()

    assert (end.clock_s - begin.clock_s) - (end.waited_s - begin.waited_s) >= 0.0499


@pytest.mark.parametrize("counts", [None, "0 0 0\n"])
def test_where_no_system_counts_them_nothing_is_told(tmp_path, monkeypatch, counts):
    monkeypatch.setattr(cpu_wait, "_COUNTED", str(tmp_path / "schedstat"))
    if counts:
        (tmp_path / "schedstat").write_text(counts)

    with pytest.raises(KeyError) as raised, moments() as moment:
        first, second = moment(), moment()
        raise KeyError("while it measures")

    assert first.clock_s <= second.clock_s and first.waited_s is second.waited_s is None
    assert None is raised.value.__context__  # nothing of a file that was not there
