"""Extras of the project: they resolve, and refusals name the command by which they are had from a checkout."""

import ast
import re
import sys
import tomllib

import pytest
from checkpoints import says
from processes import REPOSITORY, completed

import compression
from compression import BackendError
from compression.errors import install_command

EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SOURCES = [
    path for folder in ("compression", "bench", "tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
]
TEXTS = [
    *SOURCES,
    *REPOSITORY.glob("*.md"),
    REPOSITORY / "pyproject.toml",
    REPOSITORY / "tox.ini",
    *REPOSITORY.glob(".github/*/*.yml"),
]


def test_nobody_is_sent_to_an_index_for_this_project():
    """Its name is on none, so that whoever registers it there could run code with whoever follows such a command."""
    name = "compression-bench"
    sent = [path for path in TEXTS if re.search(rf"pip install[^\n]*[\s'\"]{name}\b|{name}\[", path.read_text())]

    assert [] == sent


def test_every_extra_that_a_message_names_is_there():
    named = set()
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "install_command":
                named |= {each.value for each in call.args if isinstance(each, ast.Constant)}
    written = {extra for path in TEXTS for extra in re.findall(r"-e [\"']\.\[(\w+)\]", path.read_text())}

    assert {"gptqmodel", "hqq", "math", "rag"} <= named <= set(EXTRAS)
    assert written <= set(EXTRAS)


def test_an_extra_names_nothing_that_excludes_a_release_of_the_tested_set():
    """As gptqmodel 7.6.0 did, which pins NumPy: it is installed by a command of its own, without what it asks for."""
    from packaging.requirements import Requirement

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if "==" in line}
    wanted = [Requirement(text) for extra in EXTRAS.values() for text in extra]

    held = [each for each in wanted if each.name.lower() in pinned]

    assert [] == [str(each) for each in held if not each.specifier.contains(pinned[each.name.lower()])]
    assert "gptqmodel" not in {each.name for each in wanted}
    assert "pip install --no-deps gptqmodel==7.6.0" in install_command("gptqmodel")


@pytest.mark.parametrize(
    ("extra", "steps"),
    [("hqq", "hqq(backend=hqq,group_size=32)"), ("gptqmodel", "gptq(backend=gptqmodel,group_size=32,samples=2)")],
)
def test_a_missing_library_is_refused_with_that_command(tiny_shapes, monkeypatch, extra, steps):
    monkeypatch.setitem(sys.modules, extra, None)

    with pytest.raises(BackendError, match=says("cannot be imported", install_command(extra))):
        compression.compress("random:tiny-llama", steps)


def test_the_command_is_what_a_shell_takes():
    for extra in EXTRAS:
        done = completed(["bash", "-n", "-c", install_command(extra)])
        assert (0, "") == (done.returncode, done.stderr)
        assert f"pip install -c constraints.txt -e '.[{extra}]'" in install_command(extra)
