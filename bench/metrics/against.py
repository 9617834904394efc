"""How fast this code generates beside that of a commit (`--against`), both now and in turn.

Value and samples are those of this code, those of the base are the commit's. The gate compares the two with each other,
and with no baseline.
"""

import functools
from statistics import median

from bench.metrics import speed
from bench.metrics._registry import metric

# share that processes with equal code may differ by: they were seen to by 0.3 % (standard deviation)
_against = functools.partial(metric, better="lower", kind="timing", of="against", rel=0.01)


@_against("against.decode_ms", unit="ms/token")
def decode_ms(run: speed.GenerationReading) -> float:
    """The middle decode step of a round, not the mean: what takes the processor away hits some steps of each.

    A cost that falls on few steps is seen by `against.latency_ms`.
    """
    return run.median(lambda r: 1e3 * median(r.steps_s))


@_against("against.latency_ms", unit="ms/token")
def latency_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.latency_ms`."""
    return speed.latency_ms(run)


@_against("against.prefill_ms", unit="ms", floor=0.02)
def prefill_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.prefill_ms`."""
    return speed.prefill_ms(run)


@_against("against.ttft_ms", unit="ms", floor=0.02)
def ttft_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.ttft_ms`."""
    return speed.ttft_ms(run)
