"""Where a GGUF file is, and its head (ggml's docs/gguf.md), walked through before a library reads it.

A library that trusts a count reads, allocates or loops as often as a damaged file says; here it must be one that the
length of the file can hold.
"""

import mmap
import struct
from pathlib import Path

from compression.errors import CheckpointError

SUFFIX = ".gguf"

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value of a type
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4


class _Walk:
    """A place in a file that may only go forward within it."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at = content, 0

    def number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self.skip(size)
        return int(struct.unpack_from(f"<{kind}", self._content, self._at - size)[0])

    def skip(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise ValueError(f"it ends within {size:,} bytes that begin at {self._at:,}")
        self._at += size

    def string(self) -> bytes:
        size = self.number("Q")
        self.skip(size)
        return self._content[self._at - size : self._at]

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == _STRING:
                self._check(count, 8)
                for _ in range(count):
                    self.string()
            else:
                self.skip(count * self._size(inner))
        else:
            self.skip(self._size(kind))

    def _check(self, count: int, size: int) -> None:
        if count * size > len(self._content) - self._at:
            raise ValueError(f"it says that {count:,} values follow, which its length does not hold")

    def entries(self, count: int, size: int) -> range:
        """`count` entries of at least `size` bytes."""
        self._check(count, size)
        return range(count)

    @staticmethod
    def _size(kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"it has a value of type {kind}, which there is not")
        return _SIZES[kind]


def check(path: Path) -> None:
    """Raise CheckpointError unless the head of a file is whole, little-endian and of a version that is read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _walk_through(_Walk(content))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no GGUF file, or is damaged: {error}") from error


def _walk_through(walk: _Walk) -> None:
    if walk.number("I") != int.from_bytes(b"GGUF", "little"):
        raise ValueError("it does not begin with GGUF")
    version = walk.number("I")
    if version not in _VERSIONS:
        if version in (each << 24 for each in (1, *_VERSIONS)):
            raise ValueError("it is of a machine with the other byte order; convert it there")
        raise ValueError(f"its version is {version}; read are {', '.join(map(str, _VERSIONS))}")
    tensors, values = walk.number("Q"), walk.number("Q")
    for _ in walk.entries(values, 8 + 4 + 1):
        walk.string()
        walk.value(walk.number("I"))
    for _ in walk.entries(tensors, 8 + 4 + 4 + 8):
        walk.string()
        dimensions = walk.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        walk.skip(dimensions * 8 + 4 + 8)


def file_in(path: Path) -> Path | None:
    """The file that a path names, or the only one of a folder without config.json.

    Raises:
        CheckpointError: the folder has several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(f"{path} has {len(found)} GGUF files, {found[0].name} the first; give the path of one, "
                              "or join parts of one with llama-gguf-split --merge")  # fmt: skip
    return found[0] if found else None
