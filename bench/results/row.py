"""Rows of results: one measured number each, with everything needed to interpret it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

from bench.errors import JournalError
from bench.results.items import Items
from compression.files.strict_json import exact_fields, finite_field

SCHEMA = 2
SCHEMAS = (
    1,
    2,
)  # 1 had neither `base_hash` nor `inputs`; its base_hash is in the record of its run, see `bench.results.bases`
STATUSES = ("ok", "estimated", "out_of_memory", "failed", "not_available")
MEASURED = STATUSES[:2]  # with these there is a value
REFUSED = "timings are refused"  # how the reason of a row begins that is not there because a device was shared

RUNTIME = "runtime"  # the parameter that names what ran the model, where that was an engine
RUN_BY = (RUNTIME, "dtype")  # with the dtype that it was asked for
NATIVE = "native"  # the runtime of this package
VERSIONS = ("version", "torch", "transformers")  # of an engine, and of the libraries in its environment
ENGINE = (  # flags of engines that change numbers
    "dtype_of_weights",
    "quantization",
    "weights",
    "kv_cache",
    "tensor_parallel_size",
)

Param = str | int | float | bool


def key_of(metric: str, params: Mapping[str, Param]) -> str:
    """The name of a row: the metric, and its parameters in order of their names.

    >>> key_of("efficiency.decode_ms", {"new_tokens": 128, "batch": 1, "graph": False})
    'efficiency.decode_ms[batch=1,graph=false,new_tokens=128]'

    What would make two keys look alike is escaped in texts, as in URLs.
    """
    if not params:
        return metric
    return f"{metric}[{','.join(f'{name}={_shown(value)}' for name, value in sorted(params.items()))}]"


def _shown(value: Param) -> str:
    if isinstance(value, str):
        return re.sub(r"[%,=\[\]\x00-\x1f]", lambda found: f"%{ord(found[0]):02x}", value)
    return json.dumps(value)


def checked_params(params: object) -> dict[str, Param]:
    """Parameters of a row in order; those that are None do not apply and are left out. Raises ValueError in words."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be an object of names and values, not {params!r}")
    kept = {name: value for name, value in params.items() if value is not None}
    for name, value in kept.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"the name of a parameter must be lower case with underscores, not {name!r}")
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"parameter {name} must be a string, a finite number or a truth value, not {value!r}")
    return dict(sorted(kept.items()))


class Input(NamedTuple):
    """What a measurement read: a text, a task, a teacher, a judge. Paths are in neither field.

    >>> Input("notes", "9f2c1a0b4d5e77").key, Input("hub", None).key, Input("embedded", "77aa", named=True).key
    ('9f2c1a0b4d5e', 'hub', 'embedded')
    """

    name: str  # for people: the last part of a folder's name, or what the suite or the hub calls it
    digest: str | None  # of the content, hex; None where the name says all
    named: bool = False  # whether the suite or the hub gave the name, which is then what the key of a row has

    @property
    def key(self) -> str:
        """What stands in the key of a row: of what lies in a folder the digest, so that equal copies are one."""
        return self.name if self.named or self.digest is None else self.digest[:DIGITS]


DIGITS = 12  # of a digest in a key


def _input(name: str, value: object) -> Input:
    if isinstance(value, Input):
        return value
    try:
        table = exact_fields(value, {"name", "digest"})
        if not all(isinstance(each, str) or (field, each) == ("digest", None) for field, each in table.items()):
            raise ValueError("name and digest must be strings")
    except ValueError as error:
        raise ValueError(f"input {name}={value!r}: {error}") from None
    return Input(table["name"], table["digest"])


def inputs_of(table: object) -> dict[str, Input]:
    """Inputs by name, as JSON has them; raises ValueError in words."""
    if not isinstance(table, Mapping):
        raise ValueError(f"inputs={table!r} must be a table by name")
    return {name: _input(name, each) for name, each in table.items()}


def keys_of(params: Mapping[str, "Param | Input | None"]) -> dict[str, Param | None]:
    """Parameters with what stands in a key in place of what was read."""
    return {name: each.key if isinstance(each, Input) else each for name, each in params.items()}


def plain_inputs(inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Inputs in what JSON knows."""
    return {name: {"name": each.name, "digest": each.digest} for name, each in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number and all that it needs to be understood. Raises JournalError for values that cannot be."""

    run: str
    base: str
    base_hash: str | None = None  # `compression.Base.digest`; None where it is not known
    recipe: str
    device: str  # fingerprint of the machine and device
    metric: str
    value: float | None  # in `unit`; None unless the status is "ok" or "estimated"
    unit: str
    better: str  # "lower", "higher" or "neither"
    ratio: float | None = None  # value / base_value
    base_value: float | None = None  # the same metric of the uncompressed base, measured in the same run
    samples: tuple[float, ...] = ()  # in `unit`, as measured
    base_samples: tuple[float, ...] = ()
    params: Mapping[str, Param] = field(default_factory=dict, hash=False)  # part of the key
    seed: int
    status: str = "ok"
    reason: str | None = None  # in words; needed unless the status is "ok"
    of: str  # the kind of measurement: "generation", "artefact" ...
    source: Any = field(default=None, hash=False)  # a note that JSON can hold: counter of the energy, kernel ...
    items: Items | None = None  # what the value is the mean of, or a function of that mean
    paired: Mapping[str, float] | None = field(default=None, hash=False)  # `Paired` against the base of the same run
    inputs: Mapping[str, Input] = field(default_factory=dict, hash=False)  # what it read, defaults included
    compute_dtype: str | None = None  # that the models computed in; None: the stored one
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        try:
            self._check()
        except ValueError as error:
            raise JournalError(f"row {self.metric} of {self.recipe}: {error}") from None

    def _check(self) -> None:
        for name in ("run", "base", "recipe", "device", "metric", "unit", "of"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"{name} must be a non-empty string, not {value!r}")
        if not NAME.fullmatch(self.metric):
            raise ValueError(f"metric must be <group>.<name> in lower case, not {self.metric!r}")
        for name, allowed in (("better", BETTER), ("status", STATUSES), ("schema", SCHEMAS)):
            if (value := getattr(self, name)) not in allowed or isinstance(value, bool):
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, not {self.seed!r}")
        if self.reason is not None and (not isinstance(self.reason, str) or not self.reason):
            raise ValueError(f"reason must be a non-empty string or None, not {self.reason!r}")
        if self.status != "ok" and self.reason is None:
            raise ValueError(f"status {self.status!r} needs a reason")
        if (self.value is not None) != (self.status in MEASURED):
            raise ValueError(
                f"value={self.value!r} with status {self.status!r}: there is a value exactly when the status is "
                f"{' or '.join(MEASURED)}"
            )
        for name in ("base_hash", "compute_dtype"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty string or None, not {value!r}")
        object.__setattr__(self, "inputs", inputs_of(self.inputs))
        object.__setattr__(self, "params", checked_params(self.params))
        for name in ("value", "ratio", "base_value"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, finite_field(name, getattr(self, name)))
        for name in ("samples", "base_samples"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a sequence of numbers")
            object.__setattr__(self, name, tuple(finite_field(name, each) for each in getattr(self, name)))
        if self.items is not None and not isinstance(self.items, Items):
            raise ValueError(f"items={self.items!r} must be Items, or None")
        if self.paired is not None:
            if not isinstance(self.paired, Mapping):
                raise ValueError(f"paired={self.paired!r} must be a table of names and numbers")
            object.__setattr__(self, "paired", {name: finite_field(name, each) for name, each in self.paired.items()})
        if self.ratio is not None and not (
            self.value is not None
            and self.base_value
            and math.isclose(self.ratio, self.value / self.base_value, rel_tol=1e-6)
        ):
            raise ValueError(f"ratio={self.ratio!r} is not value / base_value = {self.value!r} / {self.base_value!r}")

    @property
    def key(self) -> str:
        """Metric and parameters: what tells the rows of one recipe apart. See `key_of`."""
        return key_of(self.metric, self.params)

    @property
    def runtime(self) -> str:
        """What ran the model: "native", or an engine."""
        return str(self.params.get(RUNTIME, NATIVE))

    @property
    def engine(self) -> dict[str, Any] | None:
        """What served the model: engine, versions, and how it computes (ENGINE); None where no engine is told."""
        if self.runtime == NATIVE or not isinstance(self.source, Mapping) or "engine" not in self.source:
            return None
        flags = self.source.get("flags") or {}
        told = {name: self.source.get(name, flags.get(name)) for name in ("engine", *VERSIONS, *ENGINE)}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def remark(self) -> str | None:
        """What a reader of the value must know: the reason, and the dtype of the arithmetic if not the stored one."""
        computed = self.compute_dtype and f"computed in {self.compute_dtype} with the stored weights"
        return "; ".join(filter(None, (self.reason, computed))) or None

    def to_json(self) -> dict[str, Any]:
        """All fields, in what JSON knows."""
        table = {each.name: getattr(self, each.name) for each in fields(self)}
        table |= {name: list(table[name]) for name in ("samples", "base_samples")} | {"params": dict(self.params)}
        table |= {"items": self.items and self.items.to_json(), "paired": self.paired and dict(self.paired)}
        table["inputs"] = plain_inputs(self.inputs) or None
        return {name: value for name, value in table.items() if value is not None or name not in _OPTIONAL}

    @classmethod
    def from_json(cls, table: object) -> Self:
        """The row that `to_json` gave; raises JournalError for a missing, an unknown or an impossible field."""
        try:
            values = exact_fields(table, {each.name for each in fields(cls)} - _OPTIONAL, _OPTIONAL)
            items = values.get("items")
            return cls(**values | {"items": None if items is None else Items.from_json(items)})
        except ValueError as error:
            raise JournalError(f"not a row: {error}") from None


_OPTIONAL = frozenset({"items", "paired", "base_hash", "inputs", "compute_dtype"})  # in a line only if there is one

BETTER = ("lower", "higher", "neither")
NAME = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
