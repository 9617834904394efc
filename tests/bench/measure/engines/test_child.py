"""A process that answers lines of JSON: what becomes of one that ends, hangs or answers something else."""

import os
import signal

import pytest
from engines import talking, wait_until_gone

from bench.errors import EngineError

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"length": len(line), "asked": json.loads(line)}))
"""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "its.log"


def test_requests_and_answers_may_be_larger_than_a_pipe(log):
    request = {"ids": list(range(200_000))}

    with talking(ECHO, log) as child:
        for _ in range(2):
            assert request == child.ask(request)["asked"]


def test_a_process_that_was_killed_is_an_error_that_says_so_at_every_request(log):
    with talking("import sys; print('last words', file=sys.stderr)\n" + ECHO, log) as child:
        child.ask({})
        os.kill(child.pid, signal.SIGKILL)

        with pytest.raises(EngineError, match=r"killed by SIGKILL, most likely because memory ran out.*last words"):
            child.ask({"large": "x" * 200_000})
        with pytest.raises(EngineError, match=r"cannot be asked any more: .*SIGKILL.*Start it again"):
            child.ask({})


def test_a_process_that_ends_is_an_error_with_its_status_and_the_end_of_its_log(log):
    code = "import sys; print(*range(10), sep='\\n', file=sys.stderr); sys.exit('no such model')"

    with talking(code, log) as child, pytest.raises(EngineError) as caught:
        child.ask({})

    assert f"ended with exit status 1. Its log {log} ends with: 6 | 7 | 8 | 9 | no such model" in str(caught.value)
    assert "no such model" in log.read_text()


def test_a_process_that_hangs_is_ended_with_whatever_it_started(log):
    code = """
import json, sys
from subprocess import Popen
started = Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
for line in sys.stdin:
    print(json.dumps({"started": started.pid}))
    started.wait()
"""
    with talking(code, log) as child:
        started = child.ask({})["started"]
        child.patience_s = 0.1

        with pytest.raises(EngineError, match=r"must answer within 0\.1 s, but did not, and was ended"):
            child.ask({"it reads": "nothing more" * 100_000})

        wait_until_gone(child.pid)
        wait_until_gone(started)


def test_a_process_that_died_is_seen_also_if_a_child_of_its_own_holds_its_output_open(log):
    code = """
import os, sys
from subprocess import Popen
started = Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
print(f'{{"started": {started.pid}}}')
sys.stdin.readline()
sys.stdin.readline()
os._exit(3)
"""
    with talking(code, log) as child:
        started = child.ask({})["started"]
        with pytest.raises(EngineError, match="ended with exit status 3"):
            child.ask({})
        wait_until_gone(started)


def test_after_the_block_neither_the_process_nor_what_it_started_is_left(log):
    code = """
import sys
from subprocess import Popen
started = Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])
for line in sys.stdin:
    print(f'{{"started": {started.pid}}}')
"""
    with pytest.raises(ZeroDivisionError), talking(code, log) as child:
        started = child.ask({})["started"]
        raise ZeroDivisionError

    wait_until_gone(child.pid)
    wait_until_gone(started)
    with pytest.raises(EngineError, match="it was closed"):
        child.ask({})


@pytest.mark.parametrize("line", ["loading the model", "[1, 2]", "3", '{"torn": ', "\\xff"])
def test_a_line_that_is_no_table_of_json_is_an_error_that_shows_it(log, line):
    with talking(f"input(); print({line!r}); input()", log) as child:
        with pytest.raises(EngineError, match=r"must answer with a table in JSON, but wrote b'"):
            child.ask({})
        wait_until_gone(child.pid)


def test_an_error_that_is_answered_leaves_the_process_alive(log):
    code = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"error": "too long", "kind": "ValueError"} if "wrong" in asked else {"fine": 1}))
"""
    with talking(code, log) as child:
        with pytest.raises(EngineError, match="could not do what it was asked: ValueError: too long"):
            child.ask({"wrong": 1})
        assert {"fine": 1} == child.ask({})


def test_a_log_that_cannot_be_written_and_a_program_that_is_not_there_are_errors_with_words(tmp_path):
    for log in (tmp_path / "none" / "its.log", tmp_path):
        with pytest.raises(EngineError, match="in a folder that exists"), talking(ECHO, log):
            pass
