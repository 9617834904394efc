"""Made-up rows of real metrics, the journal of one run that holds them, and what the report makes of them."""

from pathlib import Path

import bench
from bench.metrics import all_metrics
from bench.report.tables import tables
from bench.results.records import Contents
from bench.results.row import Row

BASELINES = Path(bench.__file__).parents[1] / "baselines"
SIZE, PERPLEXITY, ACCURACY = "efficiency.model_size_gb", "quality.perplexity", "quality.average_accuracy"
LATENCY, F1 = "efficiency.latency_ms", "rag.f1"
LOAD = {"batch": 1, "mode": "eager"}


def row(metric, value, recipe="nf4", **facts):
    """A row of a real metric; `ratio` follows from `base_value`."""
    known = all_metrics()[metric]
    facts = {"run": "r1", "base": "reference", "device": "cpu-test", "seed": 0} | facts
    if facts.get("base_value") and value is not None:
        facts["ratio"] = value / facts["base_value"]
    return Row(**facts, recipe=recipe, metric=metric, value=value, unit=known.unit, better=known.better, of=known.of)


def cells(table):
    return {line.name: dict(zip(table.columns, line.cells, strict=True)) for line in table.lines}


def table_of(rows, number, family=None):
    [found] = [each for each in tables(rows) if each.number == number and family in (None, each.family)]
    return found


def contents_of(rows, verdicts=(), ending="passed"):
    records = [{"kind": "run", "run": "r1", "time": 0, "context": {"commit": "abc123"}}]
    records += [{"kind": "row", "time": 1, **each.to_json()} for each in rows]
    records += [
        {
            "kind": "verdict",
            "run": "r1",
            "time": 2,
            "recipe": "nf4",
            "key": f"k{at}",
            "outcome": outcome,
            "words": f"nf4: k{at} {outcome}: {'x' * length}",
        }
        for at, (outcome, length) in enumerate(verdicts)
    ]
    records += [{"kind": "end", "run": "r1", "time": 3, "status": ending}] if ending else []
    return Contents(records=records, torn=[], writing=frozenset())
