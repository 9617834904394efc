"""Cost of a piece of work: seconds and peak memory."""

import ctypes
import gc
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from compression import devices
from compression.files.strict_json import exact_fields, finite_field, whole_field

_STATUS = "/proc/self/status"
_POLL_SECONDS = 0.005
_COUNTS = ("calibration_tokens", "trained_tokens", "trained_parameters")


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process on Linux, elsewhere its resident memory; None without psutil.

    On Linux memory-mapped files are left out: they can be dropped at any time and would count weights nobody reads.
    """
    try:
        with open(_STATUS) as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Free what can be freed, and give it back to the system: what is kept would be used again unseen."""
    gc.collect()
    trim()


def trim() -> None:
    """Give what is free back to the system where the C library can: glibc keeps what lies below memory in use."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What compressing took.

    Attributes:
        seconds: wall time, loading of the base not counted. Block by block into a folder, reading and writing are, and
            of interrupted runs what they finished.
        peak_bytes: how far memory rose above where it stood at the start (allocator on CUDA, anonymous resident memory
            on Linux), or None where the system does not tell. Block by block, the weights of the base are in it.
        calibration_tokens: tokens of calibration text that were read.
        trained_tokens: tokens that training read, in all epochs.
        trained_parameters: the most weights that a step trained.
    """

    seconds: float
    peak_bytes: int | None
    calibration_tokens: int = 0
    trained_tokens: int = 0
    trained_parameters: int = 0

    @classmethod
    def from_json(cls, table: Any) -> Self:
        """The inverse of `dataclasses.asdict`; raises ValueError."""
        fields = exact_fields(table, {"seconds", "peak_bytes"}, frozenset(_COUNTS))
        peak = None if fields["peak_bytes"] is None else whole_field(fields, "peak_bytes", 0, 2**63)
        counts = {name: whole_field(fields, name, 0, 2**63) for name in _COUNTS if name in fields}
        return cls(seconds=finite_field("seconds", fields["seconds"]), peak_bytes=peak, **counts)

    def then(self, later: "Cost") -> "Cost":
        """Of two pieces of work, one after the other; the tokens are those of the later."""
        peaks = (self.peak_bytes, later.peak_bytes)
        return Cost(
            seconds=self.seconds + later.seconds, peak_bytes=None if None in peaks else max(peaks),  # type: ignore[type-var]
            calibration_tokens=later.calibration_tokens,
        )  # fmt: skip


class CostMeter:
    """Context manager; `cost(tokens)` is that of all of it after it has ended, before that the cost so far.

    On CUDA memory is what the allocator of that device gave out; the device is settled first, see `_devices.settle`.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device

    def __enter__(self) -> Self:
        give_back()
        if self._cuda:
            import torch

            devices.settle(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = self._start = self._now()
        self._seconds: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        self._began = self._lap = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait()
        self._seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self._observe()

    def cost(self, calibration_tokens: int = 0) -> Cost:
        if self._seconds is None:
            self._wait()
            self._observe()
        peak = None if self._start is None or self._peak is None else max(0, self._peak - self._start)
        seconds = time.perf_counter() - self._began if self._seconds is None else self._seconds
        return Cost(seconds=seconds, peak_bytes=peak, calibration_tokens=calibration_tokens)

    def lap(self) -> float:
        """Seconds since the last call, of the first one since the beginning."""
        self._wait()
        since, self._lap = self._lap, time.perf_counter()
        return self._lap - since

    def _wait(self) -> None:
        """Until the device has done what it was given: kernels run on after the call that started them."""
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._device)

    def _now(self) -> int | None:
        if self._cuda:
            import torch

            return torch.cuda.memory_allocated(self._device)
        return anonymous_bytes()

    def _observe(self) -> None:
        if self._cuda:
            import torch

            self._peak = torch.cuda.max_memory_allocated(self._device)
        elif self._peak is not None:
            self._peak = max(self._peak, anonymous_bytes() or 0)

    def _poll(self) -> None:
        while not self._cuda and not self._stop.wait(_POLL_SECONDS):
            self._observe()
