"""How fast a model generates. Every figure is the median over the rounds of one load.

The papers take the mean over 10 runs; the median of the same rounds is what one slow round cannot move. The rounds
themselves are in the journal.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from bench.errors import NotAvailable
from bench.measure.generation import Interleaved, Load, Round
from bench.metrics.compute import generation_flops
from bench.metrics.registry import metric


@dataclass(frozen=True, kw_only=True)
class GenerationReading:
    """Rounds of one model under one load.

    Attributes:
        flops: of one whole generation (prefill and decode steps, over the batch).
        peak_flops_per_s: of the device in the dtype of the model.
        base: the reading of the uncompressed model, taken in turn with this one; None for that model itself.
    """

    rounds: tuple[Round, ...]
    flops: int
    peak_flops_per_s: float
    base: "GenerationReading | None" = field(default=None, repr=False)

    def each(self) -> "list[GenerationReading]":
        """One reading per round, paired with the round of the base that was run beside it."""
        bases = self.base.each() if self.base else [None] * len(self.rounds)
        return [
            GenerationReading(rounds=(r,), flops=self.flops, peak_flops_per_s=self.peak_flops_per_s, base=b)
            for r, b in zip(self.rounds, bases, strict=True)
        ]

    def running(self) -> "GenerationReading":
        """Its own rounds without what they waited for a processor (`Round.running`)."""
        return replace(self, rounds=tuple(each.running() for each in self.rounds))

    def median(self, of: Callable[[Round], float]) -> float:
        return median(map(of, self.rounds))


def readings(
    pair: Interleaved, load: Load, *, warmup: int, peak_flops_per_s: float
) -> tuple[GenerationReading, GenerationReading | None]:
    """The reading of the compressed model and that of its base, of the rounds after `warmup`; the base alone has none.

    Each has the operations of its own model: a cut one does less.
    """
    *base, own = (
        GenerationReading(rounds=tuple(rounds[warmup:]), flops=generation_flops(decoder.model, load),
                          peak_flops_per_s=peak_flops_per_s)
        for decoder, rounds in zip(pair.decoders, pair.rounds, strict=True)
    )  # fmt: skip
    return (replace(own, base=base[0]), base[0]) if base else (own, None)


@metric("efficiency.latency_ms", unit="ms/token", better="lower", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.5, floor=0.03)  # fmt: skip
def latency_ms(run: GenerationReading) -> float:
    """Time per generated token and sequence, prompt included: total time / new tokens ([E] table 1)."""
    return run.median(lambda r: 1e3 * r.total_s / (len(r.steps_s) + 1))


@metric("efficiency.ttft_ms", unit="ms", better="lower", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.5, floor=1.0)  # fmt: skip
def ttft_ms(run: GenerationReading) -> float:
    """Time to first token: prompt submitted to first token out, the set-up of the cache included ([E] table 1)."""
    return run.median(lambda r: 1e3 * r.ttft_s)


@metric("efficiency.prefill_ms", unit="ms", better="lower", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.5, floor=1.0)  # fmt: skip
def prefill_ms(run: GenerationReading) -> float:
    """Processing of the prompt alone ([E] table 1)."""
    times = [each.prefill_s for each in run.rounds if each.prefill_s is not None]
    if not times:
        raise NotAvailable("an engine does not tell the prompt's time from that of the first token")
    return 1e3 * median(times)


@metric("efficiency.decode_ms", unit="ms/token", better="lower", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.5, floor=0.03)  # fmt: skip
def decode_ms(run: GenerationReading) -> float:
    """One autoregressive step, stamped by itself and never computed as a difference: mean within a round."""
    return run.median(lambda r: 1e3 * sum(r.steps_s) / len(r.steps_s))


@metric("efficiency.throughput", unit="tokens/s", better="higher", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.35, floor=0.1)  # fmt: skip
def throughput(run: GenerationReading) -> float:
    """Generated tokens per second over the batch, prompt processing included ([E] table 1)."""
    return run.median(lambda r: r.tokens / r.total_s)


@metric("efficiency.speedup", unit="x", better="higher", kind="timing", of="generation",
        rel=0.2, rel_absolute=0.2, floor=0.02, share=1.0)  # fmt: skip
def speedup(run: GenerationReading) -> float:
    """Latency of the uncompressed model / latency, both measured in turn ([E] table 2); 1 for that model itself."""
    return latency_ms(run.base) / latency_ms(run) if run.base else 1.0


@metric("efficiency.mfu", unit="%", better="higher", kind="timing", of="generation",
        rel=0.05, rel_absolute=0.5, floor=0.01)  # fmt: skip
def mfu(run: GenerationReading) -> float:
    """Model FLOPs utilisation: FLOPs of a generation / (its time * peak FLOP/s of the device) ([E] table 1)."""
    return 100 * run.median(lambda r: run.flops / r.total_s / run.peak_flops_per_s)


@metric("efficiency.kv_cache_mb", unit="MiB", better="lower", kind="counted", of="generation")
def kv_cache_mb(run: GenerationReading) -> float:
    """Keys and values in the cache after the run, from its own tensors: 2 * layers * KV heads * head size * tokens."""
    found = run.rounds[-1].kv_bytes
    if found is None:
        raise NotAvailable("an engine does not tell what of its memory the keys and values of a sequence take")
    return found / 2**20
