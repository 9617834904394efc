"""The downstream task that recovery trains on: questions and answers; only the answers are trained.

A task is named by text, or given as it is:

    arithmetic, ...      the training split of a task of the embedded reference; "arithmetic" is the reference's default
    <folder>             its *.jsonl files, each line an object with `prompt` and `answer`; files with test, validation,
                         valid, val or dev in their name are for evaluation and are left out
    an iterable of (prompt, answer)

Prompt and answer are read as they stand, one behind the other, so the space between them belongs to one of the two;
what goes into one text is encoded as one text, and a token that reaches into an answer is learnt with it. An answer
that does not end in white space gets a blank line behind it, which is learnt with it.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compression.calibration.shipped import shipped
from compression.calibration.text import EVALUATION, SEPARATOR
from compression.checkpoints.base import BaseSource
from compression.checkpoints.tokens import encode, encode_parts
from compression.errors import TrainingError
from compression.files.strict_json import expanded
from compression.files.text import json_lines, whole_text

WAYS_OUT = (
    "give downstream (--downstream) as a task of the embedded reference, a folder of *.jsonl with prompt and answer, "
    "or (prompt, answer) pairs"
)
DEFAULT = "arithmetic"

Example = tuple[str, str]


class Texts(NamedTuple):
    """Token ids, and what counts of them.

    Attributes:
        ids: int64 (samples, length).
        mask: bool (samples, length), unset for padding, which is at the end; None without padding.
        learn: bool (samples, length), unset for what is read and not learnt, such as questions; None if all is learnt.
        examples: how many there are in them.
    """

    ids: Tensor
    mask: Tensor | None = None
    learn: Tensor | None = None
    examples: int = 0


@dataclass(frozen=True)
class Downstream:
    """A source of questions with answers.

    Attributes:
        name: what it is, for reports.
        examples: gives (prompt, answer) pairs of the training split.
    """

    name: str
    examples: Callable[[], Sequence[Example]]

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all examples, for keys of what they were used for."""
        return hashlib.sha256(json.dumps([list(example) for example in self.examples()]).encode()).hexdigest()

    def texts(self, tokenizer: Any, *, samples: int | None, length: int, seed: int) -> Texts:
        """Examples in seeded order, as many to a text of `length` tokens as go in, as a prompt of worked examples has
        them; at most `samples` of them, None for all.

        Raises:
            TrainingError: there is no tokenizer, or an example is longer than a text.
        """
        if tokenizer is None:
            raise TrainingError("the base has no tokenizer for a downstream task; add tokenizer.json")
        found = list(self.examples())
        random.Random(seed).shuffle(found)
        found = found[:samples]
        rows: list[list[str]] = [[]]  # prompt, answer, prompt, answer ...
        for prompt, answer in found:
            example = [prompt, _ended(answer)]
            if (alone := len(encode(tokenizer, "".join(example), special=False))) > length:
                raise TrainingError(f"an example of the downstream task {self.name} has {alone} tokens, and a text "
                                    f"{length}; give sequence_length={alone} or more")  # fmt: skip
            if len(encode(tokenizer, "".join([*rows[-1], *example]), special=False)) > length:
                rows.append([])
            rows[-1] += example
        ids, mask, learn = torch.zeros(3, len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            parts = encode_parts(tokenizer, row, special=False)
            tokens = [(token, place % 2) for place, part in enumerate(parts) for token in part]
            ids[i, : len(tokens)], learn[i, : len(tokens)] = torch.tensor(tokens).T
            mask[i, : len(tokens)] = 1
        return Texts(ids, mask.bool(), learn.bool(), len(found))


def open_downstream(given: Any, base: BaseSource) -> Downstream | None:
    """The task that was given, or the default of the base, or None where it has none. Reads no example yet.

    Raises:
        TrainingError: nothing is called that, or what was given is no task.
    """
    if given is None:
        given = DEFAULT if base.shipped else None
    if given is None or isinstance(given, Downstream):
        return given
    if isinstance(given, str | Path):
        if (folder := expanded(given, TrainingError)).is_dir():
            return _folder(folder)
        return _shipped(str(given))
    pairs = list(given) if isinstance(given, Iterable) else [given]
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 and all(isinstance(t, str) for t in p)
                            for p in pairs):  # fmt: skip
        raise TrainingError(f"a downstream task must be (prompt, answer) pairs, not {type(given).__name__}; {WAYS_OUT}")
    for number, pair in enumerate(pairs, 1):
        for text in pair:
            whole_text(text, f"downstream pair {number}", TrainingError)
    return Downstream("given", lambda: [(prompt, answer) for prompt, answer in pairs])


def _shipped(name: str) -> Downstream:
    """The task of a name that a package ships (`compression.calibration.shipped`)."""
    tasks = shipped("DOWNSTREAM")
    if name not in tasks:
        known = f"which are {', '.join(tasks)}" if tasks else "of which no package that is installed ships any"
        raise TrainingError(f"downstream task {name!r} is neither a folder nor one of the embedded reference, {known}; "
                            f"{WAYS_OUT}")  # fmt: skip
    return Downstream(name, tasks[name])


def _folder(folder: Path) -> Downstream:
    paths = [path for path in sorted(folder.glob("*.jsonl"))
             if not EVALUATION & set(re.split(r"[^a-z]+", path.stem.lower()))]  # fmt: skip
    if not paths:
        words = ", ".join(sorted(EVALUATION))
        raise TrainingError(f"{folder} has no training examples: no *.jsonl without {words} in its name")
    read = functools.cache(lambda: [example for path in paths for example in read_examples(path)])
    return Downstream(folder.resolve().name or "root", read)  # read once: the digest is of what is learnt


def read_examples(path: Path) -> list[Example]:
    """The examples of a JSONL file.

    Raises:
        TrainingError: it cannot be read, or a line is not an object with prompt and answer.
    """
    found = []
    for where, row in json_lines(path, TrainingError):
        fields = row if isinstance(row, dict) else {}
        prompt, answer = (whole_text(fields.get(key), where, TrainingError, key) for key in ("prompt", "answer"))
        if not answer.strip():
            raise TrainingError(f"{where}: the answer is blank; each line is an object with prompt and answer")
        found.append((prompt, answer))
    return found


def _ended(answer: str) -> str:
    return answer if answer[-1:].isspace() else answer + SEPARATOR
