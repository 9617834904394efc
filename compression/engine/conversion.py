"""A checkpoint written in another format piece by piece: memory holds what is outside the blocks, or one block.

Until it is finished a folder holds its state and a safetensors file to each piece (`engine.shards`); a run that finds
the state of one with the same source, format and code resumes after the last block that it names. A format of one file
(GGUF) is written piece by piece too, beside its place, and begins anew after a kill.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from compression.checkpoints import output
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.formats import registry as formats
from compression.checkpoints.formats.registry import OWN, Written
from compression.checkpoints.opening import Opened
from compression.checkpoints.output import check_writable
from compression.engine import shards
from compression.engine.passes import Progress
from compression.engine.shards import Shards
from compression.engine.stream_state import unfinished
from compression.errors import CheckpointError
from compression.files.atomic import code_digest, filling


def convert(opened: Opened, folder: str | Path, format: str, progress: Progress | None = None) -> None:
    """Write what `Compressed.save` would write of a checkpoint: the same tensors, in several files.

    Args:
        opened: by `checkpoints.opening.open_unread`.
        folder: a new or an empty one, or one that such a call left; a link to one, or a mount point.
        format: "own", or a published format (`formats.registry`).
        progress: called with (blocks done, blocks, what), first with those that an interrupted call did.

    Raises:
        CheckpointError: the source is damaged, or the folder cannot be written or holds something else.
        LayerError: a layer does not fit the format exactly. What shapes tell is known before anything is written; for
            what values tell, the folder is deleted.
    """
    target, blocks = Path(folder), len(opened.unread.blocks)
    told = progress or (lambda done, total, what: None)
    if format != OWN and formats.find(format).one_file:
        _write_file(opened, check_writable(target), format, lambda done: told(done, blocks, format))
        return
    if unfinished(target) is None:
        target = check_writable(target)
    result = opened.result
    written = result.own_format(shards.names(blocks)) if format == OWN else _written(opened, format)
    identity = {
        "command": "convert",
        "source": opened.digest,
        "format": format,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "code of this package": code_digest(),
    }
    with shards.written(target, identity, blocks) as folder_of:
        told(folder_of.state.done, blocks, format)
        begun = folder_of.name(0) in folder_of.folder.files
        for number in range(folder_of.state.done + begun, blocks + 1):
            _write_piece(folder_of, opened, written, number)
            told(number, blocks, format)
        dtype = next(result.model.parameters()).dtype
        last = MANIFEST if format == OWN else formats.find(format).last
        folder_of.finish(result, result.tokenizer, written.described, dtype=dtype,
                         packed=format == OWN and result.stored, last=last)  # fmt: skip


def _written(opened: Opened, name: str) -> Written:
    format, result = formats.find(name), opened.result
    format.check_tokenizer(result.tokenizer, result.model.config)
    return format.write(result.model, result.recipe)


def _write_piece(folder: Shards, opened: Opened, written: Written, number: int) -> None:
    with folder.refusing(), opened.unread.filled(number) as state:
        tensors = output.stored_once(opened.result.model, written.tensors(state))
    folder.write(folder.name(number), tensors)
    folder.state.done = number
    folder.commit()


def _write_file(opened: Opened, target: Path, name: str, told: Callable[[int], None]) -> None:
    def filling_pieces() -> Iterator[Any]:
        for number, tensors in enumerate(opened.unread.filling()):
            yield tensors
            told(number)

    format = formats.find(name)
    fill = format.piecewise_filler(opened.result, filling_pieces)
    try:
        with filling(target, format.last) as work:
            fill(work)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
