"""The weight files of a folder: those that transformers would open, and no others.

    1. what `transformers_weights` in config.json names: a file, or an index
    2. model.safetensors
    3. the files that model.safetensors.index.json names

Adapters, states of optimizers, `consolidated.safetensors` and whatever else lies beside them is neither read nor
refused. Where 2 and 3 are both there, transformers opens 2 without a look at 3: if the two differ, nobody knows which
one is meant, and the folder is refused. An index whose files are gone is what a later save left behind, and no set.

Source: transformers 5.23, `modeling_utils._get_resolved_checkpoint_files`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression import checkpoints
from compression.checkpoints.side_files import COPIED
from compression.errors import CheckpointError
from compression.files.strict_json import expanded

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the file of each tensor where there are several files

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def names_of(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Names of the files that the weights are in, there or not; none where nothing says so.

    Raises:
        CheckpointError: an index is damaged, or a name leads out of the folder.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(f"{folder / 'config.json'}: transformers_weights is {named!r}; it must name a file "
                                  "*.safetensors or *.safetensors.index.json")  # fmt: skip
        _check_inside(folder / "config.json", named)
        return [named] if named.endswith(".safetensors") else _shards(folder / named)
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    return _shards(folder / INDEX) if (folder / INDEX).is_file() else []


def weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that the weights are in.

    Raises:
        CheckpointError: there are none; an index names files that are missing or not in the folder; or there are two
            sets of weights that differ.
    """
    names = names_of(folder, config)
    if not names:
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}{_hint(folder)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        named = config.get("transformers_weights")
        by = folder / ("config.json" if named in names else named or INDEX)
        raise CheckpointError(f"{by} names missing files: {', '.join(missing)}")
    if names == [WEIGHTS] and "transformers_weights" not in config:
        _refuse_two_sets(folder)
    return [folder / name for name in names]


def download(text: str) -> Path:
    """The folder of a hub's model, with the weights that transformers would open and no others."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(text, allow_patterns=["*.json", WEIGHTS, *COPIED]))
    config = checkpoints.base._read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if missing := [name for name in names_of(folder, config) if not (folder / name).exists()]:
        snapshot_download(text, allow_patterns=missing, revision=folder.name)  # the folder of a commit has its name
    return folder


def _shards(index: Path) -> list[str]:
    weight_map = checkpoints.base._read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} must map the names of tensors to files under weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(index, name)
    return names


def _check_inside(named_by: Path, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{named_by} names {name!r:.200}, which is not in its folder, where weights have to be")
    expanded(named_by.parent / name, lambda why: CheckpointError(f"{named_by} names an invalid file: {why}"))


def _refuse_two_sets(folder: Path) -> None:
    """Raise CheckpointError if a complete set of other files differs from model.safetensors."""
    try:
        shards = _shards(folder / INDEX) if (folder / INDEX).is_file() else []
    except CheckpointError:
        return  # an index that is not needed, and names no set
    files = [folder / name for name in shards]
    if not files or WEIGHTS in shards or not all(path.is_file() for path in files):
        return

    if name := checkpoints.weights.first_difference([folder / WEIGHTS], files):
        raise CheckpointError(
            f"{folder} holds two sets of weights, which differ in {name}: {WEIGHTS}, which transformers opens, and the "
            f"files that {INDEX} names; delete the set that is not meant, the index with its files"
        )


def _hint(folder: Path) -> str:
    """What is there instead, and what to do about it."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    words = f"; nothing says that {', '.join(others[:4])} are the weights of this model" if others else ""
    if pickles:
        words += (f"; {', '.join(pickles[:4])} can run code when opened and is not read: convert it with transformers' "
                  "save_pretrained")  # fmt: skip
    return words
