"""Baselines: one readable file per base and recipe, `<directory>/<base>/<recipe>.json`.

    {"schema": 2, "digest": "...", "base": "reference", "recipe": "nf4",
     "context": {...}, "rows": {key: row},                              what no device changes: size, counts, quality
     "devices": {fingerprint: {"context": {...}, "rows": {key: row}}}}  timings and memory

A file holds rows of one base, by its `base_hash`. Several may lie in folders of one name: behind it stand digits of the
hash, `<directory>/<base>-<digits>/`. A row says by name and digest what it read (`bench.results.row.Input`).
The digest is that of everything else in the file (`gate.digest`), so that a number that was changed is not believed.
A row whose metric is a mean over items names their digest; the items lie beside the file (see `results.items`). Older
schemas are read too (`bench.gate.migrations`); recording merges into what is there (`bench.gate.recording`).
`context` is that of the last run that was recorded. A row that was recorded under other conditions (`CONDITIONS`) says
so in a `context` of its own, so that merging runs never makes a row claim what it was not measured on.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.errors import BaselineError
from bench.files import write_whole
from bench.gate.digest import check_digest, digest_of, without_digest
from bench.gate.entry import Entry
from bench.gate.migrations import SCHEMA, migrated
from bench.metrics import Metric
from bench.results import items as stored
from bench.results.bases import OLD, Identity, short
from bench.results.items import Items
from bench.results.row import MEASURED, Row
from compression.checkpoints.base import is_name
from compression.files.strict_json import exact_fields, finite, strict_json
from compression.recipes.recipe import slug

ANYWHERE = ""  # the place of rows that no device changes
ITEMS = "items"  # the folder of what rows are means of


@dataclass(frozen=True, kw_only=True)
class Section:
    """The rows recorded at one place, by key, and the context of the last run recorded there."""

    context: dict[str, Any]
    rows: dict[str, Entry]

    def to_json(self) -> dict[str, Any]:
        """Context and rows in what JSON knows."""
        return {"context": self.context, "rows": {key: each.to_json(self.context) for key, each in self.rows.items()}}

    @classmethod
    def from_json(cls, table: object, kept: Mapping[str, Items]) -> Self:
        """The section that `to_json` gave, with items out of `kept`; raises ValueError naming the row."""
        section = exact_fields(table, {"context", "rows"})
        context, rows = section["context"], section["rows"]
        if not isinstance(context, dict) or not isinstance(rows, dict):
            raise ValueError("context and rows must be tables of names and values")
        entries = {}
        for key, row in rows.items():
            try:
                entries[key] = Entry.from_json(key, row, context, kept)
            except ValueError as error:
                raise ValueError(f"row {key}: {error}") from None
        return cls(context=context, rows=entries)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """All that is recorded of one recipe on one base: a section per device, and `ANYWHERE` for what none changes."""

    base: str
    recipe: str
    sections: dict[str, Section] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        """Fingerprints of the devices that have rows of their own."""
        return sorted(set(self.sections) - {ANYWHERE})

    @property
    def base_hash(self) -> str | None:
        """Of all its rows; None where none says."""
        entries = (entry for section in self.sections.values() for entry in section.rows.values())
        return next((entry.context["base_hash"] for entry in entries if entry.context["base_hash"]), None)

    @property
    def identity(self) -> Identity:
        """The base that it is of."""
        return self.base, self.base_hash

    @staticmethod
    def path(directory: str | Path, base: str, recipe: str, base_hash: str | None = None) -> Path:
        """Where the baseline of a base and recipe is kept."""
        plain = base_hash is None or base_hash.startswith(OLD) or is_name(base)
        return Path(directory) / (slug(base) if plain else f"{slug(base)}-{short(base_hash)}") / f"{slug(recipe)}.json"

    def file(self, directory: str | Path) -> Path:
        """Where it is kept."""
        return self.path(directory, self.base, self.recipe, self.base_hash)

    @classmethod
    def find(cls, directory: str | Path, base: str, recipe: str, base_hash: str | None = None) -> Self | None:
        """The baseline of a base and recipe; None where nothing was recorded.

        Where nothing was recorded of this base, but of another one of that name (by `base_hash`), it is the other's:
        the gate says so. Raises BaselineError as `load` does.
        """
        own = cls.path(directory, base, recipe, base_hash)
        place = re.compile(re.escape(slug(base)) + r"(-[0-9a-f]{8})?")
        others = sorted(path for path in Path(directory).glob(f"*/{own.name}") if place.fullmatch(path.parent.name))
        for path in [own] if own.exists() else others:
            found = cls.load(path)
            if (found.base, found.recipe) == (base, recipe):
                return found
            if path == own:
                raise BaselineError(
                    f"baseline {path}: it is {found.recipe!r} on {found.base!r}, not {recipe!r} on {base!r}; {_WAY_OUT}"
                )
        return None

    @classmethod
    def load(cls, path: str | Path, *, items: str | None = None) -> Self:
        """Read one file, of this schema or an older. Raises BaselineError, naming file and row, for anything else.

        `items` is the name that its items are kept under, where that is not the file's own.
        """
        try:
            written = strict_json(Path(path).read_text(encoding="utf-8"))
            table, renamed = migrated(without_digest(written))
            named = table.pop("items", None)  # without it they have the file's own name, as older versions wrote them
            if named is not None and not (isinstance(named, str) and re.fullmatch("[0-9a-f]{8}", named)):
                raise ValueError(f"items must be eight hexadecimal digits, not {named!r}")
            table = exact_fields(table, {"schema", "base", "recipe", "context", "rows", "devices"})
            for name in ("base", "recipe"):
                if not isinstance(table[name], str) or not table[name]:
                    raise ValueError(f"{name} must be a non-empty string, not {table[name]!r}")
            if not isinstance(table["devices"], dict) or ANYWHERE in table["devices"]:
                raise ValueError("devices must be a table by fingerprint")
            stem = items or Path(path).stem
            kept = stored.load(Path(path).parent / ITEMS, stem if named is None else f"{stem}.{named}")
            kept = {renamed.get(key, key): each for key, each in kept.items()}
            sections = {ANYWHERE: Section.from_json({name: table[name] for name in ("context", "rows")}, kept)}
            sections |= {device: Section.from_json(section, {}) for device, section in table["devices"].items()}
            if len(found := _hashes(sections)) > 1:
                raise ValueError(f"its rows belong to several bases: {', '.join(sorted(found))}")
            check_digest(written, path)  # last, so that what cannot be is named
        except OSError as error:
            raise BaselineError(f"baseline {path} cannot be read: {error.strerror or error}") from None
        except BaselineError:  # of the items or the digest, with words of its own
            raise
        except ValueError as error:
            raise BaselineError(f"baseline {path}: {error}; {_WAY_OUT}") from None
        return cls(base=table["base"], recipe=table["recipe"], sections=sections)

    def save(self, directory: str | Path) -> Path:
        """Write the file and its items, whole or not at all, and return its path.

        The items lie in a file whose name has their digest, and the baseline names it: until the baseline is renamed
        into its place it has the old ones, behind that the new ones. Items that none names are removed last.

        Raises BaselineError where that cannot be done.
        """
        path = self.file(directory)
        shared = self.sections.get(ANYWHERE, Section(context={}, rows={}))
        devices = {device: self.sections[device].to_json() for device in self.devices}
        table = {"schema": SCHEMA, "base": self.base, "recipe": self.recipe, **shared.to_json(), "devices": devices}
        kept = {key: entry.items for key, entry in shared.rows.items() if entry.items}
        items = stored.digest(kept) if kept else None
        if items is not None:
            table["items"] = items
            stored.save(path.parent / ITEMS, f"{path.stem}.{items}", kept)
        table["digest"] = digest_of(table)
        try:
            text = json.dumps(table, indent=2, sort_keys=True, allow_nan=False)
            text = re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (text + "\n").encode())
        except (OSError, TypeError, ValueError) as error:
            raise BaselineError(
                f"baseline {path} cannot be written: {error}; --baselines DIR chooses another folder"
            ) from None
        stored.remove(path.parent / ITEMS, path.stem, keep=items)
        return path

    def items_file(self, directory: str | Path) -> Path | None:
        """Where its items are kept; None where it has none."""
        path = self.file(directory)
        kept = {key: e.items for key, e in self.sections[ANYWHERE].rows.items() if e.items} if (
            ANYWHERE in self.sections) else {}  # fmt: skip
        return path.parent / ITEMS / f"{path.stem}.{stored.digest(kept)}.json" if kept else None


def _hashes(sections: Mapping[str, Section]) -> set[str]:
    entries = (entry for section in sections.values() for entry in section.rows.values())
    return {entry.context["base_hash"] for entry in entries} - {None}


_WAY_OUT = "restore it from version control, or delete it and record it again with --update-baselines"


def unusable(row: Row, metric: Metric | None, fingerprint: str) -> str | None:
    """Why a row can be neither judged nor recorded, in words; None where it can."""
    if row.status not in MEASURED:
        return f"{row.status}: {row.reason}"
    try:
        finite(row.value)
    except ValueError as error:
        return f"value: {error}"
    if metric is None:
        return f"there is no metric {row.metric!r}"
    for name in ("unit", "better", "of"):
        if getattr(row, name) != getattr(metric, name):
            return f"the row has {name}={getattr(row, name)!r}, the metric {getattr(metric, name)!r}"
    if row.device != fingerprint:
        return f"it was measured on {row.device!r}, not on {fingerprint!r}"
    return None


def gone(rows: Iterable[Row], baseline: Baseline, fingerprint: str) -> list[tuple[str, str]]:
    """Place and key of what was recorded with a measurement that was made again, but is not among its rows now."""
    measured = [row for row in rows if row.recipe == baseline.recipe]
    keys = {row.key for row in measured}
    again = {(row.of, row.key.removeprefix(row.metric)) for row in measured}
    return [
        (place, key)
        for place in (ANYWHERE, fingerprint)
        for key, entry in baseline.sections.get(place, Section(context={}, rows={})).rows.items()
        if key not in keys and (entry.of, key.removeprefix(entry.metric)) in again
    ]


def elsewhere(baseline: Baseline, fingerprint: str) -> str | None:
    """In a few words, how the device that was recorded differs from this one; None where this one was, or none."""
    if not baseline.devices or fingerprint in baseline.devices:
        return None
    if (threads := _threads(baseline, fingerprint)) is not None:
        return f"recorded with {threads} thread{'s' * (threads != '1')}: set OMP_NUM_THREADS={threads}"
    kinds = {device.partition("-")[0] for device in (*baseline.devices, fingerprint)}
    return f"recorded on another {'processor' if kinds == {'cpu'} else 'device'}"


def _threads(baseline: Baseline, fingerprint: str) -> str | None:
    """The threads that were recorded, where nothing else of the device differs."""
    name = fingerprint.rpartition("-")[0]
    alike = (each for each in baseline.devices if each.rpartition("-")[0] == name and fingerprint.startswith("cpu-"))
    return next((each.rpartition("-")[2].removesuffix("t") for each in alike), None)


def fallback(baseline: Baseline, fingerprint: str) -> str | None:
    """What of a baseline can be compared on a device that it has no rows of, in words; None where it has some."""
    if not baseline.devices or fingerprint in baseline.devices:
        return None
    timed = max(len(baseline.sections[device].rows) for device in baseline.devices)
    shared = len(baseline.sections[ANYWHERE].rows) if ANYWHERE in baseline.sections else 0
    words = (
        f"{baseline.recipe}: recorded on {', '.join(baseline.devices)}, not on {fingerprint}: {timed} rows of time and "
        f"memory are not compared; {shared} others are, counts exactly and other numbers with the tolerance between "
        "devices"
    )
    if (threads := _threads(baseline, fingerprint)) is None:
        return words
    return f"{words}; only the number of threads differs: set OMP_NUM_THREADS={threads} to compare them too"
