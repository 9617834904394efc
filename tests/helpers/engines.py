"""Processes that answer lines of JSON and no engine: what goes wrong with one, on purpose."""

import sys
from contextlib import contextmanager

import psutil
from processes import wait_until

from bench.measure.engines import processes
from bench.measure.engines.child import Child
from bench.measure.engines.engine import Engine, Options

FACTS = {"engine": "none", "version": "1", "torch": None, "transformers": None, "vocabulary": 10, "flags": {}}


@contextmanager
def talking(code, log, **options):
    """A child that runs Python code."""
    options = {"environment": {}, "patience_s": 600.0} | options
    child = Child("the process", [sys.executable, "-u", "-c", code], log=log, **options)
    try:
        yield child
    finally:
        child.close()


def conversation(body):
    """The code of a process with the real conversation around a model that a test makes up in code as `Model`."""
    return (
        f"import sys\nsys.path.insert(0, {processes.__path__[0]!r})\nfrom serving import serve\n{body}\n"
        f"serve(lambda **fields: (Model(), {FACTS}))\n"
    )


@contextmanager
def misbehaving(folder, body, **options):
    """An engine that is such a process."""
    script = folder / "engine.py"
    script.write_text(conversation(body))
    options = {"options": Options(sequences=2, max_length=8)} | options
    with Engine.start(
        "transformers", folder, python=sys.executable, log=folder / "engine.log", script=script, **options
    ) as engine:
        yield engine


def wait_until_gone(pid):
    """Wait until a process has ended; one that nobody collects stays as a zombie."""

    def gone():
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(gone)
