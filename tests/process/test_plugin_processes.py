"""The command in processes of its own: what it imports, and a run that is killed."""

import json
import signal
import subprocess
import sys

import pytest
from commands import ENERGY, FILES, PERPLEXITY, QUICK, RTN, SIZE
from processes import completed, environment, running, wait_until

QUIETLY = ["-q", "-p", "bench.session.plugin", "-p", "no:cacheprovider"]


def _python(code, cwd):
    return completed([sys.executable, "-c", code], cwd=cwd, env=environment())


def test_perplexity_of_a_foreign_checkpoint_on_a_folder_touches_nothing_of_the_reference(
    checkpoint, text_folder, tmp_path
):
    code = (
        "import sys, pytest\n"
        f"code = pytest.main([*{QUIETLY}, {PERPLEXITY!r}, '--model', 'fp16', '--length', '32',"
        f" '--base', {str(checkpoint)!r}, '--data', {str(text_folder)!r}, '--rootdir', {str(tmp_path)!r}])\n"
        "assert code == 0, code\n"
        "assert not [name for name in sys.modules if name.startswith('bench.reference.')]\n"
    )
    done = _python(code, cwd=tmp_path)

    assert 0 == done.returncode, done.stdout + done.stderr


def test_collecting_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys, pytest\n"
        f"code = pytest.main([*{QUIETLY}, '--collect-only', '--model', 'all', {str(FILES)!r},"
        f" '--rootdir', {str(tmp_path)!r}])\n"
        "assert code == 0, code\n"
        "assert not {'torch', 'transformers', 'hypothesis'} & set(sys.modules)\n"
    )
    done = _python(code, cwd=tmp_path)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "test_generation[nf4-b1-eager]" in done.stdout


def test_a_killed_run_goes_on_where_it_was(checkpoint, tmp_path):
    """Killed for good within the energy window, after the sizes are on the disk; --resume measures only the rest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.session.plugin", "-p", "no:cacheprovider", SIZE,
               ENERGY, "--base", checkpoint, "--model", RTN, "--rootdir", tmp_path, *QUICK]  # fmt: skip
    journal = tmp_path / ".bench" / "journal.jsonl"
    with running(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as child:
        wait_until(lambda: journal.exists() and "efficiency.stored_bytes" in journal.read_text(), child)
        child.send_signal(signal.SIGKILL)
    other = completed([*command, "--resume", "--runs", "7"], cwd=tmp_path, env=environment())
    assert other.returncode == pytest.ExitCode.USAGE_ERROR
    assert "had runs" in other.stdout + other.stderr
    completed([*command, "--resume"], cwd=tmp_path, env=environment(), check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len({r["run"] for r in records}) == 1
    assert sum(r.get("metric") == "efficiency.stored_bytes" for r in records) == 1
    assert sum(r.get("metric") == "efficiency.energy_mj_per_token" for r in records) == 1
    assert records[-1] == {**records[-1], "kind": "end", "status": "passed"}
