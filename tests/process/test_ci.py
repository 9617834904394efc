"""What continuous integration runs is there, is pinned, may do little, and says by its exit status what happened."""

import configparser
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from processes import completed

import bench
from bench.__main__ import COMMANDS
from bench.commands.baselines import main as baselines

ROOT = Path(bench.__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PARTS = {"lint", "tests", "bench", "quick"}


def contents(path):
    return yaml.safe_load(path.read_text())


def jobs():
    return [(path.stem, name, job) for path in WORKFLOWS for name, job in contents(path)["jobs"].items()]


def steps():
    return [step for _, _, job in jobs() for step in job["steps"]]


# --- The workflow files ----------------------------------------------------------------------------------------------


def schema_check(*paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return completed([*command, *map(str, paths)])


def test_the_workflows_are_of_githubs_schema_and_a_broken_one_is_not(tmp_path):
    checked = schema_check(*WORKFLOWS)
    assert (0, 2) == (checked.returncode, len(WORKFLOWS)), checked.stdout

    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:", 1))
    refused = schema_check(broken)
    assert 1 == refused.returncode
    assert "run-on" in refused.stdout


def test_actionlint_finds_nothing():
    if not (actionlint := shutil.which("actionlint")):
        pytest.skip(
            'actionlint is not installed: pip install -c constraints.txt -e ".[ci]" (it is fetched from GitHub)'
        )
    found = completed([actionlint], cwd=ROOT)
    assert (0, "") == (found.returncode, found.stdout)


def test_every_action_is_pinned_to_a_commit_and_names_its_release():
    lines = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) >= 5
    assert [] == [line for line in lines if not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)]


def test_workflows_may_read_and_only_the_job_that_runs_no_code_of_a_pull_request_may_write():
    assert [{"contents": "read"}] * 2 == [contents(path)["permissions"] for path in WORKFLOWS]
    more = {name: job["permissions"] for _, name, job in jobs() if "permissions" in job}
    assert {"comment": {"pull-requests": "write"}} == more
    comment = contents(WORKFLOWS[0])["jobs"]["comment"]
    assert [] == [
        step for step in comment["steps"] if "checkout" in step.get("uses", "") or ".ci" in step.get("run", "")
    ]
    assert "pull_request_target" not in "".join(path.read_text() for path in WORKFLOWS)
    assert all(not step["with"]["persist-credentials"] for step in steps() if "checkout" in step.get("uses", ""))


def test_the_gpu_job_wants_a_labelled_machine_and_never_runs_pull_requests():
    workflow = contents(ROOT / ".github" / "workflows" / "gpu.yml")
    assert ["self-hosted", "linux", "gpu"] == workflow["jobs"]["gpu"]["runs-on"]
    assert {"push", "workflow_dispatch"} == set(workflow[True])  # YAML reads the word `on` as a truth value
    assert {"gpu"} == set(contents(ROOT / ".github" / "actionlint.yaml")["self-hosted-runner"]["labels"])


def test_no_text_of_others_gets_into_a_shell():
    assert [] == [step["run"] for step in steps() if "${{" in step.get("run", "")]


def test_the_summary_that_is_shown_is_the_one_that_the_benchmark_writes():
    shown = {path for step in steps() for path in re.findall(r"[.\w/]+\.md", step.get("run", ""))}
    assert {".bench/report/summary.md"} == shown
    assert "--report .bench/report" in (ROOT / ".ci" / "run").read_text()


def test_every_part_of_ci_run_that_a_workflow_asks_for_is_there():
    asked = [found for step in steps() for found in re.findall(r"\.ci/run(.*)", step.get("run", ""))]
    assert {"lint", "tests", "bench"} == {part for parts in asked for part in parts.split()}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- The script that they run ----------------------------------------------------------------------------------------

# a Python that makes environments, and tools in them that note what they are asked; the one named FAILING fails
PYTHON = """#!/bin/bash
if [ "$1" = --version ]; then echo Python 3; exit; fi
mkdir -p "$3/bin"
for tool in pip ruff lint-imports mkdocs pytest python; do cp "$TOOL" "$3/bin/$tool"; done
"""
TOOL = """#!/bin/bash
printf '%q ' "$(basename "$0")" "$@" >>"$NOTES"
echo >>"$NOTES"
[ "$(basename "$0")" != "$FAILING" ] || exit "${STATUS:-1}"
"""


@pytest.fixture
def ci(tmp_path):
    """Runs `.ci/run` in a tree of its own, with tools that note what they are asked; gives its end and the notes."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python, tool, notes = (tmp_path / name for name in ("python3", "tool", "notes"))
    for path, text in ((python, PYTHON), (tool, TOOL)):
        path.write_text(text)
        path.chmod(0o755)

    def call(*parts, **variables):
        own = {"PYTHON": str(python), "TOOL": str(tool), "NOTES": str(notes), "CI_VENV_DIR": str(tmp_path / "venv")}
        notes.write_text("")
        end = completed([tmp_path / ".ci" / "run", *parts], env=os.environ | own | variables)
        lines = [shlex.split(line) for line in notes.read_text().splitlines()]
        return end, [line for line in lines if line[0] != "pip"]

    return call


def test_ci_run_lints_tests_and_measures_in_this_order(ci):
    end, notes = ci()

    assert (0, "") == (end.returncode, end.stderr)
    assert ["ruff", "ruff", "lint-imports", "mkdocs", "pytest", "pytest", "pytest"] == [line[0] for line in notes]
    assert ["mkdocs", "build", "--strict"] == notes[3][:3]
    dearest = ["--durations", "20"]
    assert [["pytest", *dearest], ["pytest", "-m", "process", *dearest]] == notes[4:6]
    assert ["pytest", "bench"] == notes[6][:2]


@pytest.mark.parametrize(
    ("parts", "tools"),
    [
        (("lint",), ["ruff", "ruff", "lint-imports", "mkdocs"]),
        (("tests",), ["pytest", "pytest"]),
        (("tests", "lint"), ["pytest", "pytest", "ruff", "ruff", "lint-imports", "mkdocs"]),
        (("quick",), ["ruff", "ruff", "lint-imports", "mkdocs", "python", "pytest"]),
    ],
)
def test_ci_run_runs_the_parts_that_it_is_told(ci, parts, tools):
    end, notes = ci(*parts)
    assert (0, tools) == (end.returncode, [line[0] for line in notes])


def test_a_part_that_is_not_there_is_refused_before_anything_runs(ci):
    end, notes = ci("lint", "benhc")
    assert (4, []) == (end.returncode, notes)
    assert "no part 'benhc'; allowed are lint, tests, bench, quick" in end.stderr


@pytest.mark.parametrize("status", ["1", "4"])
def test_the_exit_status_is_that_of_the_part_that_failed(ci, status):
    end, notes = ci("bench", "lint", FAILING="pytest", STATUS=status)
    assert (int(status), ["pytest"]) == (end.returncode, [line[0] for line in notes])


def test_nothing_runs_after_a_part_that_failed(ci):
    end, notes = ci(FAILING="ruff", STATUS="1")
    assert (1, ["ruff"]) == (end.returncode, [line[0] for line in notes])


def test_every_command_of_ci_run_is_understood(ci, tmp_path):
    _, notes = ci("bench", "quick", CI_MODEL="nf4", CI_BENCH_OPTIONS="--update-baselines --gate strict")
    benches = [line[3] for line in notes if line[:3] == ["python", "-m", "bench"]]
    assert ["baselines"] == benches
    assert set(benches) <= set(COMMANDS)
    runs = [line[1:] for line in notes if line[0] == "pytest"]
    assert ["--update-baselines", "--gate", "strict"] == runs[0][-3:]
    for arguments in runs:
        assert "test_size[nf4]" in collected(*arguments)


def collected(*arguments):
    """What pytest would run, as it says in the repository; fails where it does not understand the arguments."""
    command = [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-v", "-p", "no:cacheprovider"]
    done = completed(command, cwd=ROOT)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_tox_measures_what_ci_run_measures(ci):
    _, notes = ci("bench")
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert notes[0] == shlex.split(tox["testenv:bench"]["commands"].replace("{posargs}", ""))


# --- Before a commit -------------------------------------------------------------------------------------------------

HOOKS = {hook["id"]: hook for hook in contents(ROOT / ".pre-commit-hooks.yaml")}


def test_the_hook_of_baseline_files_passes_here_and_fails_on_a_damaged_one(tmp_path, capsys):
    assert "python -m bench baselines list" == HOOKS["compression-baselines"]["entry"]
    baselines(["list", "--baselines", str(ROOT / "baselines")])
    assert "reference nf4: " in capsys.readouterr().out

    shutil.copytree(ROOT / "baselines", tmp_path / "baselines")
    path = tmp_path / "baselines" / "reference" / "nf4.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(SystemExit) as end:
        baselines(["list", "--baselines", str(tmp_path / "baselines")])
    assert 2 == end.value.code
    assert "nf4.json" in capsys.readouterr().err


def test_the_hook_of_sizes_runs_that_alone():
    tool, *arguments = shlex.split(HOOKS["compression-size"]["entry"])
    assert "pytest" == tool
    assert ["test_size[nf4]"] == re.findall(r"<Function (\S+)>", collected(*arguments))
