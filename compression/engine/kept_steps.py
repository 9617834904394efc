"""Cache of the results of first steps on disk, shared by recipes and later runs.

    <folder>/steps/<key>/            what `Compressed.save` writes, and
        state.json                   what it depends on, and sha256 of every file

`<key>` is a hash of everything that the result depends on: the base, the steps as they are run (`dequantize` and
quantizers taken again included), the token ids and the teacher that each was given, seed, device, threads, versions,
and the sources of this package. A folder appears whole or not at all. One that is not what was written is an error and
not made again by itself: a finished file changes only by a fault of the disk or by hand, and either should be known.

The folder also holds `teachers/` and `training/`, see `compression.distillation`. Nothing is deleted by itself but a
training run whose result is in `steps/`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoints.artefact import Compressed, load
from compression.errors import CheckpointError
from compression.files.atomic import cache_folder, digest_of_file, key_of, sync, write_json
from compression.files.strict_json import read_json

_STATE = "state.json"


@dataclass(frozen=True)
class StepCache:
    """A folder of such results.

    Attributes:
        given: the folder, made when something is kept; None for that of the user (`files.atomic.cache_folder`).
        keep: whether to keep what a recipe came to, given the texts of the steps so far; those of which one
            trains, which `compress` keeps in any case.
    """

    given: Path | None = None
    keep: Callable[[Sequence[str]], bool] = lambda steps: False

    @property
    def folder(self) -> Path:
        """Raises CheckpointError where none was given, and there is no home directory."""
        return cache_folder() if self.given is None else self.given

    def find(self, identities: Sequence[dict[str, Any] | None], device: str) -> tuple[int, Compressed | None]:
        """The most steps that are kept, and what they came to: (0, None) if there are none.

        Args:
            identities: what the result of the first 1, 2, ... steps depends on; None is not looked for.
            device: where the model is to be.

        Raises:
            CheckpointError: a result is not what was written.
        """
        for count in range(len(identities), 0, -1):
            identity = identities[count - 1]
            if identity is not None and (self._path(identity) / _STATE).exists():
                return count, self._read(self._path(identity), identity, device)
        return 0, None

    def put(self, identity: dict[str, Any], result: Compressed) -> None:
        """Keep a result; what another process kept of the same meanwhile stays.

        Raises:
            CheckpointError: it cannot be written.
        """
        target = self._path(identity)
        work = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            result.save(work)
            paths = sorted(filter(Path.is_file, work.rglob("*")))
            digests = {path.relative_to(work).as_posix(): digest_of_file(path) for path in paths}
            for name in digests:
                sync(work / name)
            write_json(work / _STATE, {"identity": identity, "files": digests})
            with contextlib.suppress(OSError):  # another process was first
                os.rename(work, target)
            sync(target.parent)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}; give another cache") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _path(self, identity: dict[str, Any]) -> Path:
        return self.folder / "steps" / key_of(identity)

    def _read(self, path: Path, identity: dict[str, Any], device: str) -> Compressed:
        again = f"delete {path}, and it is made again"
        try:
            state = read_json(path / _STATE)
            was, files = state["identity"], dict(state["files"])
            if wrong := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
                raise ValueError(f"{wrong[0]!r} must be the name of a file in the folder")
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(f"{path / _STATE} is damaged: {type(error).__name__}: {error}; {again}") from error
        if was != json.loads(json.dumps(identity)):
            raise CheckpointError(
                f"{path} belongs to other steps than its name says, so it was changed by hand; {again}"
            )
        for name, digest in files.items():
            if not (path / name).exists() or digest_of_file(path / name) != digest:
                raise CheckpointError(f"{path / name} is corrupt: its SHA-256 does not match; {again}")
        return load(path, device)
