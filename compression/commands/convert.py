"""`python -m compression convert`: a checkpoint in another format, exactly or not at all."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from compression import CompressionError, LayerError, checkpoints, engine
from compression.checkpoints.formats import registry as formats
from compression.commands import progress
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from compression.checkpoints.opening import Opened


def convert(options: argparse.Namespace) -> int:
    """Open one folder, and write another."""
    if len(options.folders) != 2:
        raise CompressionError(
            f"convert takes two folders, what there is and what to write, not {len(options.folders)}"
        )
    if (options.format is None) == (options.engine is None):
        raise CompressionError("convert takes one of --format and --engine")
    source, target = options.folders
    if (done := engine.stream_state.unfinished(target)) is not None:
        print(terminal(f"{target} is not finished: {done} blocks are done; resuming after them"), file=sys.stderr)
    else:
        checkpoints.output.check_writable(target)
    opened = checkpoints.opening.open_unread(str(source))
    if options.format is None:
        name = _for_engine(options.engine, opened, target)
    else:
        name = options.format
        engine.conversion.convert(opened, target, name, progress.bar("converting"))
    model = opened.result
    facts = {
        "recipe": model.recipe.text,
        "from": str(source),
        "folder": str(target),
        "format": name,
        "stored_bytes": bytes_of(target),
        "notes": [] if name == formats.OWN else formats.find(name).served(model.model),
    }
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        for line in value if isinstance(value, list) else [f"{key}: {value}"]:
            print(terminal(line))
    return 0


def bytes_of(folder: Path) -> int:
    """Bytes of the weights in a folder: of the tensors in safetensors, and of GGUF files."""
    files = folder.glob("*.gguf")
    return checkpoints.weights.bytes_in(folder.glob("*.safetensors")) + sum(path.stat().st_size for path in files)


def _for_engine(name: str, opened: "Opened", target: Path) -> str:
    """Write the first format that holds a checkpoint, and in which an engine opens it; the format.

    Raises:
        LayerError: there is none; the message says why of each.
    """
    found, reasons = formats.formats_for(name, opened.result)
    bar = progress.bar("converting")
    begun = engine.stream_state.identity_of(target).get("format")
    for format in found[found.index(begun) :] if begun in found else found:
        try:
            engine.conversion.convert(opened, target, format, bar)
            return format
        except LayerError as error:  # what values tell
            reasons.append(str(error))
    raise formats.no_format(name, reasons)
