"""The identity of a base: one digest, the `base_hash` of journals and baselines and part of every cache key.

It is the sha256 of the names and the sha256 of the files that a result depends on:

    config.json and the weights        and for a published checkpoint what says how it is quantized
    the tokenizer                      with its special tokens and chat templates: they make token ids of text
    generation_config.json             whose end tokens end answers

Bytes count, not times or places: an equal copy is the same base, one that was changed in place is another. A random
base is its configuration; the seed of its weights is a condition of its own, and its tokenizer has no file.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compression.checkpoints.formats.description import SIDE_FILES
from compression.checkpoints.side_files import COPIED
from compression.files.atomic import digest_of_file


def of_files(folder: Path, weights: Iterable[Path], *, published: bool = False) -> str:
    """The digest, hex, of a checkpoint. OSError where a file cannot be read."""
    beside = ["config.json", *COPIED, *(SIDE_FILES if published else ())]
    found = {path for pattern in beside for path in folder.glob(pattern) if path.is_file()}
    paths = [*sorted(found), *weights]
    with ThreadPoolExecutor(4) as threads:  # hashing lets go of the interpreter, and large checkpoints have many files
        digests = list(threads.map(digest_of_file, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return _sha256([list(pair) for pair in zip(names, digests, strict=True)])


def of_configuration(config: Mapping[str, Any]) -> str:
    """The digest, hex, of a base whose weights are drawn."""
    return _sha256(["random", dict(config)])


def of_texts(texts: Iterable[str]) -> str:
    """The sha256, hex, of texts in order: of what is read, wherever it lies."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode(errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
