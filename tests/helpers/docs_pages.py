"""README and the pages of docs/: their blocks of code, and the commands in them."""

import contextlib
import itertools
import re
import shlex
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml
from processes import REPOSITORY

from bench.data.tasks import folder
from bench.data.tasks.table import SUITE, Task
from bench.metrics.registry import METRICS
from compression.architectures.table import ARCHITECTURES
from compression.checkpoints.formats import registry
from compression.layers.parts import KINDS, part_kinds
from compression.recipes.registry import METHODS, discover

ROOT = REPOSITORY
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.rglob("*.md")) if "report" not in path.parts)]
PROGRAMS = ("pytest", "python", "tox", ".ci/run", "pip", "pytest-benchmark", "mkdocs")
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORDS = re.compile(r"^(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:" + "|".join(map(re.escape, PROGRAMS)) + r")\b")


class Command(NamedTuple):
    """One command of a page: the words after environment variables, the program first and without its folder."""

    page: Path
    text: str
    words: tuple[str, ...]
    typed: bool  # into a shell; else it is named in a sentence, where what it needs may be left out


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """The fenced blocks of a page in one language."""
    return [code for found, code in _FENCED.findall(path.read_text()) if found == language]


def lines(path):
    """(line, whether it is typed) of the lines of a page that a shell takes, or that a sentence names."""
    found = [line for code in blocks(path, "bash") for line in code.splitlines()]
    for code in blocks(path, "console"):
        found += [line[2:] for line in code.splitlines() if line.startswith("$ ")]
    for code in blocks(path, "yaml"):
        table = yaml.safe_load(code)
        for job in table.get("jobs", {}).values() if isinstance(table, dict) else ():
            found += [step["run"] for step in job["steps"] if "run" in step]
    plain = _FENCED.sub("", path.read_text())
    found += [line.strip() for line in plain.splitlines() if line.startswith("    ")]
    named = [code for code in re.findall(r"`([^`\n]+)`", plain) if " " in code]
    return [(line, True) for line in found] + [(line, False) for line in named]


def commands(path):
    """The commands of a page, pipes and lists taken apart."""
    for line, typed in lines(path):
        if not _WORDS.match(line):
            continue
        for part in parts(line):
            words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, part))
            words[0] = words[0].removeprefix(".venv/bin/")
            yield Command(path, " ".join(part), tuple(words), typed)


def parts(line):
    """The words of each command of a line, without comments and what is behind a pipe."""
    found, piped = [[]], False
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    for word in lexer:
        if word in ("&&", ";", "|"):
            piped = word == "|"
            found.append([])
        elif not piped:
            found[-1].append(word)
    return [words for words in found if words]


@contextlib.contextmanager
def declared(path):
    """The examples of a page in force: its Python is run, and what it declares is gone afterwards."""
    discover()
    part_kinds()
    with contextlib.ExitStack() as held:
        for table in (METHODS, METRICS, SUITE, folder._READERS, KINDS, registry._FORMATS, ARCHITECTURES):
            held.enter_context(mock.patch.dict(table))
        space = vars(folder) | {"Task": Task, "__name__": f"example_of_{path.stem.replace('-', '_')}"}
        sys.modules[space["__name__"]] = types.ModuleType(space["__name__"])
        held.callback(sys.modules.pop, space["__name__"])  # and nothing that the example was the first to import
        for code in blocks(path, "python"):
            exec(compile(code, str(path), "exec"), space)
        if code := next((code for code in blocks(path, "python") if code.startswith("Task(")), ""):
            task = eval(code, space)
            SUITE[task.name] = task
        yield space
