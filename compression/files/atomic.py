"""Files that survive a kill, and digests of their content; the caller reports errors of the disk."""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.errors import CheckpointError, CompressionError
from compression.files.strict_json import expanded

if TYPE_CHECKING:
    from torch import Tensor


def digest_of(tensor: "Tensor") -> str:
    """sha256 of its numbers; not of its shape."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(identity: dict[str, Any]) -> str:
    """The name of the folder of something, from all that it depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def cache_folder() -> Path:
    """$COMPRESSION_CACHE, else compression-bench in the user's cache folder ($XDG_CACHE_HOME, ~/.cache).

    Raises:
        CheckpointError: none of them is known: no home directory, as in a container that runs under any user id.
    """
    given, home = os.environ.get("COMPRESSION_CACHE"), os.environ.get("XDG_CACHE_HOME")
    way_out = "set COMPRESSION_CACHE, or give a cache (--cache), to a folder of your own"
    return expanded(given or f"{home or '~/.cache'}/compression-bench",
                    lambda why: CheckpointError(f"cache folder {why}; {way_out}"))  # fmt: skip


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once it is on disk; if that fails, nothing is left of it."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(target: Path, last: str) -> Iterator[Path]:
    """A folder to write to, what is in which is in `target` afterwards; if that fails, nothing is.

    A new target appears by one rename. One that is there, and empty, may be a mount point, which nothing can be renamed
    to: it is filled, and the file `last`, without which nothing opens it, comes behind all others.
    """
    there = target.exists()
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if there else target.parent))
    try:
        yield work
        if there:
            moved: list[Path] = []
            try:
                for path in sorted(work.iterdir(), key=lambda path: path.name == last):
                    os.replace(path, target / path.name)
                    moved.append(target / path.name)
            except OSError:
                for path in moved:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                raise
        else:
            work.chmod(0o755)
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def locked(folder: Path, error: type[CompressionError], busy: str) -> Iterator[None]:
    """The folder, made if need be, this process alone writing to it.

    Raises:
        error: another process is (its message is `busy`), or the folder cannot be made or opened.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened = os.open(folder, os.O_RDONLY)
            held.callback(os.close, opened)  # and the lock with it
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as caught:
            raise error(busy) from caught
        except OSError as caught:
            raise error(f"folder {folder} cannot be written: {caught}") from caught
        yield


@functools.cache
def code_digest(package: Path = Path(__file__).parents[1]) -> str:
    """sha256 over the sources of a package, by default of this one, which results depend on."""
    digest = hashlib.sha256()
    for path in sorted(path for suffix in ("*.py", "*.c") for path in package.rglob(suffix)):
        digest.update(f"{path.relative_to(package)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
