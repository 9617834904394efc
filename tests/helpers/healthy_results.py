"""Results as they should be: rows of one run, the baseline they make, and strategies for both."""

import math
import random
from statistics import median

from hypothesis import strategies as st

from bench.gate.baseline import ANYWHERE, Section
from bench.gate.entry import Entry
from bench.gate.verdicts import Baseline, Verdict, judge, verdicts
from bench.metrics import Metric
from bench.results.items import KINDS, Items, hashes_of
from bench.results.row import MEASURED, STATUSES, Row

FINGERPRINT = "cpu-test-2t"


def _metric(name: str, **facts: object) -> Metric:
    return Metric(name=name, function=float, **facts)


HEALTHY_METRICS = {
    each.name: each
    for each in (
        _metric(
            "efficiency.decode_ms",
            unit="ms/token",
            better="lower",
            kind="timing",
            of="generation",
            rel=0.15,
            rel_absolute=0.25,
            floor=0.02,
        ),
        _metric(
            "efficiency.throughput",
            unit="token/s",
            better="higher",
            kind="timing",
            of="generation",
            rel=0.15,
            rel_absolute=0.25,
        ),
        _metric(
            "efficiency.peak_mb", unit="MiB", better="lower", kind="memory", of="memory", rel=0.05, rel_absolute=0.1
        ),
        _metric("efficiency.stored_bytes", unit="B", better="lower", kind="counted", of="artefact"),
        _metric("efficiency.layers", unit="1", better="neither", kind="counted", of="artefact"),
        _metric("quality.perplexity", unit="perplexity", better="lower", kind="deterministic", of="perplexity"),
        _metric("quality.nll", unit="nat/token", better="lower", kind="deterministic", of="loss"),
        _metric("quality.accuracy", unit="fraction", better="higher", kind="sampled", of="tasks", rel=0.02),
        _metric("rag.f1", unit="fraction", better="higher", kind="sampled", of="rag", rel=0.05),
    )
}


def healthy_row(metric: str = "efficiency.decode_ms", **facts: object) -> Row:
    """A row of one of HEALTHY_METRICS; `ratio` follows from `value` and `base_value` where it is not given."""
    known = HEALTHY_METRICS[metric]
    facts = {
        "run": "run-1",
        "base": "reference",
        "recipe": "nf4",
        "device": FINGERPRINT,
        "metric": metric,
        "value": 2.0,
        "unit": known.unit,
        "better": known.better,
        "of": known.of,
        "seed": 0,
    } | facts
    if facts.get("base_value"):
        facts.setdefault("ratio", facts["value"] / facts["base_value"])
    return Row(**facts)


def timed_row(
    metric: str = "efficiency.decode_ms", *, own: float = 2.1, base: float = 2.3, noise: float = 0.01, seed: int = 0
) -> Row:
    """Ten samples a side, scattered by `noise` (a share, standard deviation); the values are their medians."""
    numbers = random.Random(seed)
    samples, base_samples = (tuple(centre * numbers.gauss(1, noise) for _ in range(10)) for centre in (own, base))
    return healthy_row(
        metric,
        value=median(samples),
        base_value=median(base_samples),
        samples=samples,
        base_samples=base_samples,
        params={"batch": 1, "mode": "eager", "new_tokens": 128},
    )


def healthy_rows(*, noise: float = 0.01, seed: int = 0) -> list[Row]:
    """One run of nf4, all as it should be."""
    return [
        timed_row(noise=noise, seed=seed),
        timed_row("efficiency.throughput", own=476.0, base=435.0, noise=noise, seed=seed + 1),
        healthy_row("efficiency.peak_mb", value=61.0, base_value=80.0),
        healthy_row("efficiency.stored_bytes", value=15_728_640.0, base_value=50_331_648.0),
        healthy_row("efficiency.layers", value=56.0),
        healthy_row("quality.perplexity", value=13.02, base_value=12.79, params={"length": 512, "samples": 100}),
        item_row("quality.nll", LOSSES),
        item_row("quality.accuracy", ANSWERS),
        healthy_row("rag.f1", value=0.71, base_value=0.73, params={"k": 3}),
    ]


def item_row(metric: str, items: Items) -> Row:
    """A row that is the mean of its items."""
    return healthy_row(metric, value=items.mean, items=items)


def _results(kind: str, count: int) -> Items:
    numbers = random.Random(kind)
    values = [numbers.random() < 0.75 if kind == "binary" else numbers.gammavariate(4, 0.25) for _ in range(count)]
    return Items(hashes_of([kind, number] for number in range(count)), values, kind)


ANSWERS, LOSSES = _results("binary", 2000), _results("real", 100)


CONTEXT = {"base_hash": "b1", "data_hash": "d1", "seed": 0, "torch": "2.13.0", "commit": "abc"}
OTHER_MACHINE = "cpu-other-64t"
ELSEWHERE = CONTEXT | {"torch": "2.14.0"}  # where what is deterministic is no longer compared exactly

positive = st.floats(1e-3, 1e9)
texts = st.text(min_size=1, max_size=5)
numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text("abz_", max_size=3).map("n{}".format)
parameters = st.dictionaries(names, texts | st.integers() | numbers | st.booleans(), max_size=3)
notes = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=3,
)


@st.composite
def items(draw, *, kind=None, most=40):
    """Results per item, of either kind."""
    kind = kind or draw(st.sampled_from(KINDS))
    hashes = hashes_of(draw(st.lists(texts, min_size=(size := draw(st.integers(1, most))), max_size=size)))
    value = st.sampled_from([0.0, 1.0]) if kind == "binary" else st.floats(-1e6, 1e6, width=32)
    return Items(hashes, draw(st.lists(value, min_size=size, max_size=size)), kind)


@st.composite
def rows(draw):
    """Any row that may be."""
    status = draw(st.sampled_from(STATUSES))
    value = draw(numbers) if status in MEASURED else None
    base_value = draw(st.none() | numbers)
    ratio = value / base_value if value is not None and base_value else None
    samples = st.lists(numbers, max_size=6).map(tuple)
    text = draw(texts)
    return Row(
        **{name: text + name for name in ("run", "base", "recipe", "device", "unit", "of")},
        metric=f"{draw(names)}.{draw(names)}",
        value=value,
        better=draw(st.sampled_from(["lower", "higher", "neither"])),
        ratio=ratio if ratio is not None and math.isfinite(ratio) and draw(st.booleans()) else None,
        base_value=base_value,
        samples=draw(samples),
        base_samples=draw(samples),
        params=draw(parameters),
        seed=draw(st.integers(0, 2**63)),
        status=status,
        reason=draw(texts if status != "ok" else st.none() | texts),
        source=draw(notes),
        items=draw(st.none() | items()),
        compute_dtype=draw(st.none() | texts),
        paired=draw(st.none() | st.dictionaries(names, numbers, max_size=2)),
    )


def recorded(rows: list[Row], *, context=CONTEXT, metrics=HEALTHY_METRICS, fingerprint=FINGERPRINT) -> Baseline:
    """The baseline that these rows make, without a file."""
    sections: dict[str, Section] = {}
    for row in rows:
        metric = metrics[row.metric]
        section = sections.setdefault(
            fingerprint if metric.per_device else ANYWHERE,
            Section(context=context | {"fingerprint": fingerprint, "seed": row.seed}, rows={}),
        )
        section.rows[row.key] = Entry.of_row(row, metric, context, fingerprint)
    return Baseline(base=rows[0].base, recipe=rows[0].recipe, sections=sections)


def judged(
    row: Row, before: Row | Baseline | None, *, mode="auto", context=CONTEXT, metrics=HEALTHY_METRICS
) -> Verdict:
    baseline = recorded([before], metrics=metrics) if isinstance(before, Row) else before
    return judge(row, baseline, mode=mode, fingerprint=row.device, context=context, metrics=metrics)


def gated(rows: list[Row], before: list[Row], *, mode="auto", context=CONTEXT) -> list[Verdict]:
    return verdicts(
        rows,
        {"nf4": recorded(before)},
        mode=mode,
        fingerprint=FINGERPRINT,
        context=context,
        metrics=HEALTHY_METRICS,
    )


@st.composite
def metrics_and_rows(draw):
    """A metric of any kind and direction, and a row of it."""
    kind = draw(st.sampled_from(["timing", "memory", "counted", "deterministic", "sampled"]))
    timed = kind in ("timing", "memory")
    metric = Metric(
        name="group.name",
        unit="u",
        better=draw(st.sampled_from(["lower", "higher", "neither"])),
        kind=kind,
        of="thing",
        rel=draw(st.floats(0, 0.5)),
        rel_absolute=draw(st.none() | st.floats(0, 0.5)) if timed else None,
        floor=draw(st.sampled_from([0.0, 1e-7])),
        function=float,
    )
    value, base_value = draw(positive), draw(st.none() | positive)
    samples = st.lists(positive, max_size=8).map(tuple)
    status = draw(st.sampled_from(["ok", "estimated"]))
    row = Row(
        run="r",
        base="reference",
        recipe="rtn(bits=4)",
        device=FINGERPRINT,
        metric=metric.name,
        value=value,
        unit=metric.unit,
        better=metric.better,
        ratio=value / base_value if base_value and draw(st.booleans()) else None,
        base_value=base_value,
        samples=draw(samples) if timed else (),
        base_samples=draw(samples) if timed else (),
        params=draw(st.dictionaries(st.sampled_from(["k", "batch"]), st.integers() | st.text(max_size=3), max_size=2)),
        seed=draw(st.integers(0, 3)),
        status=status,
        reason=None if status == "ok" else "the paper's formula",
        of=metric.of,
    )
    return metric, row
