"""A folder that outlives a kill, sealed by digests: of kept steps, of a teacher's outputs, of a run of training, and of
a model that is written block by block.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from compression.errors import CompressionError
from compression.files.atomic import digest_of_file, filling, locked, replacing, sync, write_json
from compression.files.strict_json import check_signature, read_json, signed

SCHEMA = 2  # of seals; 1: each kind of folder had a layout of its own; seals of it name no schema

_RESERVED = {"schema", "identity", "files", "digest"}


@dataclass(frozen=True)
class Seal:
    """One kind of sealed folder: the file that seals it, and the words for what cannot be used.

    Attributes:
        file: the name of that file.
        error: what is raised.
        again: what follows once the folder is deleted, as in "delete it to ...".
        other: what to do about a folder that was made from other inputs.
        earlier: turns a seal of schema 1 into the fields of one of today, given the folder and what the file says; it
            may raise OSError, ValueError, TypeError or LookupError. None: such seals are refused.
    """

    file: str
    error: type[CompressionError]
    again: str
    other: str = "its name says otherwise, so it was renamed or changed by hand"
    earlier: Callable[[Path, dict[str, Any]], Mapping[str, Any]] | None = None


class SealedFolder:
    """A folder that outlives a kill, sealed by digests.

    One file, the seal, says which inputs the folder was made from, names every file that counts with its SHA-256, and
    holds what the owner wants to know again. Members are written under another name, put on disk and renamed, and the
    seal is replaced after them. After a kill the folder is therefore as it was at the last `commit`; a file that the
    seal does not name does not count. The seal is signed. What was changed since it was written is refused and never
    made again by itself: a finished file changes only by a fault of the disk or by hand, and either should be known.

    Attributes:
        path: of the folder.
        identity: the inputs, by name, as JSON has them.
        files: SHA-256 of each member by its path in the folder, with "/".
        facts: what the owner keeps in the seal beside that.
    """

    def __init__(self, path: Path, seal: Seal, identity: Mapping[str, Any]):
        self.path, self.seal, self.identity = path, seal, _as_json(identity)
        self.files: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    @classmethod
    def read(cls, path: Path, seal: Seal) -> Self | None:
        """What a folder says of itself, None if it has no seal; inputs and members are not looked at.

        Raises:
            seal.error: the seal is damaged, or of a schema that is not read.
        """
        folder = cls(path, seal, {})
        where = path / seal.file
        try:
            if not where.exists():
                return None
            table = folder._fields(read_json(where))
            if not isinstance(table["identity"], dict) or not isinstance(table["files"], dict):
                raise TypeError("identity and files must be tables of names and values")
            folder.identity, folder.files = dict(table["identity"]), dict(table["files"])
            if wrong := [name for name in folder.files if not _is_inside(name)]:
                raise ValueError(f"{wrong[0]!r} must be the name of a file in the folder")
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise folder.damaged(error) from error
        folder.facts = {name: value for name, value in table.items() if name not in _RESERVED}
        return folder

    @classmethod
    def open(cls, path: Path, seal: Seal, identity: Mapping[str, Any]) -> Self | None:
        """The folder made from these inputs, None if it has no seal. Every member is read once, and none is held.

        Raises:
            seal.error: as `read`; it was made from other inputs; or a member is missing or corrupt.
        """
        folder = cls.read(path, seal)
        if folder is not None:
            folder.check(identity)
        return folder

    @classmethod
    @contextmanager
    def claim(cls, path: Path, seal: Seal, identity: Mapping[str, Any], busy: str) -> Iterator[Self]:
        """The folder for this process alone: opened, or made if there is none; what a kill left half written is gone.

        Raises:
            seal.error: as `open`; another process has the folder (the message is `busy`); or it cannot be written.
        """
        with locked(path, seal.error, busy):
            folder = cls.open(path, seal, identity)
            try:
                if folder is None:
                    folder = cls(path, seal, identity)
                    folder.commit()
                folder.sweep(".*.part")
            except OSError as error:
                raise seal.error(f"folder {path} cannot be written: {error}") from error
            yield folder

    @classmethod
    @contextmanager
    def whole(cls, path: Path, seal: Seal, identity: Mapping[str, Any]) -> Iterator[Self]:
        """A new folder that appears at `path`, sealed with every file written to it, or not at all (see `filling`).

        Until then it lies elsewhere: write to its own `path`. OSError where it cannot be, and where one is there by
        then.
        """
        with filling(path, seal.file) as work:
            folder = cls(work, seal, identity)
            yield folder
            folder.adopt(work.rglob("*"))
            folder.commit()

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise `seal.error` unless the folder was made from these inputs and its members are what was written."""
        now = _as_json(identity)
        for name in {**now, **self.identity}:
            if self.identity.get(name) != now.get(name):
                raise self.seal.error(
                    f"{self.path} was made with another {name}: {_short(self.identity.get(name))}, now "
                    f"{_short(now.get(name))}; {self.seal.other}; delete it to {self.seal.again}"
                )
        for name, digest in self.files.items():
            member = self.path / name
            if not member.is_file():
                raise self.seal.error(f"{member} is missing; {self._way_out}")
            if digest_of_file(member) != digest:
                raise self.seal.error(f"{member} is corrupt: its SHA-256 does not match; {self._way_out}")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a new member to; it counts from the next `commit` on.

        Raises:
            ValueError: there is such a member. Replacing it would leave the seal false until the next `commit`.
        """
        if name in self.files:
            raise ValueError(f"{self.path / name} is sealed already")
        with replacing(self.path / name) as temporary:
            yield temporary
            digest = digest_of_file(temporary)
        self.files[name] = digest

    def adopt(self, paths: Iterable[Path]) -> None:
        """Take files that others wrote into the folder as members, from the next `commit` on.

        Raises:
            ValueError: a member was written again, and is another now.
        """
        for path in sorted(path for path in paths if path.is_file()):
            sync(path)
            name, digest = path.relative_to(self.path).as_posix(), digest_of_file(path)
            if self.files.setdefault(name, digest) != digest:
                raise ValueError(f"{path} was sealed already, and was written again since")

    def drop(self, names: Iterable[str]) -> None:
        """From the next `commit` on these members do not count; `sweep` deletes them after it."""
        for name in list(names):
            self.files.pop(name, None)

    def commit(self, **facts: Any) -> None:
        """Put the seal on disk, with these facts added or changed."""
        self.facts |= facts
        if taken := _RESERVED & self.facts.keys():
            raise ValueError(f"{', '.join(sorted(taken))} cannot be facts of a seal")
        fields = {"schema": SCHEMA, "identity": self.identity, "files": self.files, **self.facts}
        write_json(self.path / self.seal.file, signed(fields))

    def sweep(self, pattern: str) -> None:
        """Delete files and folders of this pattern that are no members and hold none."""
        for path in self.path.glob(pattern):
            name = path.relative_to(self.path).as_posix()
            if not any(each == name or each.startswith(f"{name}/") for each in self.files):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def damaged(self, error: Exception) -> CompressionError:
        """What to raise where the seal says what it cannot say."""
        where = self.path / self.seal.file
        return self.seal.error(f"{where} is damaged: {type(error).__name__}: {error}; {self._way_out}")

    @property
    def _way_out(self) -> str:
        return f"delete {self.path} to {self.seal.again}"

    def _fields(self, table: Any) -> Mapping[str, Any]:
        if not isinstance(table, dict):
            raise TypeError(f"it must hold a table of names and values, not {_short(table)}")
        if "schema" in table:
            if type(table["schema"]) is not int or table["schema"] != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}, not {_short(table['schema'])}")
            check_signature(table)
            return table
        if self.seal.earlier is None:
            raise ValueError("it names no schema: an earlier version of this package wrote it, or it was changed")
        return self.seal.earlier(self.path, table)


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(dict(identity)))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
