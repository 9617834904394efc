"""Processes that tests start end with them."""

import os
import subprocess
import sys

import processes
import pytest
from processes import completed, running, wait_until

FAMILY = "import subprocess, sys; print(subprocess.Popen(['sleep', 'infinity']).pid, flush=True); sys.stdin.read()"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked for in /proc")
def test_a_child_and_what_it_started_end_when_the_test_fails():
    with pytest.raises(AssertionError, match="as a test fails"), running(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:  # fmt: skip
        grandchild = int(child.stdout.readline())
        assert alive(child.pid) and alive(grandchild)
        raise AssertionError("as a test fails")

    while alive(grandchild):  # its end is not this process's to wait for
        pass
    assert child.returncode is not None


def test_waiting_for_what_a_child_never_reaches_ends_with_the_child():
    ends = [sys.executable, "-c", "raise SystemExit(3)"]
    with running(ends) as child, pytest.raises(AssertionError, match="it ended with 3 before"):
        wait_until(lambda: False, child)


def test_what_hangs_is_ended_by_the_speed_of_the_machine_and_what_is_slow_is_not(monkeypatch):
    monkeypatch.setattr(processes, "QUIET_S", 0)
    monkeypatch.setattr(processes, "UNITS", 1e-6)
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: begun.append(start(*args, **how)) or begun[-1])
    with pytest.raises(AssertionError, match="hangs: it took longer than"):
        completed(["sleep", "infinity"])
    assert None is not begun[0].returncode

    monkeypatch.setattr(processes, "UNITS", 1e6)  # as on a machine that becomes slower the longer it is waited for
    assert "done\n" == completed(["sh", "-c", "sleep 0.3; echo done"]).stdout


def test_a_child_that_fails_is_quoted():
    with pytest.raises(AssertionError, match=r"(?s)ended with 3.*said.*complained"):
        completed(["sh", "-c", "echo said; echo complained >&2; exit 3"], check=True)
