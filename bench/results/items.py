"""Results per item, stored so that two runs can be compared item by item.

An item is a question, a document, a window of text. Its hash stands for all that it asks, so that results of two runs
are paired by what was asked and never by place. Beside a baseline `<base>/<recipe>.json` lie

    <base>/items/<recipe>.json          packed values of each row that has items, in base64, and which list they are of
    <base>/items/<digest>.hashes        a list of items: 8 bytes each, in order; shared by all rows and recipes

Bits are packed eight to a byte, reals stored as float32; 500 items take 63 or 2,000 bytes, their list 4,000 once. The
same items give the same bytes. The row in the baseline names the digest of its items, so a file that was damaged, or is
of another run, is refused.
"""

import base64
import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import Any, Self

from bench.errors import BaselineError, MetricError
from bench.files import write_whole
from compression.files.strict_json import exact_fields, strict_json

KINDS = ("binary", "real")
SCHEMA = 1
DIGITS = 16  # hexadecimal, of the hash of an item and of every digest here
_WIDTH = DIGITS // 2  # bytes


def hashes_of(asked: Iterable[Any]) -> tuple[str, ...]:
    """The hash of each item: 16 hexadecimal digits of the SHA-256 of all that it asks, which JSON must be able to hold.

    An item that asks the same as one before it is told apart by counting.

    >>> hashes_of([["2 + 2 =", " 4"], ["2 + 2 =", " 4"]])
    ('462f0c65a1b72ba4', 'ce3894baa249c92c')
    """
    seen: Counter[str] = Counter()
    found = []
    for each in asked:
        text = json.dumps(each, ensure_ascii=True, sort_keys=True, allow_nan=False)
        seen[text] += 1
        found.append(_digest(text.encode() + (f"\n{seen[text]}".encode() if seen[text] > 1 else b"")))
    return tuple(found)


@dataclass(frozen=True)
class Items:
    """Values of one metric by item, in order of the hashes; the metric is their mean, or a function of it.

    `values` are 0 or 1 where `kind` is "binary"; where it is "real" they are finite and rounded to float32, as they are
    stored, so that an unchanged model differs from its baseline by nothing. Raises MetricError for what cannot be.
    """

    hashes: tuple[str, ...]
    values: tuple[float, ...]
    kind: str

    def __post_init__(self) -> None:
        hashes, values = tuple(self.hashes), tuple(map(float, self.values))
        if self.kind not in KINDS:
            raise MetricError(f"kind of items must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not hashes or len(hashes) != len(values):
            raise MetricError(
                f"{len(hashes)} items have {len(values)} values; there must be one value per item, and at least one "
                "item"
            )
        for name in hashes:
            if not isinstance(name, str) or len(name) != DIGITS or not set(name) <= set("0123456789abcdef"):
                raise MetricError(f"item {name!r}: the hash must be {DIGITS} hexadecimal digits in lower case")
        if len(set(hashes)) < len(hashes):
            twice, _ = Counter(hashes).most_common(1)[0]
            raise MetricError(f"item {twice} occurs twice; number items with equal content (see hashes_of)")
        for name, value in zip(hashes, values, strict=True):
            if not isfinite(value) or (self.kind == "binary" and value not in (0.0, 1.0)):
                allowed = "0 or 1" if self.kind == "binary" else "a finite number"
                raise MetricError(f"item {name}: the value {value!r} must be {allowed}")
        if self.kind == "real":
            try:
                values = _floats(_packed(values, "real"))
            except OverflowError:
                raise MetricError("the value of an item does not fit in float32") from None
        ordered = sorted(zip(hashes, values, strict=True))
        object.__setattr__(self, "hashes", tuple(name for name, _ in ordered))
        object.__setattr__(self, "values", tuple(value for _, value in ordered))

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return fsum(self.values) / len(self)

    @property
    def asked(self) -> str:
        """The digest of the list of hashes: equal where the same items were asked."""
        return _digest(_bytes(self.hashes))

    @property
    def digest(self) -> str:
        """A digest of everything."""
        return _digest("\n".join((self.kind, self.asked)).encode() + _packed(self.values, self.kind))

    def to_json(self) -> dict[str, Any]:
        """All of it in what JSON knows, for the journal."""
        return {"kind": self.kind, "hashes": _text(_bytes(self.hashes)), "values": self._values()}

    def _values(self) -> str:
        return _text(_packed(self.values, self.kind))

    @classmethod
    def from_json(cls, table: object) -> Self:
        """The items that `to_json` gave; raises ValueError in words."""
        if not isinstance(table, dict) or set(table) != {"kind", "hashes", "values"}:
            raise ValueError("items must have kind, hashes and values")
        return cls._unpacked(_hashes(_data(table["hashes"])), table)

    @classmethod
    def _unpacked(cls, hashes: Sequence[str], table: Mapping[str, Any]) -> Self:
        kind, data = table["kind"], _data(table["values"])
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        wanted = 4 * len(hashes) if kind == "real" else -(-len(hashes) // 8)
        if len(data) != wanted:
            raise ValueError(f"{len(hashes)} {kind} items take {wanted} bytes, not {len(data)}")
        values = _floats(data) if kind == "real" else _bits(data, len(hashes))
        if list(hashes) != sorted(hashes):
            raise ValueError("the hashes must be in ascending order")
        return cls(tuple(hashes), values, kind)


def save(folder: str | Path, name: str, rows: Mapping[str, Items]) -> None:
    """Write the items of a baseline's rows by key into `folder`, as `<name>.json` and the lists that are not there yet.

    Raises BaselineError where it cannot be done.
    """
    folder = Path(folder)
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for items in rows.values():
            _write(folder / f"{items.asked}.hashes", _bytes(items.hashes))
        _write(path, _content(rows))
    except OSError as error:
        raise BaselineError(f"items {path} cannot be written: {error.strerror or error}") from None


def digest(rows: Mapping[str, Items]) -> str:
    """Of what `save` writes of these rows: part of a file's name that no other content has."""
    return _digest(_content(rows))[:8]


def remove(folder: str | Path, name: str, keep: str | None = None) -> None:
    """Remove the items of a baseline: `<name>.json`, and `<name>.<digest>.json` but for the digest that is kept.

    Raises BaselineError where it cannot be done.
    """
    own = re.compile(re.escape(name) + r"(\.[0-9a-f]{8})?\.json")
    kept = None if keep is None else f"{name}.{keep}.json"
    try:
        for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if own.fullmatch(path.name) and path.name != kept:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise BaselineError(f"items in {folder} cannot be removed: {error.strerror or error}") from None


def _content(rows: Mapping[str, Items]) -> bytes:
    table = {
        key: {"kind": items.kind, "asked": items.asked, "count": len(items), "values": items._values()}
        for key, items in sorted(rows.items())
    }
    return (json.dumps({"schema": SCHEMA, "rows": table}, indent=1, sort_keys=True) + "\n").encode()


def load(folder: str | Path, name: str) -> dict[str, Items]:
    """The items of a baseline's rows by key; empty where none are kept. Raises BaselineError naming file and row."""
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        return {}
    found = {}
    try:
        table = exact_fields(strict_json(path.read_text(encoding="utf-8")), {"schema", "rows"})
        if table["schema"] != SCHEMA or isinstance(table["schema"], bool) or not isinstance(table["rows"], dict):
            raise ValueError(f"schema={table['schema']!r} must be {SCHEMA}, and rows a table by key")
        for key, row in table["rows"].items():
            try:
                row = exact_fields(row, {"kind", "asked", "count", "values"})
                hashes = _list(Path(folder), row["asked"])
                if len(hashes) != row["count"]:
                    raise ValueError(f"count={row['count']!r}, but the list {row['asked']} has {len(hashes)} items")
                found[key] = Items._unpacked(hashes, row)
            except ValueError as error:
                raise ValueError(f"row {key}: {error}") from None
    except OSError as error:
        raise BaselineError(f"items {path}: {error.filename} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BaselineError(f"items {path}: {error}; {WAY_OUT}") from None
    return found


WAY_OUT = "restore it from version control, or delete it with its baseline and record both with --update-baselines"


def _list(folder: Path, digest: object) -> tuple[str, ...]:
    if not isinstance(digest, str) or len(digest) != DIGITS or not digest.isalnum():
        raise ValueError(f"asked={digest!r} must be {DIGITS} hexadecimal digits")
    data = (folder / f"{digest}.hashes").read_bytes()
    if _digest(data) != digest:
        raise ValueError(f"the list {digest}.hashes has been changed: its digest is {_digest(data)}")
    return _hashes(data)


def _write(path: Path, data: bytes) -> None:
    """The file, whole or not at all; untouched where it holds just that."""
    if not (path.exists() and path.read_bytes() == data):
        write_whole(path, data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} must be a base64 string")
    return base64.b64decode(text, validate=True)  # raises binascii.Error, a ValueError


def _bytes(hashes: Sequence[str]) -> bytes:
    return b"".join(map(bytes.fromhex, hashes))


def _hashes(data: bytes) -> tuple[str, ...]:
    if len(data) % _WIDTH:
        raise ValueError(f"a list of hashes has {len(data)} bytes, which is not a multiple of {_WIDTH}")
    return tuple(data[at : at + _WIDTH].hex() for at in range(0, len(data), _WIDTH))


def _packed(values: Sequence[float], kind: str) -> bytes:
    """Reals as float32, bits eight to a byte, the first the highest; the rest of the last byte is 0."""
    if kind == "real":
        return struct.pack(f"<{len(values)}f", *values)
    bits = "".join("1" if value else "0" for value in values)
    size = -(-len(bits) // 8)
    return int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big")


def _floats(data: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(data) // 4}f", data)


def _bits(data: bytes, count: int) -> tuple[float, ...]:
    bits = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}"
    if "1" in bits[count:]:
        raise ValueError("bits after the last item are set")
    return tuple(float(bit) for bit in bits[:count])
