"""Energy per generated token: read from a hardware counter where there is one, else the paper's estimate, marked.

Sources, best first: on CUDA the GPU's energy counter (`nvml_counter`), then its power sampled and integrated
(`nvml_power`); on a CPU the package counters of RAPL (`rapl`); else (TDP - idle) x time with idle = 0.3 TDP (`tdp`, as
paper [E] defines it). A counter measures the whole GPU or package, its idle power and other tenants included; the
estimate leaves idle power out. A source that fails, or that stands still over the window, is named in the note.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from bench.errors import BenchError, MetricError, OptionError
from bench.machine import device as machine
from bench.metrics.registry import metric

SECONDS, WINDOWS = 5.0, 5  # of one side: its windows together, and how many they are
IDLE_SHARE = 0.3  # of the TDP, as paper [E] assumes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """Joules that the device took for `tokens` generated tokens over `seconds`, in one window or the sum of several."""

    joules: float
    seconds: float
    tokens: int
    source: str  # nvml_counter, nvml_power, rapl or tdp
    estimated: bool
    note: str
    windows: tuple["EnergyReading", ...] = ()

    def each(self) -> "tuple[EnergyReading, ...]":
        """The readings of its windows."""
        return self.windows or (self,)

    def __post_init__(self) -> None:
        for name in ("joules", "seconds", "tokens"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise MetricError(f"energy from {self.source}: {name} must be finite and above 0, not {value!r}")


class Reader(Protocol):
    """A source of energy: `read_joules` never decreases, and only differences between two readings mean anything."""

    source: str

    def read_joules(self) -> float:
        """Joules up to now; BenchError if the source does not answer."""

    def close(self) -> None:
        """Ends what the source keeps running."""


class NvmlCounter:
    """The energy counter of a GPU (Volta and later; many virtual GPUs do not have it)."""

    source = "nvml_counter"

    def __init__(self, device: str) -> None:
        self._nvml = machine.Nvml(device)
        self._nvml.joules()

    def read_joules(self) -> float:
        """Joules since the driver was loaded."""
        return self._nvml.joules()

    def close(self) -> None:
        """Nothing runs."""


class SampledPower:
    """Power sampled by a thread and integrated by the trapezoid rule; spikes between two samples are lost."""

    source = "nvml_power"

    def __init__(
        self, watts: Callable[[], float], *, period: float = 0.05, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._watts, self._clock = watts, clock
        self._joules, self._last = 0.0, (clock(), watts())
        self._lock, self._end = threading.Lock(), threading.Event()
        self._failure: BenchError | None = None
        self._thread = threading.Thread(target=self._run, args=(period,), daemon=True)
        self._thread.start()

    def _run(self, period: float) -> None:
        while not self._end.wait(period):
            try:
                self.read_joules()
            except BenchError as error:
                self._failure = error
                return

    def read_joules(self) -> float:
        """Joules since this object was made; takes one more sample."""
        with self._lock:
            if self._failure:
                raise self._failure
            then, before = self._last
            self._last = now, watts = self._clock(), self._watts()
            self._joules += (now - then) * (before + watts) / 2
            return self._joules

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join()


class Rapl:
    """The energy counters of all CPU packages (Linux powercap), in microjoules.

    Only `package-<n>` domains: `core` and `dram` lie inside or beside them, and a package that a second interface
    shows again counts once. A counter that has turned over is set right, once per reading: at 200 W the shortest
    known one turns in 5 minutes.
    """

    source = "rapl"

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        packages: dict[str, tuple[Path, int]] = {}
        try:
            for folder in sorted(root.glob("*:*")):
                name = (folder / "name").read_text().strip()
                if name.startswith("package-") and name not in packages:
                    packages[name] = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError) as error:
            raise BenchError(f"RAPL: {error}") from error
        if not packages:
            raise BenchError(f"RAPL: no package counter under {root}")
        self._packages = tuple(packages.values())
        self._last = self._read()
        self._joules = 0.0

    def _read(self) -> list[int]:
        try:
            return [int(path.read_text()) for path, _ in self._packages]
        except PermissionError as error:
            raise BenchError(
                f"RAPL: {error.filename} is readable by root only; make it readable with chmod a+r"
            ) from error
        except (OSError, ValueError) as error:
            raise BenchError(f"RAPL: {error}") from error

    def read_joules(self) -> float:
        """Joules of all packages since this object was made."""
        now = self._read()
        turned = zip(now, self._last, self._packages, strict=True)
        self._joules += sum((new - old) % (largest + 1) for new, old, (_, largest) in turned) / 1e6
        self._last = now
        return self._joules

    def close(self) -> None:
        """Nothing runs."""


def readers_of(device: str) -> tuple[Callable[[], Reader], ...]:
    """What could measure this device, best first; a GPU's energy is not in the CPU's counters, nor the reverse."""
    if machine.device_of(device).type == "cuda":
        return (lambda: NvmlCounter(device), lambda: SampledPower(machine.Nvml(device).watts))
    return (Rapl,)


def measure_energy(
    work: Callable[[], int],
    *,
    device: str,
    min_seconds: float = 5.0,
    tdp: float | None = None,
    readers: Sequence[Callable[[], Reader]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> EnergyReading:
    """Energy of repeating `work`, which returns the number of tokens it generated, for at least `min_seconds`.

    All sources are read over the same window, with the device synchronised at both ends, and the best that advanced is
    taken; `tdp` (watts) is for the estimate, and is detected if not given. The window holds `work` alone: warm up, and
    make what it needs, before.

    Raises OptionError for a window that is not above 0, MetricError if `work` says it generated nothing.
    """
    if not (math.isfinite(min_seconds) and min_seconds > 0):
        raise OptionError(
            f"min_seconds must be finite and above 0, not {min_seconds!r}; use 5 or more for a reliable reading"
        )
    notes: list[str] = []
    readings: dict[Reader, list[float]] = {}

    def read() -> None:
        for reader in tuple(readings):
            try:
                readings[reader].append(reader.read_joules())
            except BenchError as error:
                notes.append(str(error))
                del readings[reader]

    with ExitStack() as stack:
        for opened in readers if readers is not None else readers_of(device):
            try:
                readings[stack.enter_context(closing(opened()))] = []
            except BenchError as error:
                notes.append(str(error))
        tokens, seconds = 0, 0.0
        machine.synchronize(device)
        start = clock()
        read()
        while seconds < min_seconds:
            made = work()
            if made < 1:
                raise MetricError(f"one unit of work must generate at least 1 token, not {made!r}")
            tokens += made
            machine.synchronize(device)
            seconds = clock() - start
            read()

    for reader, (first, *_, last) in readings.items():
        if last > first:
            note = "; ".join(["whole device, idle power included", *notes])
            return EnergyReading(
                joules=last - first, seconds=seconds, tokens=tokens, source=reader.source, estimated=False, note=note
            )
        notes.append(f"{reader.source} did not advance in {seconds:.1f} s")
    return _estimated(machine.tdp(device, tdp), seconds, tokens, notes)


def _estimated(power: machine.Power, seconds: float, tokens: int, notes: Sequence[str]) -> EnergyReading:
    note = "; ".join([f"(TDP - idle) x time, idle {IDLE_SHARE:g} TDP, TDP {power.note} ({power.source})", *notes])
    joules = (1 - IDLE_SHARE) * power.watts * seconds
    return EnergyReading(joules=joules, seconds=seconds, tokens=tokens, source="tdp", estimated=True, note=note)


def measure_in_turn(
    works: Sequence[Callable[[], int]],
    *,
    device: str,
    min_seconds: float = SECONDS,
    windows: int = WINDOWS,
    **options: Any,
) -> tuple[EnergyReading, ...]:
    """One reading of each of `works`, whose windows alternate (A B A B ...), so that drift of the machine falls on all.

    Each gets equally many windows of at least `min_seconds / windows`, until each has `min_seconds` in all: a unit of
    work that takes longer than that is done once. The options are those of `measure_energy`.
    """
    taken: list[list[EnergyReading]] = [[] for _ in works]
    while any(sum(window.seconds for window in side) < min_seconds for side in taken):
        for side, work in zip(taken, works, strict=True):
            side.append(measure_energy(work, device=device, min_seconds=min_seconds / windows, **options))
    return tuple(map(_sum, taken))


def _sum(windows: Sequence[EnergyReading]) -> EnergyReading:
    return EnergyReading(
        joules=sum(window.joules for window in windows),
        seconds=sum(window.seconds for window in windows),
        tokens=sum(window.tokens for window in windows),
        source=" and ".join(dict.fromkeys(window.source for window in windows)),
        estimated=any(window.estimated for window in windows),
        note="; ".join(dict.fromkeys(window.note for window in windows)),
        windows=tuple(windows),
    )


@metric(
    "efficiency.energy_mj_per_token",
    unit="mJ/token",
    better="lower",
    kind="timing",
    of="energy",
    rel=0.25,
    rel_absolute=0.5,
    floor=0.0,
)
def energy_mj_per_token(energy: EnergyReading) -> float:
    """Energy per generated token: median over the windows.

    1000 joules / tokens of each, prompts included in the joules. Paper [E], table of FP16 against NF4 on a T4 (70 W):
    62.48 and 84.14 ms per token give 3061.60 and 4122.85 mJ by the estimate, to its rounding of the times.

    >>> t4 = {"source": "tdp", "estimated": True, "note": "", "seconds": 62.48}
    >>> round(energy_mj_per_token(EnergyReading(joules=0.7 * 70 * 62.48, tokens=1000, **t4)), 1)
    3061.5
    """
    return median(1000 * window.joules / window.tokens for window in energy.each())
