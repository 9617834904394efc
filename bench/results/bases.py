"""Bases of results: which rows share a base, how bases are named apart, and how local paths are shown.

A base is its `base_hash` (`checkpoints.identity`). Labels are for people: two folders may have the same last part, and
a checkpoint that was trained in place keeps its name. So wherever results are shown, a label that stands for several
bases is followed by the first digits of each one's hash: hf (3f2a91c0), hf (77aa0c12).

Lines of journals and baselines of schema 1 have a hash that leaves the tokenizer out. It is another hash of the same
base, which no digits tell: it is read with `OLD` before it, and never taken for one of today.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.results.records import Contents
    from bench.results.row import Row

OLD = "schema1:"  # before a base_hash of schema 1
DIGITS = 8
DEFAULT_BASE = "reference"  # of a run, and of recorded results

Identity = tuple[str, str | None]  # label and base_hash

_QUOTED = re.compile(r"""(['"`])(?:file:/{2})?(?:~[\w.-]*|\.{1,2})?/[^'"`\n]*?([^'"`/\n]+)/?\1""")
_BARE = re.compile(r"""(?<![\w/.~…-])(?:file:/{2}(?=/))?(?:~[\w.-]*/|\.{1,2}/|/[^\s/'"`,;:()\[\]{}<>|=]+/)"""
                   r"""(?:[^\s/'"`,;:()\[\]{}<>|=]+/)*([^\s/'"`,;:()\[\]{}<>|=]+)/?""")  # fmt: skip


def short(base_hash: str | None) -> str:
    """The digits of a base_hash that people see.

    >>> short("3f2a91c0b4d5"), short("schema1:3f2a91c0b4d5"), short(None)
    ('3f2a91c0', 'schema 1, 3f2a91c0', 'unknown')
    """
    if base_hash is None:
        return "unknown"
    return f"schema 1, {base_hash.removeprefix(OLD)[:DIGITS]}" if base_hash.startswith(OLD) else base_hash[:DIGITS]


def names(found: Iterable[Identity]) -> dict[Identity, str]:
    """What each base is called beside the others: its label, with digits of its hash where several have that label.

    >>> names([("hf", "3f2a91c0b4d5"), ("hf", "77aa0c12"), ("reference", "d4a0")])[("hf", "77aa0c12")]
    'hf (77aa0c12)'
    """
    hashes: dict[str, dict[str | None, None]] = {}
    for label, base_hash in found:
        hashes.setdefault(label, {})[base_hash] = None
    called = {}
    for label, of in hashes.items():
        for base_hash in of:
            called[label, base_hash] = label if len(of) == 1 else f"{label} ({short(base_hash)})"
    if len(set(called.values())) < len(called):  # digits that are alike, or a folder that is called as another is shown
        called = {(label, base_hash): f"{label} ({base_hash})" for label, base_hash in called}
    return called


class Bases:
    """The bases of a journal's records; `names` says what each is called beside the others."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        records = list(records)
        self._runs: dict[str, Identity] = {}  # as the first record of a run says
        for each in records:
            if each["kind"] == "run" and each["run"] not in self._runs:
                label, base_hash = (each["context"].get(name) for name in ("base", "base_hash"))
                old = base_hash is not None and each["context"].get("schema", 1) == 1
                self._runs[each["run"]] = str(label or ""), f"{OLD}{base_hash}" if old else base_hash
        found = dict.fromkeys(self.of(each) for each in records if each["kind"] in ("run", "row", "layers"))
        self.names = names(each for each in found if each[0])

    def of(self, record: Mapping[str, Any]) -> Identity:
        """The base of a record of a run, of a row or of layers: its label, and its hash where that is known."""
        label, base_hash = self._runs.get(record["run"], ("", None))
        return record.get("base") or label, record.get("base_hash") or base_hash


def label_of(name: str, base_hash: str | None) -> str:
    """The label of a base that is called so beside others."""
    return name.removesuffix(f" ({short(base_hash)})")


def rows_told_apart(rows: Iterable["Row"], called: Mapping[Identity, str] | None = None) -> list["Row"]:
    """The rows, each with the name of its base beside the others; `called` is `names` of more than these."""
    rows = list(rows)
    called = names((row.base, row.base_hash) for row in rows) if called is None else called
    return [row if called[row.base, row.base_hash] == row.base else replace(row, base=called[row.base, row.base_hash])
            for row in rows]  # fmt: skip


def told_apart(contents: "Contents") -> "Contents":
    """What readers of results see of a journal: labels that stand for several bases are told apart, and no local path.

    `baselines update`, which records under the label itself, and runs that are gone on with take what was written.
    """
    return replace(contents, records=[each.told_apart(contents.bases) for each in contents.records])


def shown(record: dict[str, Any], bases: Bases) -> dict[str, Any]:
    """A record as readers see it; the same one where nothing changes, as in most of hundreds of thousands."""
    changed: dict[str, Any] = {}
    if record["kind"] in ("row", "layers"):
        changed = {"base": bases.names[bases.of(record)], "base_hash": bases.of(record)[1]}
    for name in ("reason", "words", "layers"):
        if record.get(name) is not None:
            changed[name] = _plain(record[name])
    if record["kind"] == "run":
        found = bases.of(record)
        changed["context"] = _plain(record["context"]) | ({"base": bases.names[found]} if found[0] else {})
    if all(record.get(name) == value for name, value in changed.items()):
        return record
    return record | changed


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def without_paths(text: str) -> str:
    """A text with each local path by its last part: what people read elsewhere tells nothing of this machine's folders.

    >>> without_paths("pytest bench --base /srv/ann/models/hf --data=~/texts -m quality")
    'pytest bench --base …/hf --data=…/texts -m quality'
    >>> without_paths("'/data/my models/hf' has 2.1 ms/token, see https://host/v1")
    "'…/hf' has 2.1 ms/token, see https://host/v1"
    """
    if "/" not in text:
        return text
    text = _QUOTED.sub(r"\1…/\2\1", text)
    return _BARE.sub(lambda found: f"…/{found[1]}", text)
