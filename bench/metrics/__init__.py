"""The metrics: one module per question, one pure function with one row of facts per metric.

A new one is a function under `@metric(...)` in any public module of this package; nothing else lists it. No module here
imports torch at its top, so that collecting the benchmarks stays cheap.
"""

import functools
import importlib
import pkgutil

from bench.metrics.registry import METRICS, Metric, metric

__all__ = ["Metric", "all_metrics", "metric", "metrics_of"]


def all_metrics() -> dict[str, Metric]:
    """Every metric by name, in order of names; imports the public modules of this package."""
    _import_modules()
    return dict(sorted(METRICS.items()))


@functools.cache
def _import_modules() -> None:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")


def metrics_of(measurement: str) -> list[Metric]:
    """The metrics that read one kind of measurement, such as "generation", in order of names."""
    return [each for each in all_metrics().values() if each.of == measurement]
