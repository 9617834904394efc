"""Runs that are really killed, at random moments: `python tests/helpers/kills.py COUNT [SEED]` prints a line of JSON.

One process imports everything and forks a child for each try, so that a kill costs what the child measured. A child
tells by a pipe what it has finished. After every kill, and once nothing is left, the journal is looked at.
"""

import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from small_runs import make_base, measured, options

from bench.metrics import metrics_of
from bench.results.journal import read, resume
from bench.session.session import Workbench

RECIPES = ("fp16", "rtn(group_size=32)", "nf4(group_size=32)", "rtn(bits=8,group_size=32)")


def child(base: Path, journal: Path, tell: int) -> None:
    """Go on with the run, or begin it, and tell each measurement that is finished."""
    given = options(base, *RECIPES, journal=journal, gate="off", resume=True)
    failing = measured(Workbench(given), done=lambda recipe, what: os.write(tell, f"{recipe}\t{what}\n".encode()))
    assert not failing, failing


def attempt(base: Path, journal: Path, delay: float | None) -> tuple[bool, list[tuple[str, str]], float]:
    """Whether a child was killed (`delay` seconds after its start), what it told, and how long it took."""
    reading, telling = os.pipe()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(base, journal, telling)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(telling)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    with open(reading, encoding="utf-8") as told:
        lines = told.read().splitlines()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, "a child failed"
    return killed, [tuple(line.split("\t")) for line in lines], time.monotonic() - begin


def values(journal: Path) -> dict[tuple[str, str], float]:
    """Every number of the journal by recipe and key; each is there once."""
    rows = read(journal).rows()
    found = {(row.recipe, row.key): row.value for row in rows}
    assert len(found) == len(rows), "a row is counted twice"
    return found


def check(journal: Path, finished: set[tuple[str, str]], reference: dict[tuple[str, str], float]) -> None:
    """Nothing that was told is lost, and every number that is there is the one that an undisturbed run measures."""
    found = values(journal)
    assert found.items() <= reference.items(), "another number than without kills"
    there = {(row.recipe, row.metric) for row in read(journal).rows()}
    told = {(recipe, metric.name) for recipe, of in finished for metric in metrics_of(of)
            if (recipe, of) != ("fp16", "divergence")}  # fmt: skip
    assert told <= there, f"lost: {told - there}"


def lines_of(journal: Path) -> Counter[tuple[str, str]]:
    """How many lines of rows there are of each measurement."""
    return Counter((each["recipe"], each["of"]) for each in read(journal).records if each["kind"] == "row")


def check_whole(journal: Path, written: dict[tuple[str, str], int], reference: dict[tuple[str, str], float]) -> None:
    """The run is complete, one run, and no line was added to a measurement that was finished before a kill."""
    contents = read(journal)
    assert values(journal) == reference
    assert len({each["run"] for each in contents.records}) == 1
    assert contents.records[-1]["kind"] == "end" and contents.records[-1]["status"] == "passed"
    assert resume(journal) is None
    assert written.items() <= lines_of(journal).items(), "measured again"


def main(count: int, seed: int) -> dict[str, float]:
    """Kill `count` runs; figures of what was seen."""
    torch.set_num_threads(1)
    numbers = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_base(base)
        os.chdir(folder)
        measured(Workbench(options(base, *RECIPES, journal=base / "warm" / "journal.jsonl", gate="off")))
        gc.collect()
        gc.freeze()  # all that is imported by now: compressing collects garbage, and would look through it every time
        killed, _, seconds = attempt(base, base / "undisturbed" / "journal.jsonl", None)
        reference = values(base / "undisturbed" / "journal.jsonl")
        kills = completed = early = torn = partial = 0
        while kills < count:
            journal = base / str(completed) / "journal.jsonl"
            finished: set[tuple[str, str]] = set()
            written: dict[tuple[str, str], int] = {}
            for last in (False, False, False, True):
                delay = None if last or kills == count else numbers.uniform(0, seconds)
                killed, told, _ = attempt(base, journal, delay)
                kills += killed
                finished |= set(told)
                if not journal.exists():
                    early += 1
                    continue
                check(journal, finished, reference)
                torn += len(read(journal).torn)
                partial += bool(finished) and len(values(journal)) < len(reference)
                records = read(journal).records
                if records and records[-1]["kind"] == "end":  # a kill may come behind the end
                    check_whole(journal, written, reference)
                    completed += 1
                    break
                written = {name: count for name, count in lines_of(journal).items() if name in finished}
    return {"kills": kills, "completed": completed, "before_the_journal": early, "torn_lines": torn,
            "within_the_run": partial, "seconds_of_a_run": round(seconds, 3), "rows": len(reference)}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
