"""A progress bar on the terminal, while pytest holds the output."""

from typing import Any

import pytest


class Bar:
    """Called with (done, total, what); drawn by rich on stderr and gone when it is done."""

    def __init__(self, config: pytest.Config):
        self._capture: Any = config.pluginmanager.getplugin("capturemanager")
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int, what: str) -> None:
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
