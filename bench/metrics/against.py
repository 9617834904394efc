"""Speed of this code against a commit (`--against`), in alternating rounds.

Value and samples are those of this code, those of the base are the commit's. The gate compares the two with each other,
and with no baseline. On CPU, with one thread and where the system tells, times are without what that thread waited for
a processor which another had (`Round.waits_s`); but for the latency, which holds it, since a method that starts threads
beside its own takes processors from itself.
"""

import functools
from statistics import fmean, median

from bench.metrics import speed
from bench.metrics.registry import metric

# share that processes with equal code may differ by: they were seen to by 0.3 % (standard deviation)
_against = functools.partial(metric, better="lower", kind="timing", of="against", rel=0.01)


@_against("against.decode_ms", unit="ms/token")
def decode_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.decode_ms`, without waits; where no waits are told, the middle step of a round, not the mean.

    What takes the processor away hits some steps of each round, and would be most of a mean that holds it.
    """
    return run.median(lambda r: 1e3 * (fmean(r.running().steps_s) if r.waits_s else median(r.steps_s)))


@_against("against.latency_ms", unit="ms/token")
def latency_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.latency_ms`."""
    return speed.latency_ms(run)


@_against("against.prefill_ms", unit="ms", floor=0.02)
def prefill_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.prefill_ms`, without waits."""
    return speed.prefill_ms(run.running())


@_against("against.ttft_ms", unit="ms", floor=0.02)
def ttft_ms(run: speed.GenerationReading) -> float:
    """As `efficiency.ttft_ms`, without waits."""
    return speed.ttft_ms(run.running())
