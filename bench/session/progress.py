"""Progress of a run while pytest captures the output: a bar on a terminal, lines elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from compression.files.terminal import terminal

if TYPE_CHECKING:
    from bench.session.options import Options

EVERY_S = 60.0  # between two lines of a measurement that takes long


class Bar:
    """Called with (done, total, what); drawn by rich on stderr and gone when it is done."""

    def __init__(self, config: pytest.Config):
        self._capture: Any = config.pluginmanager.getplugin("capturemanager")
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int, what: str) -> None:
        from rich.markup import escape

        what = escape(terminal(what))
        with self._capture.global_and_fixture_disabled():
            if self._progress is None:
                from rich.console import Console
                from rich.progress import Progress

                self._progress = Progress(transient=True, console=Console(stderr=True))
                self._progress.start()
                self._task = self._progress.add_task(what, total=total)
            self._progress.update(self._task, completed=done, description=what)
            if done >= total:
                self._progress.stop()
                self._progress = None


class Lines:
    """Lines on stderr for logs: one for each finished recipe, and one a minute of a measurement that takes long.

    The latter come from a thread that otherwise sleeps, so that also a library's long call is told of.

    Args:
        recipes: how many recipes the run measures; 0 where others tell of finished ones.
        measurements: how many tests it has.
        write: takes a line in place of stderr.
    """

    def __init__(
        self, config: pytest.Config, recipes: int, measurements: int, every: float = EVERY_S,
        write: Callable[[str], None] | None = None,
    ):  # fmt: skip
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            self._file = os.dup(2)  # what stderr is outside of tests, whose own is captured
        self._write = write or self._to_stderr
        self._recipes, self._measurements, self._every = recipes, measurements, every
        self._begin = self._recipe_begin = time.monotonic()
        self._measured = self._of_recipe = self._finished = 0
        self._now: tuple[str, float] | None = None  # the test that runs, and since when
        self._step = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Progress within a measurement, as compressing tells it."""
        self._step = f", {what}: {done} of {total}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        self._now, self._step = (item.nodeid.rpartition("::")[2], time.monotonic()), ""
        result = yield
        self._now = None
        self._measured += 1
        self._of_recipe += 1
        recipe = _recipe_of(item)
        if self._recipes and recipe is not None and _recipe_of(nextitem) != recipe:
            self._finished += 1
            now, count = time.monotonic(), self._of_recipe
            self._line(f"{recipe}: {count} measurement{'s' * (count > 1)} in {spelled(now - self._recipe_begin)}; "
                       f"{self._finished} of {self._recipes} recipes after {spelled(now - self._begin)}")  # fmt: skip
            self._recipe_begin, self._of_recipe = now, 0
        return result

    def pytest_sessionfinish(self) -> None:
        """Ends the thread, before anything is torn down."""
        self._ended.set()
        self._thread.join()
        os.close(self._file)

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            if (now := self._now) is not None:
                name, since = now
                if (taken := time.monotonic() - since) >= self._every:
                    self._line(f"{name} for {spelled(taken)}{self._step}; "
                               f"{self._measured} of {self._measurements} measurements done")  # fmt: skip

    def _line(self, text: str) -> None:
        self._write(f"[{time.strftime('%H:%M:%S')}] {terminal(text)}")

    def _to_stderr(self, line: str) -> None:
        with suppress(OSError):  # whoever read it is gone, and the run goes on
            os.write(self._file, f"\n{line}\n".encode())


def progress_of(config: pytest.Config, options: "Options", measurements: int) -> Bar | Lines | None:
    """A bar on a terminal, lines elsewhere, nothing with -q."""
    if config.getoption("verbose") < 0:
        return None
    if sys.stderr.isatty():
        return Bar(config)
    lines = Lines(config, len(options.recipes), measurements)
    config.pluginmanager.register(lines)
    return lines


def _recipe_of(item: pytest.Item | None) -> str | None:
    recipe = getattr(getattr(item, "callspec", None), "params", {}).get("recipe")
    return None if recipe is None else recipe.text


def spelled(seconds: float) -> str:
    """A time for people.

    >>> spelled(9.4), spelled(75), spelled(7260)
    ('9 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
