"""A compiled library that is kept for later processes, and loaded only if it is what this user compiled.

    <cache>/native/lut4-<key>-<digest>.so

`<key>` is a hash of what it was made of, `<digest>` of its bytes. The folder is of this user, no link, and closed to
all others; the file is of this user, and its digest is compared before it is loaded, from the descriptor that was read.
One that was changed or cut off is compiled anew. Where the folder is another's, or cannot be had, the library is
compiled into a folder that `tempfile` makes for this process alone, and words on the log say why.
"""

import ctypes
import hashlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from compression.errors import CheckpointError
from compression.files.atomic import cache_folder

log = logging.getLogger(__name__)

Build = Callable[[Path], None]  # compiles into a file of that path


def library(key: str, build: Build) -> ctypes.CDLL:
    """The library of a key, from the cache or compiled now. Raises OSError where it cannot be loaded."""
    try:
        folder = _private(cache_folder() / "native")
        for path in sorted(folder.glob(f"lut4-{key}-*.so")):
            if (found := _loaded(path)) is not None:
                return found
        return _compiled(folder, key, build)
    except (OSError, CheckpointError) as error:  # there is none, it is another's, it is full, nothing is executed there
        log.warning("the compiled kernel is not kept for later processes: %s", error)
    with tempfile.TemporaryDirectory(prefix="compression-native-", ignore_cleanup_errors=True) as made:
        return _compiled(Path(made), key, build)  # once it is mapped, the file may go


def _private(folder: Path) -> Path:
    """The folder, made if need be. Raises OSError unless it is this user's alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise OSError(f"{folder} is a link or a file, not a folder; delete it")
    if (owner := facts.st_uid) != os.geteuid():
        raise OSError(f"{folder} belongs to another user ({owner}); set COMPRESSION_CACHE to a folder of your own")
    if facts.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _compiled(folder: Path, key: str, build: Build) -> ctypes.CDLL:
    """Compile aside, then move into place: processes may race, and have the same bytes or each its own name."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as made:
        fresh = Path(made, "lut4.so")
        build(fresh)
        fresh.chmod(0o700)
        with fresh.open("rb") as file:
            path = folder / f"lut4-{key}-{_digest(file.fileno())}.so"
        os.replace(fresh, path)
    if (found := _loaded(path)) is None:
        raise OSError(f"{path} was changed while it was made")
    return found


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library in a file, None if the file is not what its name says, or not this user's."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    facts = os.fstat(opened)
    sound = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
    if not sound or _digest(opened) != path.stem.rpartition("-")[2]:
        os.close(opened)
        return None
    if sys.platform != "linux":
        os.close(opened)
        return ctypes.CDLL(str(path))
    return ctypes.CDLL(f"/proc/self/fd/{opened}")  # which stays open: another library would be taken for this one


def _digest(opened: int) -> str:
    with open(os.dup(opened), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
