"""The folder that an artefact is written to: whether it can be, and what goes in beside the weights."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.architectures import embeddings
from compression.architectures.table import architecture_of
from compression.checkpoints import side_files
from compression.checkpoints.base import PACKED_TYPE
from compression.checkpoints.weight_files import WEIGHTS
from compression.errors import CheckpointError

if TYPE_CHECKING:
    from compression.checkpoints.artefact import Compressed


def tensor_filler(
    result: "Compressed",
    tensors: Mapping[str, Any],
    described: Mapping[str, Mapping[str, Any]],
    *,
    packed: str | None = None,
) -> Callable[[Path], None]:
    """What writes tensors by name into a folder, and all that goes beside them.

    Args:
        result: whose tensors they are.
        described: JSON by the name of its file.
        packed: the file of the tensors, if only this package opens it.
    """

    def fill(folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(stored_once(result.model, tensors), folder / (packed or WEIGHTS), metadata={"format": "pt"})
        dtype = next(result.model.parameters()).dtype
        write_beside(folder, result, dtype, result.tokenizer, described, packed=packed is not None)

    return fill


def stored_once(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as safetensors takes them, without a head that is the embeddings."""
    left = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if embeddings.tied(model):
        left.pop(architecture_of(model).head_weight, None)
    return left


def write_beside(
    folder: Path,
    result: "Compressed",
    dtype: Any,
    tokenizer: Any,
    described: Mapping[str, Mapping[str, Any]],
    *,
    packed: bool,
) -> None:
    """Everything but the tensors: the configuration, what goes with the base, then JSON files by name, merged.

    The model may be without weights, of which `dtype` is the one.
    """
    config = result.model.config
    config.architectures = [type(result.model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if packed:
        known = json.loads((folder / "config.json").read_text())
        uncompressed = {key: known[key] for key in ("model_type", "architectures")}
        said = {"model_type": PACKED_TYPE, "architectures": ["Compressed"], "uncompressed": uncompressed}
        described = {"config.json": said, **described}
    if result.folder is not None:
        side_files.copy_beside(result.folder, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, value in described.items():
        merged = (json.loads((folder / name).read_text()) if (folder / name).exists() else {}) | value
        (folder / name).write_text(json.dumps(merged, indent=1, allow_nan=False) + "\n")


def check_writable(folder: Path) -> Path:
    """The place behind all links at which a new folder can be made, or an empty one filled.

    Raises:
        CheckpointError: now rather than after hours, if it cannot.
    """
    try:
        target = folder.resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"output folder {folder} already exists; give a new or an empty one")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target if target.exists() else target.parent):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"output folder {folder} cannot be written: {error}") from error
    return target
