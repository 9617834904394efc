"""Processes that a node's worker starts: they answer, are kept, and end with whoever started them."""

import signal
import sys

import psutil
import pytest
from checkpoints import says
from processes import environment, running, wait_until

from compression.cluster.node import Kept, complete, complete_or_raise

ANSWERS = """
import os, sys
from compression.cluster.channel import bound

channel = bound()
while (asked := channel.next()) is not None:
    if asked == "die":
        print("what it printed", flush=True)
        os.kill(os.getpid(), 9)
    channel.answer(pid=os.getpid())
    channel.answer(finished=asked)
"""
STARTS = """
import sys, time
from compression.cluster.node import Kept

kept = Kept(["-c", sys.argv[1]], ".", {})
for answer in kept.asked("sleep"):
    print(answer["pid"], flush=True)
"""
SLEEPS = ANSWERS.replace("channel.answer(finished=asked)", "import time; time.sleep(9999)")


def test_a_process_is_kept_between_two_questions_and_ends_when_it_is_closed():
    kept = Kept(["-c", ANSWERS], ".", environment())
    first, second = ([answer["pid"] for answer in kept.asked(name)] for name in ("a", "b"))
    kept.close()

    assert first == second and not psutil.pid_exists(first[0])


def test_a_process_that_dies_is_said_with_its_signal_and_what_it_printed():
    kept = Kept(["-c", ANSWERS], ".", environment())

    with pytest.raises(ChildProcessError, match=says("ended by signal 9", "what it printed")):
        list(kept.asked("die"))


def test_a_process_ends_with_the_worker_that_is_killed_in_the_middle():
    command = [sys.executable, "-c", STARTS, SLEEPS]
    with running(command, env=environment(), stdout=-1, text=True) as worker:
        pid = int(worker.stdout.readline())
        worker.send_signal(signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_command_runs_to_its_end_or_says_why_not(tmp_path):
    assert {"status": 3, "output": "7\n", "errors": ""} == complete(
        ["-c", "import sys; print(int(input()) + 1); sys.exit(3)"], str(tmp_path), environment(), "6\n"
    )
    missing = complete(["-c", ""], str(tmp_path / "gone"), environment())
    assert 127 == missing["status"] and "gone" in missing["errors"]
    with pytest.raises(ChildProcessError, match=says("ended by signal 9", "last words")):
        complete_or_raise(["-c", "import os, sys; sys.exit(print('last words', file=sys.stderr, flush=True) "
                           "or os.kill(os.getpid(), 9))"], str(tmp_path), environment())  # fmt: skip
