"""Older shapes of baseline files, each turned into the next by one small function: `STEPS[n]` gives schema n + 1.

0   {"schema": 0, "base", "recipe", "context", "rows": {key: number}}: plain numbers of one device; what they mean is
    declared with their metrics, and the device is the context's fingerprint
1   today's; see `bench._baseline`

A file is read in whatever of these shapes it has; `python -m bench baselines migrate` writes it in today's.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from bench._strict import exact_fields
from bench.metrics import all_metrics
from bench.rows import Param

SCHEMA = 1


def migrated(table: Any) -> dict[str, Any]:
    """The table of a baseline file in today's shape; raises ValueError in words for what cannot be."""
    if not isinstance(table, dict):
        raise ValueError(f"{table!r:.100} is not a table of names and values")
    schema = table.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        more = ": a newer compression-bench wrote it, upgrade this one" if newer else ""
        raise ValueError(f"schema={schema!r} must be from 0 to {SCHEMA}{more}")
    for step in range(schema, SCHEMA):
        table = STEPS[step](table) | {"schema": step + 1}
    return table


def _from_plain_numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    table = exact_fields(table, {"schema", "base", "recipe", "context", "rows"})
    if not isinstance(table["context"], dict) or not isinstance(table["rows"], dict):
        raise ValueError("context and rows must be tables of names and values")
    anywhere, own = {}, {}
    for key, value in table["rows"].items():
        metric = all_metrics().get(key.partition("[")[0])
        if metric is None:
            raise ValueError(f"row {key}: no metric {key.partition('[')[0]!r} is declared, so what it means is lost")
        row = {"params": params_of(key), "value": value, "ratio": None, "base_value": None, "status": "ok"}
        row |= {name: getattr(metric, name) for name in ("of", "kind", "unit", "better")}
        (own if metric.per_device else anywhere)[key] = row | {"samples": [], "base_samples": []}
    context = table["context"]
    if own and not context.get("fingerprint"):
        raise ValueError(f"row {next(iter(own))}: the context names no fingerprint, so the device is lost")
    devices = {context["fingerprint"]: {"context": context, "rows": own}} if own else {}
    return {**table, "rows": anywhere, "devices": devices}


def params_of(key: str) -> dict[str, Param]:
    """The parameters in the key of a row: numbers and truth values as such, all else as text.

    >>> params_of("quality.perplexity[data=a%2cb,length=512,sliding=false]")
    {'data': 'a,b', 'length': 512, 'sliding': False}
    """
    inside = key.partition("[")[2].removesuffix("]")
    return {name: _value(text) for name, _, text in (part.partition("=") for part in inside.split(",") if part)}


def _value(text: str) -> Param:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, int | float) and json.dumps(found) == text:
        return found
    return re.sub(r"%([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), text)


STEPS: dict[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {0: _from_plain_numbers}
