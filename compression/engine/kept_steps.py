"""Cache of the results of first steps on disk, shared by recipes and later runs.

    <folder>/steps/<key>/            what `Compressed.save` writes, and
        state.json                   the seal: what it depends on, and the SHA-256 of every file

`<key>` is a hash of everything that the result depends on: the base, the steps as they are run (`dequantize` and
quantizers taken again included), the token ids and the teacher that each was given, seed, device, threads, versions,
and the sources of this package. A folder appears whole or not at all (`compression.files.sealed_folder`).

The folder also holds `teachers/` and `training/`, see `compression.distillation`. Nothing is deleted by itself but a
training run whose result is in `steps/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoints.artefact import Compressed
from compression.checkpoints.opening import load
from compression.errors import CheckpointError
from compression.files.atomic import cache_folder, key_of
from compression.files.sealed_folder import Seal, SealedFolder

_SEAL = Seal("state.json", CheckpointError, again="have it made again")


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
            if identity is not None and (kept := SealedFolder.open(self._path(identity), _SEAL, identity)):
                return count, load(kept.path, device)
        return 0, None

    def put(self, identity: dict[str, Any], result: Compressed) -> None:
        """Keep a result; what another process kept of the same meanwhile stays.

        Raises:
            CheckpointError: it cannot be written.
        """
        target = self._path(identity)
        seal = target / _SEAL.file
        try:
            if seal.exists():
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            with SealedFolder.whole(target, _SEAL, identity) as folder:
                result.save(folder.path)
        except OSError as error:
            if not seal.exists():  # otherwise another process was first
                raise CheckpointError(f"{target} cannot be written: {error}; give another cache") from error

    def _path(self, identity: dict[str, Any]) -> Path:
        return self.folder / "steps" / key_of(identity)
