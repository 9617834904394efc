"""This code beside that of a commit: real processes, a real repository, and what the gate makes of their rounds."""

import dataclasses
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import small_runs
from checkpoints import says
from healthy_results import CONTEXT, FINGERPRINT
from hypothesis import given
from hypothesis import strategies as st
from processes import completed

from bench import test_efficiency as efficiency
from bench.errors import BenchError, NotAvailable, OptionError
from bench.gate import verdicts
from bench.measure.against import commit as beside
from bench.measure.against.commit import Beside, Commit, Job, Process
from bench.measure.generation import Load, Round
from bench.metrics import all_metrics, metrics_of
from bench.metrics.speed import GenerationReading
from bench.results.row import Row

SLOW = """

def _slow(self, x, forward=Linear.forward):
    import time

    time.sleep(0.003)
    return forward(self, x)


Linear.forward = _slow
"""
RTN = "rtn(group_size=32)"
AGAINST = {"against": lambda workbench, recipe: efficiency.test_against(workbench, recipe, 1, "eager", "HEAD")}


def git(folder, *arguments):
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = completed(["git", *arguments], cwd=folder, env=os.environ | identity, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository of this code with one commit, and a tiny checkpoint beside it."""
    root = tmp_path_factory.mktemp("clone")
    for package in beside.CODE:
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(beside._ROOT / package, root / package, ignore=ignored)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "sound")
    small_runs.make_base(root)
    return root


@pytest.fixture
def here(clone, monkeypatch):
    monkeypatch.setattr(beside, "_ROOT", clone)
    return clone


@pytest.fixture
def commit(here):
    """The code of the commit, gone behind the test."""
    found = Commit("HEAD")
    yield found
    found.close()


def job(folder, **given):
    load = Load(prompt_tokens=8, new_tokens=4)
    known = {"base": str(folder / "tiny"), "recipe": None, "folders": (None, None), "device": "cpu", "seed": 0,
             "calibration": None, "load": load, "mode": "eager", "warmup": 0}  # fmt: skip
    return Job(**known | given)


def test_code_that_became_slower_than_its_commit_fails(here, monkeypatch):
    linear = here / "compression" / "layers" / "linear.py"
    sound = linear.read_text(encoding="utf-8")
    linear.write_text(sound + SLOW, encoding="utf-8")
    try:
        monkeypatch.setattr(beside, "PAIRS", 1)
        done = small_runs.one_run(here, RTN, measurements=AGAINST, against="HEAD", runs=5, warmup=1)
    finally:
        linear.write_text(sound, encoding="utf-8")

    commit = git(here, "rev-parse", "--short=12", "HEAD")
    rows = {row.metric: row for row in done.rows.values() if row.of != "artefact"}
    decode = rows["against.decode_ms"]
    assert {"against.decode_ms", "against.latency_ms", "against.prefill_ms", "against.ttft_ms"} == set(rows)
    assert commit == decode.params["commit"]
    assert decode.value - decode.base_value > 3 * 7  # ms, slept in each of at least seven layers of a step
    assert decode.ratio == decode.value / decode.base_value
    assert len(decode.samples) == len(decode.base_samples) >= 20  # a change is believed at the second look
    [words] = done.failing
    assert re.search(says("against.decode_ms", commit, "regressed", "tolerance +1 %"), words)


class Quick:
    """Stands where a process does, and has its rounds at once: their number is their time.

    The code in a folder "old" knows of no waits.
    """

    started: ClassVar[list] = []

    def __init__(self, code, given):
        self.started.append((code, given["folder"]))
        self.waits = () if code.name == "old" else (0.1, 0.1, 0.1)

    def ready(self):
        return self

    def round(self, number):
        return Round(ttft_s=1.0, prefill_s=1.0, steps_s=(1.0 + number,), total_s=2.0, kv_bytes=1, tokens=2,
                     waits_s=self.waits)  # fmt: skip

    def close(self):
        pass


@given(st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_both_sides_have_equal_rounds_with_equal_prompts_at_equal_places(first, further, over):
    code = SimpleNamespace(root=Path("here"), folder=Path("there"), name="0" * 12)
    with mock.patch.object(beside, "Process", Quick), mock.patch.object(Quick, "started", []):
        rounds = Beside(job(Path("."), folders=(Path("a"), Path("b"))), code)
        rounds.run(first, seconds=0)
        rounds.run(first + further, seconds=0 if over else 60)
        started = Quick.started

    own, theirs = ([each.steps_s[0] for each in side] for side in rounds.rounds)
    assert own == theirs == [1.0 + number for number in range(len(own))]
    pairs = min(further, beside.PAIRS)
    assert len(own) == first + (further // pairs if over else further)  # what has begun is ended
    assert started == [(code.root, "a"), (code.folder, "b")] * (1 + (1 if over else pairs))


@pytest.mark.parametrize("codes", [("new", "new"), ("new", "old"), ("old", "new"), ("old", "old")])
def test_waits_count_only_where_the_code_of_both_sides_tells_them(codes, monkeypatch):
    monkeypatch.setattr(beside, "Process", Quick)
    own, other = map(Path, codes)
    rounds = Beside(job(Path(".")), SimpleNamespace(root=own, folder=other, name="0" * 12))

    rounds.run(3, seconds=0)

    assert [codes == ("new", "new")] * 6 == [bool(each.waits_s) for side in rounds.rounds for each in side]


def test_times_are_without_waits_but_for_the_latency():
    same = {"kv_bytes": 1, "tokens": 3}
    calm = Round(ttft_s=3.0, prefill_s=2.0, steps_s=(1.0, 1.0), total_s=5.0, waits_s=(0.0, 0.0, 0.0, 0.0), **same)
    crowded = Round(ttft_s=3.5, prefill_s=2.25, steps_s=(1.5, 2.0), total_s=7.0, waits_s=(0.25, 0.25, 0.5, 1), **same)
    readings = [GenerationReading(rounds=(one,), flops=1, peak_flops_per_s=1.0) for one in (calm, crowded)]

    values = {each.name: [each(one) for one in readings] for each in metrics_of(verdicts.AGAINST)}

    assert 4 == len(values)
    assert ["against.latency_ms"] == [name for name, (quiet, busy) in values.items() if quiet != busy]


def test_where_no_waits_are_told_a_step_that_was_interrupted_does_not_count():
    one = Round(ttft_s=3.0, prefill_s=2.0, steps_s=(1.0, 1.0, 9.0), total_s=14.0, kv_bytes=1, tokens=4)
    told = dataclasses.replace(one, waits_s=(0.0, 0.0, 0.0, 0.0, 5.0))
    decode = {each.name: each for each in metrics_of(verdicts.AGAINST)}["against.decode_ms"]

    values = [decode(GenerationReading(rounds=(each,), flops=1, peak_flops_per_s=1.0)) for each in (one, told)]

    assert [1000.0, 2000.0] == values


def test_what_was_measured_beside_a_commit_is_no_baseline(here, monkeypatch):
    monkeypatch.setattr(beside, "Process", Quick)

    done = small_runs.one_run(here, RTN, measurements=AGAINST, against="HEAD", runs=5, update=True)

    assert 4 == sum(row.of == "against" for row in done.rows.values()) and [] == done.failing
    [recorded] = (here / "baselines").glob("*/*.json")  # of the size, which every run has
    assert "against." not in recorded.read_text()


def test_a_recipe_that_a_side_does_not_know_is_said_to_be_no_recipe_of_it(here, commit, tmp_path):
    (commit.folder / "compression" / "methods" / "quantization" / "weight_only" / "rtn.py").unlink()
    folders = (tmp_path / "own", tmp_path / "theirs")

    with pytest.raises(NotAvailable, match=says(f"the code of {commit.name} cannot make it", "rtn")):
        Beside(job(here, recipe=RTN, folders=folders), commit).run(1, seconds=60)
    assert (tmp_path / "own").exists()


def test_a_side_that_breaks_in_another_way_fails_and_is_not_passed_over(here, commit, tmp_path):
    linear = commit.folder / "compression" / "layers" / "linear.py"
    linear.write_text(linear.read_text(encoding="utf-8") + "\nraise MemoryError('no room')\n", encoding="utf-8")

    with pytest.raises(BenchError, match=says(f"the code of {commit.name} cannot make it", "no room")) as raised:
        Beside(job(here, recipe=RTN, folders=(tmp_path / "own", tmp_path / "theirs")), commit).run(1, seconds=60)
    assert not isinstance(raised.value, NotAvailable)


def test_a_process_that_is_killed_is_told_with_its_ending(here):
    process = Process(here, job(here).given(0)).ready()
    process._process.send_signal(signal.SIGKILL)

    with pytest.raises(BenchError, match=says("ended with status -9")):
        process.round(0)
    process.close()


def test_a_commit_that_git_does_not_know_and_a_folder_without_one_are_refused(here, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=says("--against nowhere", "git knows no commit 'nowhere'")):
        Commit("nowhere")
    monkeypatch.setattr(beside, "_ROOT", tmp_path)
    with pytest.raises(OptionError, match=says("--against HEAD", "run from a clone")):
        Commit("HEAD")


def test_nothing_is_left_of_the_commits_code(here):
    commit = Commit("HEAD")
    assert set(beside.CODE) == {each.name for each in commit.folder.iterdir()}
    commit.close()

    assert not commit.folder.exists()


@given(st.floats(0.5, 2), st.integers(1, 200), st.sampled_from(["auto", "strict", "off"]))
def test_the_gate_compares_with_the_other_side_and_with_no_baseline(slower, rows, mode):
    then = tuple(4.0 + 0.001 * i for i in range(20))
    row = Row(
        run="r", base="reference", recipe="nf4", device=FINGERPRINT, metric="against.decode_ms", unit="ms/token",
        better="lower", params={"commit": "0" * 12}, seed=0, of=verdicts.AGAINST, value=slower * 4.01, base_value=4.01,
        ratio=slower, samples=tuple(slower * each for each in then), base_samples=then,
    )  # fmt: skip

    verdict = verdicts.judge_beside(
        row, level=verdicts.LEVEL / 2 / rows, mode=mode, fingerprint=FINGERPRINT, context=CONTEXT, metrics=all_metrics()
    )

    if mode == "off":
        assert ("not_comparable", False) == (verdict.outcome, verdict.fails)
    elif slower > 1.02:
        assert ("regressed", True) == (verdict.outcome, verdict.fails)
    elif slower < 0.98:
        assert ("improved", False) == (verdict.outcome, verdict.fails)
    elif 0.992 < slower < 1.008:
        assert ("pass", False) == (verdict.outcome, verdict.fails)
