"""`python -m compression convert`: a checkpoint in another format, exactly or not at all."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import compression
from compression import CompressionError, checkpoints, engine
from compression.checkpoints.base import MANIFEST
from compression.checkpoints.formats import registry as formats
from compression.files.terminal import terminal

if TYPE_CHECKING:
    from compression import Compressed


def convert(options: argparse.Namespace) -> int:
    """Open one folder, and write another."""
    if len(options.folders) != 2:
        raise CompressionError(
            f"convert takes two folders, what there is and what to write, not {len(options.folders)}"
        )
    if (options.format is None) == (options.engine is None):
        raise CompressionError("convert takes one of --format and --engine")
    source, target = options.folders
    checkpoints.output.check_writable(target)
    model = opened(source)
    name = options.format or formats.format_for(options.engine, model)
    model.save(target, name)
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


def opened(folder: Path) -> "Compressed":
    """What a folder holds, compressed or not.

    Raises:
        CheckpointError: it cannot be opened.
    """
    described = (folder / MANIFEST).exists() or engine.stream_state.unfinished(folder) is not None
    if described or formats.of_folder(folder) is not None:
        return compression.load(folder)
    return compression.compress(str(folder), "fp16")
