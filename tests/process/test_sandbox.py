"""Generated programs that misbehave for real: contained, counted as failed, and the run goes on."""

import functools
import gzip
import json
import os
import secrets
import shutil
import socket
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import says
from processes import REPOSITORY, completed, running, wait_until

from bench.errors import NotAvailable
from bench.measure.sandbox import run as sandbox
from bench.measure.sandbox.claims import CLAIMS
from bench.measure.sandbox.jail import LAYERS
from bench.measure.sandbox.run import forbidden, run, run_all

SYSTEM = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # one that other users can read, too
FINE = "assert sorted([2, 1]) == [1, 2]"

ROUTES = {  # with namespaces where the system has them; as in a container that has none
    "namespaces": {},
    "no-namespaces": {"without": ("namespaces",), "python": SYSTEM or sys.executable},
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers of the sandbox are Linux's")


@pytest.fixture(params=ROUTES.values(), ids=ROUTES)
def route(request):
    return request.param


@pytest.fixture
def name():
    """A name for processes, to look for those that are left over."""
    return f"sbx{secrets.token_hex(5)}"


def called(name):
    """Code by which a process takes that name."""
    return f"import ctypes, os\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


def processes(name):
    """Living processes of that name."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if (each / "comm").read_text().strip() == name and ") Z " not in (each / "stat").read_text():
                found.append(each.name)
        except OSError:
            continue
    return found


@functools.cache
def allowed_s():
    """Seconds in which a good program surely ends, on this machine as it is now."""
    return max(1.0, 10 * run(FINE, seconds=3600.0).seconds)


def contained(program, route, **limits):
    """The outcome of a bad program, after which the same jailer runs a good one."""
    bad, good = run_all([program, FINE], **{"seconds": allowed_s(), "workers": 1} | limits | route)
    return bad, good.passed


def test_a_program_passes_by_coming_to_its_end(route):
    outcomes = run_all([FINE, "assert False, 'no'", "import math, re, random, collections, typing, threading"], **route)

    assert [True, False, True] == [each.passed for each in outcomes]
    assert ["passed", "AssertionError: no", "passed"] == [each.reason for each in outcomes]


@pytest.mark.parametrize(
    "program", ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()", "quit()"]
)
def test_leaving_early_is_failing_though_the_exit_code_is_zero(program):
    assert not run(program + f"\n{FINE}").passed


@pytest.mark.parametrize("program", ["x = '\0'", "def (", "x = '\ud800'", "raise BaseException", "\n" * 10**6 + "1/0"])
def test_what_does_not_even_compile_or_end_fails_with_a_reason(program):
    found = run(program)

    assert not found.passed and len(found.reason) > 5


def test_a_program_that_loops_is_stopped(route):
    seconds = allowed_s() / 2
    bad, good = contained("while True: pass", route, seconds=seconds)

    # the words of its warden: one that had to be ended itself, after a time of grace, says nothing
    assert (bad.passed, bad.reason, good) == (False, f"not done after {seconds:g} s", True)


def test_a_program_that_forks_without_end_is_stopped_with_all_its_processes(route, name):
    bad, good = contained(called(name) + "while True:\n    try: os.fork()\n    except OSError: pass", route)

    assert (bad.passed, good) == (False, True)
    assert [] == processes(name)


def test_a_grandchild_in_a_session_of_its_own_does_not_outlive_its_program(route, name):
    program = called(name) + "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        while True: pass\n"
    (bad,) = run_all([program + "    os._exit(0)\nos.wait()\nassert False"], seconds=2 * allowed_s(), **route)

    assert not bad.passed
    assert [] == processes(name)


def test_a_program_that_fills_the_memory_is_stopped(route):
    bad, good = contained("x = []\nwhile True: x.append(b'x' * 2**24)", route, seconds=5 * allowed_s(), memory=2**28)

    assert (bad.passed, good) == (False, True)
    assert "MemoryError" in bad.reason or "killed" in bad.reason or "left" in bad.reason
    assert run("x = b'x' * 2**28", memory=2**29, **route).passed, "the limit is where it was set"


def test_a_program_that_fills_the_disk_is_stopped(route):
    one_file = "with open('x', 'wb') as f:\n    while True: f.write(b'x' * 2**20)"
    bad, good = contained(one_file, route, file_bytes=2**22)

    assert (bad.passed, good) == (False, True)
    assert run("open('x', 'wb').write(b'x' * 2**21)\nassert len(open('x', 'rb').read()) == 2**21", **route).passed


def test_a_program_that_writes_outside_its_folder_changes_nothing(route, tmp_path):
    tmp_path.chmod(0o777)
    (mine := tmp_path / "mine.txt").write_text("mine")
    mine.chmod(0o666)
    programs = [
        f"open({str(tmp_path / 'new.txt')!r}, 'w').write('x')",
        f"open({str(mine)!r}, 'w').write('x')",
        f"import os; os.unlink({str(mine)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"open({str(Path(sandbox.__file__).with_name('new.txt'))!r}, 'w')",
        "open('/new.txt', 'w')",
    ]
    outcomes = run_all([*programs, FINE], **route)

    assert [*[False] * len(programs), True] == [each.passed for each in outcomes]
    assert (["mine.txt"], "mine") == ([each.name for each in tmp_path.iterdir()], mine.read_text())


def test_a_program_that_opens_a_socket_reaches_nobody(route):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        programs = [f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
                    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
                    "import socket; socket.socket(socket.AF_UNIX)"]  # fmt: skip
        outcomes = run_all([*programs, FINE], **route)

        assert [False, False, False, True] == [each.passed for each in outcomes]
        with pytest.raises(BlockingIOError):  # nobody is waiting
            server.accept()


def test_a_program_that_kills_its_parent_kills_nobody(route):
    with running(["sleep", "infinity"]) as bystander:
        for program in (
            "import os; os.kill(os.getppid(), 9); assert False",
            f"import os; os.kill({bystander.pid}, 9)",
            f"import os; os.kill({os.getpid()}, 9)",
            "import os; os.kill(-1, 9); assert False",
            "import os; os.killpg(0, 9); assert False",
        ):
            assert (False, True) == ((found := contained(program, route))[0].passed, found[1])
        assert bystander.poll() is None


def test_a_program_sees_no_environment_and_no_output_of_it_is_ours(route, monkeypatch, capfd):
    monkeypatch.setenv("SECRET", "1")
    assert run("import os; assert not os.environ; assert not os.listdir()", **route).passed
    assert run("import os\nfor _ in range(10**4): os.write(1, b'x' * 100); os.write(2, b'x' * 100)", **route).passed
    assert ("", "") == capfd.readouterr()


def test_a_program_that_writes_rubbish_where_its_end_is_reported_has_failed(route):
    for program in (
        "import os; os.write(3, b'x' * 10**6)",
        "import os; os.write(3, b'{}\\n'); 1/0",
        "import os; os.close(3)",
    ):
        assert (False, True) == ((found := contained(program, route))[0].passed, found[1])


def test_programs_run_side_by_side_each_alone_in_order():
    programs = [f"import os; assert not os.path.exists('x'); open('x', 'w'); assert {k} % 3" for k in range(40)]

    assert [k % 3 > 0 for k in range(40)] == [each.passed for each in run_all(programs)]
    assert [] == run_all([])


def test_nothing_is_left_of_programs_whose_run_was_killed(name):
    program = called(name) + "while True: pass"
    code = f"from bench.measure.sandbox import run as sandbox; sandbox.run({program!r}, seconds=3600)"
    with running([sys.executable, "-c", code]) as harness:
        wait_until(lambda: processes(name), harness)
        harness.kill()
        harness.wait()
        wait_until(lambda: not processes(name))  # the kernel ends them


def test_a_jail_that_does_not_come_up_is_no_failure_of_the_program():
    with pytest.raises(NotAvailable, match="the sandbox does not start"):
        run(FINE, python="/bin/false")


def test_every_solution_of_humaneval_passes():
    if "BENCH_DATA" not in os.environ:
        pytest.skip("BENCH_DATA is not set: point it at a folder that holds humaneval/HumanEval.jsonl.gz")
    with gzip.open(Path(os.environ["BENCH_DATA"]) / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        problems = [json.loads(line) for line in lines]
    parts = ("prompt", "canonical_solution", "test")
    programs = ["".join(each[part] for part in parts) + f"\ncheck({each['entry_point']})" for each in problems]

    assert 164 == sum(outcome.passed for outcome in run_all(programs, seconds=20 * allowed_s()))
    assert not run(programs[0].replace("return False", "return True")).passed


# --- programs that are right ------------------------------------------------------------------------------------------

RIGHT = {
    "dataclasses": """
        from __future__ import annotations
        from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
        from typing import ClassVar
        @dataclass(order=True)
        class Point:
            x: int
            tags: list[str] = field(default_factory=list)
            zero: ClassVar[int] = 0
            _: KW_ONLY
            y: int = 2
        assert asdict(replace(Point(1), x=3)) == {"x": 3, "tags": [], "y": 2}
        assert ["x", "tags", "y"] == [each.name for each in fields(Point)] and Point(1) < Point(2)
    """,
    "pickle": """
        import copy, pickle
        from collections import namedtuple
        from enum import Enum
        Pair = namedtuple("Pair", "a b")
        class Colour(Enum):
            RED = 1
        class Node:
            def __init__(self, value): self.value = value
        def double(x): return 2 * x
        assert pickle.loads(pickle.dumps(Node(3))).value == 3
        assert pickle.loads(pickle.dumps(double))(4) == 8
        assert pickle.loads(pickle.dumps((Colour.RED, Pair(1, 2)))) == (Colour.RED, Pair(1, 2))
        assert copy.deepcopy(Node([1])).value == [1]
    """,
    "get_type_hints": """
        from __future__ import annotations
        from typing import NamedTuple, Optional, TypedDict, get_type_hints
        class Tree:
            left: Optional[Tree]
            def walk(self, other: Tree) -> list[Tree]: ...
        class Item(TypedDict):
            of: Tree
        class Pair(NamedTuple):
            first: Tree
        assert get_type_hints(Tree) == {"left": Optional[Tree]}
        assert get_type_hints(Tree.walk) == {"other": Tree, "return": list[Tree]}
        assert get_type_hints(Item)["of"] is get_type_hints(Pair)["first"] is Tree
    """,
    "main": """
        import __main__, sys
        assert sys.modules["__main__"] is __main__ and __name__ == "__main__" == __main__.__name__
        value = 3
        assert __main__.value == 3 and vars(__main__) is globals()
        assert not [name for name in ("imprison", "guard", "execute", "call") if hasattr(__main__, name)]
        def main(): return 1
        if __name__ == "__main__":
            assert main() == 1
        exec("assert value == 3")
    """,
    "doctest": """
        import doctest, __main__
        def square(x):
            '''
            >>> square(3)
            9
            '''
            return x * x
        assert doctest.testmod(__main__) == (0, 1)
    """,
    "unittest": """
        import unittest
        class Adds(unittest.TestCase):
            def test(self): self.assertEqual(2, 1 + 1)
        tests = unittest.defaultTestLoader.loadTestsFromName("__main__")
        result = unittest.TextTestRunner(stream=open("said", "w")).run(tests)
        assert (1, []) == (result.testsRun, result.failures + result.errors)
    """,
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_what_looks_for_its_module_finds_it(route, program):
    outcome = run(textwrap.dedent(program), seconds=10 * allowed_s(), **route)

    assert (True, "passed") == (outcome.passed, outcome.reason)


def test_no_program_finds_the_module_of_another(route):
    outcomes = run_all(["left = 1", "import __main__; assert not hasattr(__main__, 'left')"], workers=1, **route)

    assert [True, True] == [each.passed for each in outcomes]


# --- what can be forbidden here ---------------------------------------------------------------------------------------


def test_everything_that_the_layers_here_can_forbid_is_forbidden():
    found, layers = forbidden(), run(FINE).layers

    assert {"run longer than they may", "fill the memory", "write large files"} <= set(found.forbidden)
    assert set(CLAIMS) == {*found.forbidden, *found.possible}
    if layers["namespaces"] is True and layers["root"] is True:
        assert () == found.possible
    else:
        assert found.missing and "they CAN" in str(found)


def test_what_could_not_be_forbidden_is_said_with_the_reason():
    """Negative control: the attempts succeed where nothing stands in their way."""
    found = forbidden(python=SYSTEM or sys.executable, without=("namespaces", "landlock", "seccomp"))

    assert {"write outside their folder", "read other files", "open sockets"} <= set(found.possible)
    assert f"they CAN {', '.join(found.possible)} (" in str(found)
    assert "landlock: left out" in str(found)


USERS = {  # as a plain user, and as root of a container
    "plain-user": ["--reuid=65534", "--regid=65534", "--clear-groups"],
    "root-without-sys-admin": ["--bounding-set=-sys_admin", "--inh-caps=-all"],
    "root-without-capabilities": ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"],
}


def as_user(user, code):
    """What a Python that everybody can read prints for code that runs as another user."""
    if os.getuid() != 0 or SYSTEM is None or not shutil.which("setpriv"):
        pytest.skip("only root can become others, by setpriv, and they need a Python that everybody can read")
    own = {"PYTHONPATH": str(REPOSITORY), "HOME": "/nonexistent"}
    done = completed(["setpriv", *user, SYSTEM, "-c", code], cwd="/", env=own)
    if "No module named 'bench'" in done.stderr:
        pytest.skip("this checkout is closed to other users")
    assert "" == done.stderr
    return json.loads(done.stdout)


SEEN = {"see that other files are there", "see other processes"}  # but from within a root and processes of its own


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["namespaces", "no-namespaces"])
@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_as_much_is_forbidden_whoever_runs_them(user, without):
    code = f"import json; from bench.measure.sandbox.run import forbidden, run\nwithout = {without!r}\n"
    code += "print(json.dumps([forbidden(without=without).possible, run('pass', without=without).layers]))"
    possible, layers = as_user(user, code)

    allowed = {"be root"} if "--bounding-set=-all" in user else set()  # one without capabilities can be nobody else
    assert set() == set(possible) - allowed - (SEEN if layers["root"] is not True else set())


ATTACKED = """
import json, os, subprocess, sys, time
from bench.measure.sandbox.claims import WITHOUT_LAYERS, attempts, surroundings
from bench.measure.sandbox.run import run_all
busy = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
def used_s():  # by it, of processors
    with open(f"/proc/{busy.pid}/stat") as file: user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
try:
    with surroundings() as facts:
        before = os.stat(facts["file"])
        facts |= {"memory": 1, "file_bytes": 1, "processes": 1, "doomed": busy.pid}
        made = [(claim, program) for claim, program in attempts(facts) if claim not in WITHOUT_LAYERS]
        found = run_all([program for _, program in made], seconds=3.0, workers=1, without=WITHOUT)
        until = used_s() + 1.5  # beyond the limit that an attempt sets
        while busy.poll() is None and used_s() < until: time.sleep(0.05)
        same = before == os.stat(facts["file"])
    alive = busy.poll() is None
finally:
    busy.kill(); busy.wait()
print(json.dumps({"alive": alive, "same": same, "made": [
    [claim, program, outcome.passed, outcome.reason] for (claim, program), outcome in zip(made, found)]}))
"""


def attacked(without):
    """What became of all attempts of a plain user on a process and files of this same user."""
    return as_user(USERS["plain-user"], ATTACKED.replace("WITHOUT)", f"{without!r})"))


def test_each_attempt_succeeds_where_nothing_stands_in_its_way():
    """Negative control: an attempt that failed for a reason of its own would show nothing."""
    found = attacked(LAYERS)
    here = [each for each in found["made"] if each[0] != "be root"]  # nobody becomes that by asking
    excused = ("Operation not supported", "has no attribute", "Function not implemented")  # by older systems

    assert [] == [each for each in here if not (
        each[2] or any(words in each[3] for words in excused)
        or "os.open(os.__file__" in each[1]  # the library belongs to another user here
    )]  # fmt: skip
    assert {claim for claim, *_ in here} == {claim for claim, _, passed, _ in here if passed}
    assert not found["alive"] and not found["same"]


def test_without_namespaces_a_process_and_a_file_of_the_same_user_outlive_all_attempts():
    found = attacked(("namespaces",))

    assert [] == [each for each in found["made"] if each[2] and each[0] not in SEEN]
    assert found["alive"] and found["same"]


def test_a_program_neither_kills_nor_limits_its_own_warden():
    program = "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_{}, (0, 0))"
    programs = [program.format("CPU"), program.format("NOFILE"), FINE]
    refused, also, fine = run_all(programs, without=("namespaces", "user"), workers=1)

    assert "PermissionError: [Errno 1] Operation not permitted" == refused.reason == also.reason
    assert fine.passed


@pytest.mark.parametrize("change", ["os.chmod('x', 0o600)", "os.utime('x', (1, 1))", "os.chown('x', -1, -1)"])
def test_in_a_root_of_its_own_a_program_may_set_what_its_files_have(change):
    if run(FINE).layers["root"] is not True:
        pytest.skip("a program has no root of its own here")

    assert run(f"import os; open('x', 'w').close(); {change}").passed


def test_code_is_run_only_where_it_was_allowed():
    from bench.session.options import Options
    from bench.session.session import Workbench

    ask = Workbench.sandbox.func
    with pytest.raises(NotAvailable, match=says("only with --allow-code-execution")):
        ask(SimpleNamespace(options=Options()))
    assert forbidden() == ask(SimpleNamespace(options=Options(allow_code_execution=True)))


def test_threads_of_the_harness_may_run_programs_at_once():
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(FINE).passed)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert [True] * 4 == found
