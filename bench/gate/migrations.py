"""Migrations of older baseline files, one function per schema: `STEPS[n]` gives schema n + 1.

0   {"schema": 0, "base", "recipe", "context", "rows": {key: number}}: plain numbers of one device; what they mean is
    declared with their metrics, and the device is the context's fingerprint
1   a `base_hash` that leaves the tokenizer out; texts of folders in keys by the folder's name
2   today's; see `bench.gate.baseline`

A file is read in whatever of these shapes it has; `python -m bench baselines migrate` writes it in today's. A hash of
schema 1 is read as such (`results.bases.OLD`) and compared with none of today's: what it stands for is known only with
the base at hand, which `migrate` opens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.errors import BaselineError
from bench.metrics import all_metrics
from bench.results.bases import OLD
from bench.results.row import Input, Param, checked_params, key_of, plain_inputs
from compression.checkpoints.formats.description import SIDE_FILES
from compression.files.atomic import digest_of_file
from compression.files.strict_json import exact_fields, strict_json

if TYPE_CHECKING:
    from bench.gate.baseline import Baseline
    from compression.checkpoints.base import BaseSource

SCHEMA = 2


def migrated(table: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The table of a baseline file in today's shape, and keys of rows that were others before.

    Raises ValueError in words for what cannot be.
    """
    if not isinstance(table, dict):
        raise ValueError(f"it must be an object of names and values, not {table!r:.100}")
    schema = table.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        more = ": a newer compression-bench wrote it, upgrade this one" if newer else ""
        raise ValueError(f"schema={schema!r} must be from 0 to {SCHEMA}{more}")
    renamed: dict[str, str] = {}
    for step in range(schema, SCHEMA):
        table, other = STEPS[step](table)
        table, renamed = table | {"schema": step + 1}, renamed | other
    return table, renamed


Step = tuple[dict[str, Any], dict[str, str]]  # the table in the next shape, and the keys that changed


def _from_plain_numbers(table: Mapping[str, Any]) -> Step:
    table = exact_fields(table, {"schema", "base", "recipe", "context", "rows"})
    if not isinstance(table["context"], dict) or not isinstance(table["rows"], dict):
        raise ValueError("context and rows must be tables of names and values")
    anywhere, own = {}, {}
    for key, value in table["rows"].items():
        metric = all_metrics().get(key.partition("[")[0])
        if metric is None:
            raise ValueError(f"row {key}: no metric {key.partition('[')[0]!r} exists, so its meaning is lost")
        row = {"params": params_of(key), "value": value, "ratio": None, "base_value": None, "status": "ok"}
        row |= {name: getattr(metric, name) for name in ("of", "kind", "unit", "better")}
        (own if metric.per_device else anywhere)[key] = row | {"samples": [], "base_samples": []}
    context = table["context"]
    if own and not context.get("fingerprint"):
        raise ValueError(f"row {next(iter(own))}: the context has no fingerprint, so the device is unknown")
    devices = {context["fingerprint"]: {"context": context, "rows": own}} if own else {}
    return {**table, "rows": anywhere, "devices": devices}, {}


def _with_digests(table: Mapping[str, Any]) -> Step:
    """Hashes of bases are marked as those of schema 1; texts of folders go by their digest, which `data_hash` has."""
    table = exact_fields(table, {"schema", "base", "recipe", "context", "rows", "devices"})
    if not isinstance(table["devices"], dict):
        raise ValueError("devices must be a table by fingerprint")
    renamed: dict[str, str] = {}

    def section(of: Any) -> dict[str, Any]:
        of = exact_fields(of, {"context", "rows"})
        if not isinstance(of["context"], dict) or not isinstance(of["rows"], dict):
            raise ValueError("context and rows must be tables of names and values")
        rows = {}
        for key, row in of["rows"].items():
            now, row = _by_digest(key, row, of["context"]) if isinstance(row, dict) else (key, row)
            rows[now] = row
            if now != key:
                renamed[key] = now
        return {"context": _marked(of["context"]), "rows": rows}

    anywhere = section({name: table[name] for name in ("context", "rows")})
    return {**table, **anywhere, "devices": {place: section(each) for place, each in table["devices"].items()}}, renamed


def _by_digest(key: str, row: dict[str, Any], section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    own = row.get("context") if isinstance(row.get("context"), dict) else {}
    row = row | {"context": _marked(own)} if own else row
    params, found = row.get("params"), {"data_hash": section.get("data_hash")} | own
    digest = found["data_hash"].get(row.get("of")) if isinstance(found["data_hash"], dict) else found["data_hash"]
    data = params.get("data") if isinstance(params, dict) else None
    named = not isinstance(data, str) or data == "embedded" or data.startswith("hub:") or "@" in data
    if named or not isinstance(digest, str) or key_of(key.partition("[")[0], checked_params(params)) != key:
        return key, row
    read = Input(data, digest)
    params = checked_params(params | {"data": read.key})
    return key_of(key.partition("[")[0], params), row | {"params": params, "inputs": plain_inputs({"data": read})}


def _marked(context: Mapping[str, Any]) -> dict[str, Any]:
    known = context.get("base_hash")
    return {**context, "base_hash": f"{OLD}{known}"} if isinstance(known, str) else dict(context)


def params_of(key: str) -> dict[str, Param]:
    """The parameters in the key of a row: numbers and truth values as such, all else as text.

    >>> params_of("quality.perplexity[data=a%2cb,length=512,sliding=false]")
    {'data': 'a,b', 'length': 512, 'sliding': False}
    """
    inside = key.partition("[")[2].removesuffix("]")
    return {name: _value(text) for name, _, text in (part.partition("=") for part in inside.split(",") if part)}


def _value(text: str) -> Param:
    try:
        found = strict_json(text)
    except ValueError:
        found = None
    if isinstance(found, int | float) and json.dumps(found) == text:
        return found
    return re.sub(r"%([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), text)


STEPS: dict[int, Callable[[Mapping[str, Any]], Step]] = {0: _from_plain_numbers, 1: _with_digests}


def old_hash(source: "BaseSource") -> str:
    """The base_hash of schema 1: of configuration and weights alone."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    if source.folder is None:
        return digest.hexdigest()
    for path in source.files:
        digest.update(bytes.fromhex(digest_of_file(path)))
    if source.published is not None:
        described = [source.folder / name for name in ("config.json", *SIDE_FILES)]
        digest.update(b"".join(path.read_bytes() for path in described if path.exists()))
    return digest.hexdigest()


def with_base(old: "Baseline", hashes: Mapping["BaseSource", str]) -> "Baseline":
    """A baseline of schema 1 with today's hash of its base: of that at hand whose `old_hash` is the recorded one.

    Raises BaselineError where there is none.
    """
    recorded = (old.base_hash or "").removeprefix(OLD)
    source = next((each for each, known in hashes.items() if known == recorded), None)
    if source is None:
        there = ", ".join(f"{each.text} has {known[:12]}" for each, known in hashes.items())
        raise BaselineError(
            f"{old.recipe} on {old.base}: recorded for a base of hash {recorded[:12]}; by the same definition {there}; "
            "give the base that it was recorded for, or record it anew with --update-baselines"
        )
    sections = {}
    for place, section in old.sections.items():
        rows = {
            key: replace(entry, context=entry.context | {"base_hash": entry.context["base_hash"] and source.digest})
            for key, entry in section.rows.items()
        }
        sections[place] = replace(section, context=dict(section.context) | {"base_hash": source.digest}, rows=rows)
    return replace(old, sections=sections)
