"""One recorded row, as it stands in a baseline file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from bench.metrics import Metric
from bench.metrics.registry import KINDS
from bench.results.items import Items
from bench.results.row import BETTER, MEASURED, Input, Param, Row, checked_params, inputs_of, key_of, plain_inputs
from compression.files.strict_json import exact_fields, finite


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recorded row: its numbers, what they mean, and the conditions they were measured under."""

    metric: str
    params: dict[str, Param] = field(hash=False)
    of: str
    kind: str
    unit: str
    better: str
    status: str
    value: float
    ratio: float | None
    base_value: float | None
    samples: tuple[float, ...]  # to 6 significant digits, to stay readable
    base_samples: tuple[float, ...]
    context: dict[str, Any] = field(hash=False)  # by CONDITIONS
    items: Items | None = None  # what the value is the mean of; None for rows that have none, or were recorded without
    inputs: dict[str, Input] = field(default_factory=dict, hash=False)  # what it read; empty if recorded without
    compute_dtype: str | None = None  # that the models computed in; None: the stored one

    @classmethod
    def of_row(cls, row: Row, metric: Metric, context: Mapping[str, Any], fingerprint: str) -> Self:
        """What is recorded of a row that was measured in `context`."""
        own = {each.name: getattr(row, each.name) for each in fields(cls) if each.name not in ("kind", "context")}
        known = conditions(stamped(context, fingerprint, row.seed), row.of) | {"engine": row.engine}
        entry = cls(**own, kind=metric.kind, context=known)
        return replace(entry, samples=_rounded(row.samples), base_samples=_rounded(row.base_samples))

    def to_json(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """All but what the key and the section's context say."""
        shown = {name: getattr(self, name) for name in ("params", *_TEXTS)}
        shown |= {name: _plain(getattr(self, name)) for name in _NUMBERS}
        shown |= {name: [_plain(each) for each in getattr(self, name)] for name in _SAMPLES}
        common = conditions(section, self.of)
        other = {name: value for name, value in self.context.items() if value != common[name]}
        shown |= {"items": self.items.digest} if self.items else {}
        shown |= {"inputs": plain_inputs(self.inputs)} if self.inputs else {}
        shown |= {"compute_dtype": self.compute_dtype} if self.compute_dtype else {}
        return shown | ({"context": other} if other else {})

    @classmethod
    def from_json(cls, key: str, table: object, section: Mapping[str, Any], kept: Mapping[str, Items]) -> Self:
        """The entry that `to_json` gave, with its items out of `kept`; raises ValueError in words."""
        row = exact_fields(table, {"params", *_TEXTS, *_NUMBERS, *_SAMPLES}, _OPTIONAL)
        metric = key.partition("[")[0]
        params = checked_params(row["params"])
        if key_of(metric, params) != key:
            raise ValueError(f"its params are {params}, whose key is {key_of(metric, params)!r}")
        for name, allowed in (("kind", KINDS), ("better", BETTER), ("status", MEASURED)):
            if row[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {row[name]!r}")
        for name in ("unit", "of", *({"compute_dtype"} & set(row))):
            if not isinstance(row[name], str) or not row[name]:
                raise ValueError(f"{name} must be a non-empty string, not {row[name]!r}")
        for name in _SAMPLES:
            if not isinstance(row[name], list):
                raise ValueError(f"{name} must be a list of numbers, not {row[name]!r}")
        own = exact_fields(row.get("context", {}), set(), frozenset(CONDITIONS))
        if not isinstance(engine := own.get("engine"), dict | None):
            raise ValueError(f"engine must be a table of names and values, not {engine!r}")
        return cls(
            metric=metric,
            params=params,
            **{name: row[name] for name in _TEXTS},
            value=finite(row["value"]),
            ratio=None if row["ratio"] is None else finite(row["ratio"]),
            base_value=None if row["base_value"] is None else finite(row["base_value"]),
            **{name: tuple(finite(each) for each in row[name]) for name in _SAMPLES},
            context=conditions(section, row["of"]) | own,
            items=_items(key, row.get("items"), kept),
            inputs=inputs_of(row.get("inputs", {})),
            compute_dtype=row.get("compute_dtype"),
        )


_OPTIONAL = frozenset({"context", "items", "inputs", "compute_dtype"})
_TEXTS = ("of", "kind", "unit", "better", "status")
_NUMBERS = ("value", "ratio", "base_value")
_SAMPLES = ("samples", "base_samples")


def _items(key: str, digest: object, kept: Mapping[str, Items]) -> Items | None:
    """The items of a row that names their digest; raises ValueError where they are not there, or others."""
    if digest is None:
        return None
    if key not in kept:
        raise ValueError(f"its items {digest} are missing: the folder items/ beside the baseline has none for this row")
    if kept[key].digest != digest:
        raise ValueError(f"its items must have the digest {digest}; those beside the baseline have {kept[key].digest}")
    return kept[key]


def stamped(context: Mapping[str, Any], fingerprint: str, seed: int) -> dict[str, Any]:
    """A context that says on which device and with which seed."""
    return {**context, "fingerprint": fingerprint, "seed": seed}


def _rounded(samples: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(f"{each:.6g}") for each in samples)


def _plain(number: float | None) -> float | int | None:
    """15728640 rather than 15728640.0: whole numbers that a float holds exactly are written as such."""
    return int(number) if number is not None and number.is_integer() and abs(number) < 2**53 else number


CONDITIONS = ("base_hash", "data_hash", "seed", "fingerprint", "torch", "engine")  # engine: see `Row.engine`


def conditions(context: Mapping[str, Any], of: str) -> dict[str, Any]:
    """The conditions in a context for one kind of measurement; `data_hash` may be a table by such kinds."""
    found = {name: context.get(name) for name in CONDITIONS}
    if isinstance(found["data_hash"], Mapping):
        found["data_hash"] = found["data_hash"].get(of)
    return found
