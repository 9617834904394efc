"""How an engine serves requests that come at a rate. The requests of all rounds are the sample, each counted once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.measure.engines.traffic import TrafficRound
from bench.metrics.registry import metric

ENOUGH = 100  # requests, from which on the 99th percentile is not the slowest of all


@dataclass(frozen=True, kw_only=True)
class TrafficReading:
    """Rounds of requests to one model."""

    rounds: tuple[TrafficRound, ...]

    def each(self) -> "list[TrafficReading]":
        """One reading per round."""
        return [TrafficReading(rounds=(each,)) for each in self.rounds]

    @property
    def remark(self) -> str:
        """How many requests there were, and what that makes of the 99th percentile."""
        count = sum(len(each.ttft_s) for each in self.rounds)
        few = f"; the 99th percentile of fewer than {ENOUGH} is the slowest" if count < ENOUGH else ""
        return f"{count} requests in {len(self.rounds)} rounds{few}"

    def percentile(self, of: Callable[[TrafficRound], tuple[float, ...]], share: float) -> float:
        """Of the requests of all rounds, the least value that so large a share of them does not exceed."""
        values = sorted(value for each in self.rounds for value in of(each))
        return values[math.ceil(share * len(values)) - 1]


@metric("efficiency.rate_throughput", unit="tokens/s", better="higher", kind="timing", of="traffic",
        rel=0.05, rel_absolute=0.35, floor=0.1, share=1.0)  # fmt: skip
def rate_throughput(reading: TrafficReading) -> float:
    """Generated tokens per second from the first arrival to the last token, at a request rate: median of the rounds."""
    return median(each.tokens / each.total_s for each in reading.rounds)


@metric("efficiency.rate_ttft_ms", unit="ms", better="lower", kind="timing", of="traffic",
        rel=0.1, rel_absolute=0.5, floor=1.0, share=1.0)  # fmt: skip
def rate_ttft_ms(reading: TrafficReading) -> float:
    """Time to first token at a request rate, from arrival, waiting included: median of the requests."""
    return 1e3 * reading.percentile(lambda each: each.ttft_s, 0.5)


@metric("efficiency.rate_ttft_p99_ms", unit="ms", better="lower", kind="timing", of="traffic",
        rel=0.2, rel_absolute=0.5, floor=1.0, share=1.0)  # fmt: skip
def rate_ttft_p99_ms(reading: TrafficReading) -> float:
    """Time to first token at a request rate, from arrival, waiting included: 99th percentile of the requests."""
    return 1e3 * reading.percentile(lambda each: each.ttft_s, 0.99)


@metric("efficiency.rate_step_ms", unit="ms/token", better="lower", kind="timing", of="traffic",
        rel=0.1, rel_absolute=0.5, floor=0.03, share=1.0)  # fmt: skip
def rate_step_ms(reading: TrafficReading) -> float:
    """Inter-token latency at a request rate, the mean within a request: median of the requests."""
    return 1e3 * reading.percentile(lambda each: each.steps_s, 0.5)


@metric("efficiency.rate_step_p99_ms", unit="ms/token", better="lower", kind="timing", of="traffic",
        rel=0.2, rel_absolute=0.5, floor=0.03, share=1.0)  # fmt: skip
def rate_step_p99_ms(reading: TrafficReading) -> float:
    """Inter-token latency at a request rate, the mean within a request: 99th percentile of the requests."""
    return 1e3 * reading.percentile(lambda each: each.steps_s, 0.99)
