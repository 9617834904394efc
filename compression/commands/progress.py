"""How far a command is, on stderr."""

import sys
from collections.abc import Callable

from compression.files.terminal import terminal


def bar(what: str) -> Callable[[int, int, str], None] | None:
    """A bar of what is being done, for a terminal; None where stderr is none."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    progress = Progress(transient=True, console=Console(stderr=True))
    progress.start()
    task = progress.add_task(what, total=None)

    def update(done: int, total: int, now: str) -> None:
        progress.update(task, completed=done, total=total, description=escape(terminal(now)))
        if done == total:
            progress.stop()

    return update
