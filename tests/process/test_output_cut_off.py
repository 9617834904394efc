"""Commands whose output is read in part, as `| head` does."""

import subprocess
import sys

import pytest

from compression.files.terminal import CLOSED_PIPE


@pytest.mark.parametrize(
    "command",
    [["-m", "compression", "list"], ["-m", "compression", "list", "--json"], ["-m", "bench", "baselines", "list"]],
)
def test_a_reader_that_leaves_ends_a_command_without_a_traceback(command):
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        said = child.stderr.read().decode()

    assert CLOSED_PIPE == child.returncode
    assert "Traceback" not in said and "BrokenPipe" not in said
