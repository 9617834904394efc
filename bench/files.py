"""Atomic replacement of files: readers see the old content or the new, also after a kill."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside it to write to, which takes its place, and its mode, once it is on disk; else nothing is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Make this the content of the file; raises OSError where that cannot be, and leaves the file as it was."""
    with replacing(path) as beside:
        beside.write_bytes(data)
