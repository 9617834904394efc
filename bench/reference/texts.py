"""What the reference offers to `compression` by an entry point: text to calibrate on, tasks to recover on."""

from collections.abc import Callable
from functools import partial

from . import tasks, world

DOCUMENTS = 5_000  # of calibration text


def documents() -> list[str]:
    """Training documents that are in no held-out split: short ones can come up in two."""
    held_out = {*world.texts("validation"), *world.texts("test")}
    return [text for text in world.texts("train", limit=DOCUMENTS) if text not in held_out]


CALIBRATION: dict[str, Callable[[], list[str]]] = {"embedded": documents}
DOWNSTREAM: dict[str, Callable[[], list[tuple[str, str]]]] = {
    name: partial(tasks.examples, name) for name in tasks.TASKS
}
