"""The command that judges: a server that misbehaves, a run that is killed, a key that must not be found."""

import json
import signal
import subprocess
import sys

import pytest
from commands import FILES, pytest_bench
from judges import KEY, MISHAPS, Server, by_answer
from processes import running, wait_until

from bench.metrics import all_metrics
from compression import locate

pytest_plugins = ["pytester"]

TESTS = FILES / "test_judge.py"
ROOT = FILES.parent
JUDGED = f"{TESTS}::test_judged"


@pytest.fixture
def run(imported, pytester, monkeypatch):
    """Run the benchmarks of judging in a repository of somebody else's, with a key in the environment."""
    monkeypatch.setenv("BENCH_JUDGE_KEY", KEY)

    def call(*arguments, tests=TESTS):
        return pytest_bench(pytester, tests, *arguments)

    return call


def asking(server, count=4):
    return ("--judge-url", server.url, "--judge-model", "judge-1", "--num-questions", count, "--judge-wait", "0.001",
            "--judge-attempts", "30", "--judge-new-tokens", "8")  # fmt: skip


def rows_of(folder):
    lines = (folder / ".bench" / "journal.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "row"]


def test_the_command_survives_a_misbehaving_server_asks_nothing_twice_and_leaves_no_key(run, pytester):
    with Server(mishaps=lambda number: MISHAPS[number % len(MISHAPS)] if number % 2 else None) as server:
        first = run("--model", "fp16,rtn(bits=2)", *asking(server))
        asked = server.answered.total()
        again = run("--model", "fp16,rtn(bits=2)", *asking(server), tests=JUDGED)
    rows = rows_of(pytester.path)
    files = [path for path in pytester.path.rglob("*") if path.is_file()]

    first.assert_outcomes(passed=8)
    again.assert_outcomes(passed=2)
    assert {"ok"} == {row["status"] for row in rows}
    assert {name for name in all_metrics() if name.startswith("judge.")} == {
        row["metric"] for row in rows if row["metric"].startswith("judge.")
    }
    assert asked == server.answered.total()
    assert {1} == set(server.answered.values())
    assert {"judge.jsonl", "journal.jsonl"} <= {path.name for path in files}
    assert [] == [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in first.stdout.str() + first.stderr.str()
    assert {f"Bearer {KEY}"} == server.keys  # it was there to be leaked


@pytest.mark.process
def test_a_killed_run_is_resumed_without_asking_the_judge_twice(run, pytester):
    with Server(mishaps=lambda number: "hang" if number == 9 else None) as server:
        arguments = [*map(str, asking(server)), "--judge-concurrency", "1", "--model", "fp16"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pytest.ini",
                   "--rootdir", ROOT, JUDGED, *arguments]  # fmt: skip
        with running(command, cwd=pytester.path, stdout=subprocess.DEVNULL) as child:
            wait_until(server.held.is_set, child)
            child.send_signal(signal.SIGKILL)
            assert -signal.SIGKILL == child.wait()
        before = server.answered.total()
        result = run(*arguments, "--resume", tests=JUDGED)

    result.assert_outcomes(passed=1)
    assert 9 == before
    assert 2 + 4 * (2 + 2) == server.answered.total()  # steps; scores and instructions of each question
    assert {1} == set(server.answered.values())


def test_a_judge_that_changed_its_mind_is_seen_question_by_question(run, pytester):
    with Server() as server:
        run("--model", "fp16", *asking(server, 20), "--update-baselines", tests=JUDGED).assert_outcomes(passed=1)
        run("--model", "fp16", *asking(server, 20), tests=JUDGED).assert_outcomes(passed=1)
        server.judge = by_answer({}, otherwise="1")
        result = run("--model", "fp16", *asking(server, 20), "--judge-cache", "new.jsonl", tests=JUDGED)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*judge.g_eval_correctness*regressed*"])


def test_without_a_judge_the_rows_say_how_to_give_one(run, pytester):
    result = run("--model", "fp16", "--num-questions", 2, tests=JUDGED)
    rows = rows_of(pytester.path)

    result.assert_outcomes(passed=1)
    assert {"not_available"} == {row["status"] for row in rows}
    assert all("--judge-url URL --judge-model NAME" in row["reason"] for row in rows)


def test_a_local_judge_is_asked_by_its_log_probabilities(run, pytester, small_judge):
    result = run("--model", "fp16", "--num-questions", 2, "--judge", small_judge, tests=JUDGED)
    scores = {row["metric"]: row for row in rows_of(pytester.path)}

    result.assert_outcomes(passed=1)
    assert 0 < scores["judge.g_eval"]["value"] < 1
    row = scores["judge.g_eval"]
    judge = {"name": "local:small", "digest": locate(str(small_judge)).digest}
    assert judge == row["inputs"]["judge"]
    assert {"judge": judge["digest"][:12], "scores": "logprobs"}.items() <= row["params"].items()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--judge-url", "http://127.0.0.1:9/v1"), "--judge-url needs --judge-model"),
        (("--judge-url", f"http://u:{KEY}@h/v1", "--judge-model", "m"), "put the key into BENCH_JUDGE_KEY"),
        (("--judge", "nowhere"), "nowhere"),
        (("--num-questions", "0"), "--num-questions must be from 1 to"),
        (("--judge-timeout", "0"), "--judge-timeout must be at least 0.001, not 0"),
    ],
    ids=["model", "password", "spec", "questions", "timeout"],
)
def test_what_cannot_be_is_said_before_anything_is_compressed(run, pytester, given, words):
    result = run("--model", "fp16", *given)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    assert words in result.stderr.str()
    assert KEY not in result.stdout.str() + result.stderr.str()


def test_a_judge_that_refuses_is_said_before_anything_is_compressed(run, pytester):
    with Server(mishaps=lambda number: "401") as server:
        result = run("--model", "fp16", *asking(server))

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*status 401*BENCH_JUDGE_KEY*"])
    assert KEY not in result.stdout.str() + result.stderr.str()
