"""Peak memory during generation, counting only the measured model.

CUDA: the peak of the allocator in this process, less what other models hold there. CPU: a fresh child process holds
the model alone; its peak anonymous resident memory while generating, less what it held before the model was loaded,
so that interpreter and libraries are left out.
"""

from typing import TYPE_CHECKING

from bench.errors import MetricError
from bench.measure.memory import MemoryReading
from bench.metrics.registry import metric

if TYPE_CHECKING:
    pass


@metric(
    "efficiency.peak_memory_mb",
    unit="MiB",
    better="lower",
    kind="memory",
    of="memory",
    rel=0.05,
    rel_absolute=0.10,
    floor=1.0,
)
def peak_memory_mb(memory: MemoryReading) -> float:
    """Peak memory while generating.

    peak bytes / 2^20: the papers' MB are MiB. Paper [E], tables of efficiency, prints 7010 for weights of 13.49 GiB:
    one of several devices was read.

    >>> peak_memory_mb(MemoryReading(peak_bytes=3 * 2**20, model_bytes=2**21, stored_bytes=2**21, source=""))
    3.0
    """
    return memory.peak_bytes / 2**20


@metric(
    "efficiency.memory_efficiency",
    unit="fraction",
    better="higher",
    kind="memory",
    of="memory",
    rel=0.05,
    rel_absolute=0.10,
    floor=0.01,
)
def memory_efficiency(memory: MemoryReading) -> float:
    """Share of the peak that the stored model accounts for.

    stored bytes / peak bytes (paper [E], tables of efficiency); the rest is cache, activations and what a kernel
    unpacks. It is at most 1, and MetricError above: the paper's comes from a peak below the weights.

    >>> memory_efficiency(MemoryReading(peak_bytes=4 * 2**20, model_bytes=2**21, stored_bytes=3 * 2**20, source=""))
    0.75
    """
    if memory.stored_bytes > memory.peak_bytes:
        raise MetricError(
            f"stored bytes {memory.stored_bytes} are more than the peak of {memory.peak_bytes} ({memory.source}): the "
            "model was not entirely in this memory, or is stored in a wider dtype than it is loaded; measure on "
            "one device"
        )
    return memory.stored_bytes / memory.peak_bytes
