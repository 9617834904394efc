"""Calibration text: its sources, and the token ids that methods read.

A source is named by text, or given as it is:

    embedded             the training split of the world that the reference was trained on; its default. Packages ship
                         texts by name (`compression.calibration.shipped`), and this is one of them
    random               token ids drawn evenly from the vocabulary; the default of `random:<shape>` bases
    hub                  C4, English, first shard (allenai/c4), the text of GPTQ, arXiv 2210.17323, section 4
    <folder>             its *.txt (documents apart by blank lines) and *.jsonl files (field text or content); files
                         with test, validation, valid, val or dev in their name are for evaluation and are left out
    an iterable of str   documents
    a tensor             token ids, int64 (samples, length), taken as they are
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.calibration.shipped import shipped
from compression.checkpoints.base import BaseSource
from compression.checkpoints.identity import of_texts
from compression.errors import CalibrationError
from compression.files.atomic import digest_of
from compression.files.libraries import check_hub_cache
from compression.files.strict_json import expanded
from compression.files.text import json_lines, read_text, whole_text

WAYS_OUT = 'give calibration (--calibration) as "embedded", "hub", "random", a folder of text, texts, or token ids'
EVALUATION = {"test", "validation", "valid", "val", "dev"}
EMBEDDED = "embedded"  # the text that the reference brings
SEPARATOR = "\n\n"  # between documents

_C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
_BATCH = 64  # documents tokenized at once


@dataclass(frozen=True)
class Calibration:
    """A source of token ids.

    Attributes:
        name: what it is, for people: a folder goes by its last part.
        documents: seed -> texts in the order of that seed; None for sources of token ids.
        ids: seed, samples, length, vocabulary size -> token ids, for sources without text.
        content: gives what `digest` is of; None for sources that are known by their name alone.
    """

    name: str
    documents: Callable[[int], Iterable[str]] | None = None
    ids: Callable[[int, int, int, int], Tensor] | None = None
    content: Callable[[], Iterable[str] | Tensor] | None = None

    @functools.cached_property
    def digest(self) -> str | None:
        """sha256 of the documents in their own order, as they are read, or of the token ids.

        None for `hub` and `random`, which their name says all of.
        """
        if self.content is None:
            return None
        content = self.content()
        return of_texts([str(tuple(content.shape)), digest_of(content)] if isinstance(content, Tensor) else content)

    def tokens(
        self, tokenizer: Any, *, samples: int, length: int, seed: int, vocabulary: int, ended: bool = False
    ) -> Tensor:
        """int64 (samples, length): the documents in seeded order, joined and cut into pieces.

        Between them are blank lines, or with `ended`, as models are trained, the tokenizer's end of sequence.

        Raises:
            CalibrationError: there is less text than that, there is no tokenizer, or an id is not in the vocabulary.
        """
        if self.ids is not None:
            found = self.ids(seed, samples, length, vocabulary)
        elif tokenizer is None:
            raise CalibrationError("the base has no tokenizer for calibration text; give token ids instead")
        else:
            wanted, found = samples * length, []
            documents = iter(self.documents(seed))  # type: ignore[misc]
            while len(found) < wanted and (batch := list(itertools.islice(documents, _BATCH))):
                if ended and tokenizer.eos_token_id is not None:
                    for each in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                        found += [*each, tokenizer.eos_token_id]
                    continue
                text = "".join(document + SEPARATOR for document in batch)
                found += tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if len(found) < wanted:
                raise CalibrationError(
                    f"calibration text {self.name} is too short: {samples} samples of {length} tokens are {wanted} "
                    f"tokens, and there are {len(found)}, enough for samples={len(found) // length}; give more text"
                )
            found = torch.tensor(found[:wanted]).view(samples, length)
        lowest, highest = int(found.min()), int(found.max())
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise CalibrationError(
                f"calibration {self.name} holds token id {wrong}; the base has a vocabulary of {vocabulary}"
            )
        return found


def open_calibration(given: Any, base: BaseSource) -> Calibration | None:
    """The calibration that was given, or the default of the base, or None where it has none. Reads no text yet.

    Raises:
        CalibrationError: nothing is called that, or what was given is no calibration.
    """
    if given is None:
        given = EMBEDDED if base.shipped else "random" if base.kind == "random" else None
    if given is None or isinstance(given, Calibration):
        return given
    if isinstance(given, Tensor):
        return _given_ids(given)
    if isinstance(given, str | Path):
        if found := _NAMED.get(str(given)) or _shipped(str(given)):
            return found
        if str(given) == EMBEDDED:
            raise CalibrationError(f"no package that is installed ships the embedded text; {WAYS_OUT}")
        folder = expanded(given, CalibrationError)
        if not folder.is_dir():
            raise CalibrationError(f"calibration {str(given)!r} is not a folder; {WAYS_OUT}")
        return _folder(folder)
    documents = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(document, str) for document in documents):
        raise CalibrationError(f"calibration must be texts or token ids, not {type(given).__name__}; {WAYS_OUT}")
    for number, document in enumerate(documents, 1):
        whole_text(document, f"calibration text {number}", CalibrationError)
    return _texts(f"of {len(documents)} given texts", lambda: documents)


def _texts(name: str, read: Callable[[], list[str]]) -> Calibration:
    """A source of documents that are read once: the digest is that of the texts that methods read."""
    once = functools.cache(read)
    return Calibration(name, documents=lambda seed: _shuffled(once(), seed), content=once)


def _given_ids(ids: Tensor) -> Calibration:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise CalibrationError(f"calibration token ids must be integers (samples, length), not {tuple(ids.shape)} of "
                               f"{ids.dtype}")  # fmt: skip
    taken = ids.long().cpu()
    return Calibration("of given token ids", ids=lambda seed, samples, length, vocabulary: taken, content=lambda: taken)


def _random_ids(seed: int, samples: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def _shipped(name: str) -> Calibration | None:
    """The text of a name that a package ships; read once."""
    read = shipped("CALIBRATION").get(name)
    return None if read is None else _texts(name, lambda: list(read()))


def _hub(seed: int) -> Iterator[str]:
    """C4 documents, streamed and shuffled in a buffer."""
    check_hub_cache(CalibrationError)
    try:
        from datasets import load_dataset

        repository, file = _C4
        rows = load_dataset(repository, data_files={"train": file}, split="train", streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=1_000), 1):
            yield whole_text(row["text"], f"{repository}: row {number}", CalibrationError)
    except CalibrationError:
        raise
    except Exception as error:  # the library raises many kinds, all of them for the same reason
        raise CalibrationError(
            f"C4 cannot be loaded from the hub: {type(error).__name__}: {str(error)[:200]}; without a network give "
            "--calibration a folder of text"
        ) from error


def _folder(folder: Path) -> Calibration:
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".txt", ".jsonl") and not EVALUATION & set(re.split(r"[^a-z]+", path.stem.lower()))
    ]
    if not paths:
        words = ", ".join(sorted(EVALUATION))
        raise CalibrationError(f"{folder} has no calibration text: no *.txt or *.jsonl without {words} in its name")
    name = folder.resolve().name or "root"
    return _texts(name, lambda: [document for path in paths for document in _read(path)])


def _read(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        text = read_text(path, CalibrationError)
        yield from (part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip())
        return
    for where, row in json_lines(path, CalibrationError):
        if not isinstance(row, dict) or not {"text", "content"} & set(row):
            raise CalibrationError(f"{where}: calibration needs an object with the field text or content on each line")
        yield whole_text(row.get("text", row.get("content")), where, CalibrationError)


def _shuffled(documents: Iterable[str], seed: int) -> list[str]:
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    return documents


_NAMED = {
    "hub": Calibration("hub", documents=_hub),
    "random": Calibration("random", ids=_random_ids),
}
