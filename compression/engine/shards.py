"""A folder that a model is written to piece by piece, one safetensors file to each, and that a later run goes on with.

Until it is finished its state says of which run it is and what is done (`stream_state`), and nothing opens it.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compression.checkpoints import weights
from compression.checkpoints.artefact import STATE, Compressed
from compression.checkpoints.output import write_beside
from compression.checkpoints.weight_files import INDEX
from compression.engine.stream_state import SEAL, State
from compression.errors import CheckpointError, CompressionError
from compression.files.atomic import filling, sync
from compression.files.sealed_folder import SealedFolder
from compression.workers import ALONE, Workers


def names(blocks: int) -> list[str]:
    """Of the files of a model of so many blocks, from 1 as transformers has them; the first is of what is outside."""
    return [f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" for number in range(blocks + 1)]


@contextmanager
def written(target: Path, identity: dict[str, Any], blocks: int, workers: Workers = ALONE) -> Iterator["Shards"]:
    """The folder with its state, the first of these processes alone writing to it.

    Args:
        identity: what two runs must have in common for one to go on with what the other left.
        blocks: of the model.
        workers: the processes of the run.

    Raises:
        CheckpointError: the state is of another run or names files that are not what they were, another process writes
            here, or something cannot be written.
    """
    with ExitStack() as held:

        def claimed() -> SealedFolder:
            try:
                if not (target / STATE).exists():
                    with SealedFolder.whole(target, SEAL, identity) as begun:
                        begun.facts = dataclasses.asdict(State())
            except OSError as error:
                raise CheckpointError(f"output folder {target} cannot be written: {error}") from error
            busy = f"another process is writing to {target}"
            return held.enter_context(SealedFolder.claim(target, SEAL, identity, busy))

        yield Shards(workers.first(claimed), blocks, workers)


class Shards:
    """The files of a model of so many blocks, written in order, by the first of the processes of a run."""

    def __init__(self, folder: SealedFolder, blocks: int, workers: Workers = ALONE):
        self.folder, self.blocks, self.workers, self.state = folder, blocks, workers, State.of(folder)
        done = self.state.done
        missing = [name for name in map(self.name, range(1, done + 1)) if name not in folder.files]
        if missing or done > blocks:
            wrong = ValueError(f"{done} blocks are done, of which it names no file {', '.join(missing[:3])}")
            raise folder.damaged(wrong)

    def name(self, number: int) -> str:
        """Of the file of a piece: 0 is what is outside the blocks, i + 1 block i."""
        return names(self.blocks)[number]

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        def write() -> None:
            with self._said(name), self.folder.writing(name) as temporary:
                on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                save_file(on_cpu, temporary, metadata={"format": "pt"})

        self.workers.first(write)

    def commit(self) -> None:
        """Put the state on disk, then delete what it does not count on any more."""

        def commit() -> None:
            with self._said(STATE):
                self.folder.commit(**dataclasses.asdict(self.state))
                self.folder.sweep("inputs-*.safetensors")

        self.workers.first(commit)

    def finish(
        self, result: Compressed, tokenizer: Any, described: Mapping[str, Any], *, dtype: Any, packed: bool, last: str
    ) -> None:
        """Write what stands beside the tensors.

        Args:
            described: JSON by the name of its file.
            dtype: of the weights.
            packed: whether only this package opens the result; else there is an index of the files.
            last: the file that makes the folder one to open.
        """
        path = self.folder.path

        def finish() -> None:
            index = {} if packed else self._index()
            with self._said(last):
                self.folder.sweep("*/")  # of a run that was killed here
                with filling(path, last) as work:
                    write_beside(work, result, dtype, tokenizer, {**index, **described}, packed=packed)
                    for each in work.rglob("*"):
                        sync(each)
                sync(path)
                (path / STATE).unlink()

        self.workers.first(finish)

    def _index(self) -> dict[str, Any]:
        """The file that tells which tensor is in which file, by its name."""
        places, headers = weights.index(self.folder.path / name for name in sorted(self.folder.files))
        size = sum(header.nbytes for header in headers.values())
        weight_map = {name: place.name for name, place in sorted(places.items())}
        return {INDEX: {"metadata": {"total_size": size}, "weight_map": weight_map}}

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What is refused within this leaves no folder: a later run would be refused as well."""
        try:
            yield
        except CompressionError:
            for path in self.folder.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            with suppress(OSError):  # a mount point, or a link to a folder
                self.folder.path.rmdir()
            raise

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Errors of the disk in words."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder.path / name} cannot be written: {error}; what is finished stays, {self.state.done} "
                "blocks now, and the same command goes on from there"
            ) from error
