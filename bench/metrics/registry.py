"""The registry of metrics: one frozen row of facts beside one pure function each.

    @metric("efficiency.stored_bytes", unit="B", better="lower", kind="counted", of="artefact")
    def stored_bytes(artefact: Artefact) -> float:
        '''Bytes of all that is stored.'''

The function stays what it is; the registry holds a `Metric`, which calls it and lets only finite numbers through.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.errors import MetricError
from bench.results.items import Items
from bench.results.row import BETTER, NAME
from compression.files.strict_json import finite

KINDS = ("timing", "memory", "counted", "deterministic", "sampled")
PER_DEVICE = ("timing", "memory")
SHARES = {"timing": 0.15, "memory": 1.0}  # what disturbs a round only makes it slower; a peak is one in every round
OF_ITEMS = ("mean", "exp")

Function = TypeVar("Function", bound=Callable[[Any], float])

METRICS: dict[str, "Metric"] = {}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. Raises MetricError for facts that cannot be.

    How the gate compares, by kind: `counted` exactly; `deterministic` exactly on one device, torch and engine, else
    to a fixed relative 1e-3, or to `rel` and `dtype_floor` if the baseline was computed in another dtype; `sampled` by
    `rel`; `timing` and `memory`, which belong to one device, by `rel` and `rel_absolute`, and by their samples where
    there are enough.
    """

    name: str  # "efficiency.decode_ms": <group>.<name>
    unit: str
    better: str  # one of BETTER
    kind: str  # one of KINDS
    of: str  # the kind of measurement that the function reads: "generation", "artefact", "perplexity" ...
    rel: float = 0.0  # share of worsening allowed: of the ratio to the base where there is one, else of the value
    rel_absolute: float | None = None  # share of worsening of the value itself that is allowed; None: not gated
    floor: float = 0.0  # in `unit`: no smaller difference is a change
    dtype_floor: float = 0.0  # the same between values computed in different dtypes
    share: float | None = None  # of the rounds, the best ones, by which the gate compares; None: SHARES of its kind
    of_items: str = "mean"  # what it is of the mean of its items, if it has any: that mean, or "exp" of it
    function: Callable[[Any], float]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise MetricError(f"metric name must be <group>.<name> in lower case, not {self.name!r}")
        for field, value, allowed in (("better", self.better, BETTER), ("kind", self.kind, KINDS)):
            if value not in allowed:
                raise MetricError(f"metric {self.name}: {field} must be one of {', '.join(allowed)}, not {value!r}")
        if self.of_items not in OF_ITEMS:
            raise MetricError(
                f"metric {self.name}: of_items must be one of {', '.join(OF_ITEMS)}, not {self.of_items!r}"
            )
        for field in ("unit", "of"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise MetricError(
                    f"metric {self.name}: {field} must be a non-empty string, not {getattr(self, field)!r}"
                )
        if self.rel_absolute is not None and not self.per_device:
            raise MetricError(
                f"metric {self.name}: rel_absolute={self.rel_absolute!r} is only for {' and '.join(PER_DEVICE)} "
                f"metrics; for kind={self.kind!r} leave it out"
            )
        if self.share is not None and not (self.per_device and 0 < self.share <= 1):
            raise MetricError(
                f"metric {self.name}: share={self.share!r} must be above 0 and at most 1, and is only for "
                f"{' and '.join(PER_DEVICE)} metrics"
            )
        tolerances = {name: getattr(self, name) or 0.0 for name in ("rel", "rel_absolute", "floor", "dtype_floor")}
        for field, value in tolerances.items():
            self._check_tolerance(field, value)

    def _check_tolerance(self, field: str, value: object) -> None:
        try:
            number = finite(value)
        except ValueError as error:
            raise MetricError(f"metric {self.name}: {field}: {error}; give a number of at least 0") from None
        if number < 0:
            raise MetricError(f"metric {self.name}: {field} must be at least 0, not {value!r}")
        if not field.endswith("floor") and self.better == "higher" and number >= 1:
            raise MetricError(
                f"metric {self.name}: {field} must be below 1 where higher is better, not {value!r}: it would allow "
                "a drop to 0"
            )

    def __call__(self, measurement: Any) -> float:
        """The metric of one measurement, finite; raises MetricError, naming metric and value, where it is not."""
        value = self.function(measurement)
        try:
            return finite(value)
        except ValueError as error:
            raise MetricError(f"metric {self.name}: {error}; a metric must return a finite number, or raise") from None

    @property
    def group(self) -> str:
        """The part of the name before the point."""
        return self.name.partition(".")[0]

    @property
    def title(self) -> str:
        """First line of the function's docstring; empty where it has none."""
        return next(iter((self.function.__doc__ or "").strip().splitlines()), "")

    @property
    def best(self) -> float:
        """Share of the rounds by which the gate compares."""
        return self.share or SHARES.get(self.kind, 1.0)

    @property
    def per_device(self) -> bool:
        """Whether the number means something only on the device it was measured on."""
        return self.kind in PER_DEVICE

    @property
    def by_ratio(self) -> bool:
        """Whether recipes are compared by their ratios to the base of the same run: the value is one of its hour."""
        return self.per_device and self.better != "neither"


def metric(
    name: str,
    *,
    unit: str,
    better: str,
    kind: str,
    of: str,
    rel: float = 0.0,
    rel_absolute: float | None = None,
    floor: float = 0.0,
    dtype_floor: float = 0.0,
    share: float | None = None,
    of_items: str = "mean",
) -> Callable[[Function], Function]:
    """Declare the decorated function as a metric, with the fields of `Metric`. Raises MetricError for a name in use."""

    def register(function: Function) -> Function:
        if name in METRICS:
            raise MetricError(
                f"metric {name!r} is declared twice, in {METRICS[name].function.__module__} and in "
                f"{function.__module__}; rename one"
            )
        METRICS[name] = Metric(
            name=name,
            unit=unit,
            better=better,
            kind=kind,
            of=of,
            rel=rel,
            rel_absolute=rel_absolute,
            floor=floor,
            dtype_floor=dtype_floor,
            share=share,
            of_items=of_items,
            function=function,
        )
        return function

    return register


def check_items(metric: Metric, value: float, items: Items) -> None:
    """Raises MetricError where items are not those that the value is the mean of, or the exponential of the mean."""
    try:
        expected = math.exp(items.mean) if metric.of_items == "exp" else items.mean
    except OverflowError:
        expected = math.inf
    if not math.isclose(expected, value, rel_tol=1e-4, abs_tol=1e-6):
        raise MetricError(
            f"metric {metric.name} is {value!r}, its {len(items)} items make {expected!r}: they belong to another "
            "metric"
        )
