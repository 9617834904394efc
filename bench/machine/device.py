"""The device: its fingerprint, peak speed, power draw and memory.

A device that no data sheet in `PEAKS` describes is measured; a power that nobody states is assumed; `source` says so.
"""

import dataclasses
import functools
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, OptionError
from bench.machine.data_sheets import CPU_POWER, PEAKS, find_cpu, find_gpu, words_of

if TYPE_CHECKING:
    import torch

_MEASURED_DTYPES = ("float32", "float16", "bfloat16")
_MEASURE_SECONDS = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """Watts that a device may draw; `source` is option, nvml, table or assumed, and `note` says what it rests on."""

    watts: float
    source: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """Operations per second at best; `source` is table or measured, and `note` says what it rests on."""

    flops_per_s: float
    source: str
    note: str


def device_of(device: str) -> "torch.device":
    """`cpu`, `cuda` or `cuda:<n>` as a torch device with its index; OptionError for any other or an absent one."""
    import torch

    if device == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise OptionError(f"device must be cpu, cuda or cuda:<n>, not {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise OptionError(f"device={device!r}: torch {torch.__version__} finds no CUDA device here; use device='cpu'")
    index = int(device.partition(":")[2] or torch.cuda.current_device())
    if index >= count:
        raise OptionError(
            f"device={device!r} does not exist; available: {', '.join(f'cuda:{i}' for i in range(count))}"
        )
    return torch.device("cuda", index)


def synchronize(device: str) -> None:
    """Waits until the device has done all that was asked of it; nothing to wait for on a CPU."""
    if device_of(device).type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class Nvml:
    """What the driver tells of one GPU, through nvidia-ml-py; BenchError with the reason where it does not tell."""

    def __init__(self, device: str) -> None:
        import torch

        try:
            import pynvml
        except ImportError as error:
            raise BenchError("NVML is not available: nvidia-ml-py is missing; pip install nvidia-ml-py") from error
        self._api, self._device = pynvml, device
        uuid = f"GPU-{torch.cuda.get_device_properties(device_of(device)).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise BenchError(f"NVML does not open {device} ({uuid}): {error}") from error

    def _ask(self, question: str, *arguments: int) -> float:
        try:
            return float(getattr(self._api, question)(self._handle, *arguments))
        except self._api.NVMLError as error:
            raise BenchError(f"NVML does not answer {question} for {self._device}: {error}") from error

    def joules(self) -> float:
        """Energy since the driver was loaded (Volta and later)."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption") / 1000

    def watts(self) -> float:
        """Power now; on Ampere and later the mean of about the last second."""
        return self._ask("nvmlDeviceGetPowerUsage") / 1000

    def limit_watts(self) -> float:
        """The power limit that is enforced."""
        return self._ask("nvmlDeviceGetEnforcedPowerLimit") / 1000

    def describe(self) -> dict[str, Any]:
        """Driver, power limit and clocks (MHz); a question that the driver does not answer is None."""
        questions = {
            "power_limit_watts": self.limit_watts,
            "sm_clock_mhz": lambda: self._ask("nvmlDeviceGetClockInfo", self._api.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda: self._ask("nvmlDeviceGetMaxClockInfo", self._api.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: self._ask("nvmlDeviceGetClockInfo", self._api.NVML_CLOCK_MEM),
        }
        facts: dict[str, Any] = {"driver": self._api.nvmlSystemGetDriverVersion()}
        for name, question in questions.items():
            try:
                facts[name] = question()
            except BenchError:
                facts[name] = None
        return facts


@functools.cache
def _cpu_facts() -> Mapping[str, str]:
    """`vendor_id`, `model name`, `cpu family`, `model` and the like, as far as this system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = (line.partition(":") for line in info.read_text().partition("\n\n")[0].splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
    elif sys.platform == "darwin":
        import subprocess

        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        facts = {"model name": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()}
    else:
        facts = {}
    return facts | {"model name": facts.get("model name") or platform.processor() or platform.machine()}


def fingerprint(device: str) -> str:
    """A short name of the device for files and baselines: the same on every run of one host.

    CPU: model, family and model number, vector instructions, threads torch uses (`cpu-amd-epyc-f25m1-avx2-2t`).
    CUDA: the driver's name of it, in which a MIG slice is named, and its memory (`cuda-tesla-t4-15gib`).
    """
    import torch

    found = device_of(device)
    if found.type == "cuda":
        facts = torch.cuda.get_device_properties(found)
        words = ["cuda", *words_of(facts.name)]
        if not any(re.fullmatch(r"\d+gb", word) for word in words):
            words.append(f"{round(facts.total_memory / 2**30)}gib")
        return "-".join(words)
    facts = _cpu_facts()
    name = re.sub(r"@.*|\d+-core|\b(cpu|processor)\b|\+", " ", facts["model name"].lower())
    words = ["cpu", *words_of(name)]
    if "cpu family" in facts:
        words.append(f"f{facts['cpu family']}m{facts['model']}")
    elif "CPU part" in facts:
        words.append(f"i{facts['CPU implementer']}p{facts['CPU part']}")
    return "-".join([*words, *words_of(torch.backends.cpu.get_cpu_capability()), f"{torch.get_num_threads()}t"])


def describe(device: str) -> dict[str, Any]:
    """All that is known of the device and of what runs on it, ready for JSON."""
    import importlib.metadata

    import psutil
    import torch

    packages = {}
    for name in ("torch", "transformers", "bitsandbytes"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    facts: dict[str, Any] = {
        "device": str(device_of(device)),
        "fingerprint": fingerprint(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": _cpu_facts()["model name"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_total(device),
    }
    if device_of(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device_of(device))
        facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}
        try:
            facts |= Nvml(device).describe()
        except BenchError as error:
            facts["nvml"] = str(error)
    return facts


def tdp(device: str, override: float | None = None) -> Power:
    """Watts to charge to this process when the device works: the option, NVML's enforced limit, the table, or assumed.

    On a CPU the part's power is shared out: each thread that torch uses is charged as one core, so a virtual machine
    with 2 of 64 cores pays 2/64. An unknown part is charged the median of its table.
    """
    import statistics

    import torch

    if override is not None:
        if not (math.isfinite(override) and override > 0):
            raise OptionError(
                f"tdp must be a finite number of watts above 0, not {override!r}; leave it out to detect it"
            )
        return Power(watts=override, source="option", note=f"{override:g} W as given")
    found = device_of(device)
    if found.type == "cuda":
        try:
            watts = Nvml(device).limit_watts()
            return Power(watts=watts, source="nvml", note=f"enforced power limit {watts:g} W")
        except BenchError:
            name = torch.cuda.get_device_name(found)
        if gpu := find_gpu(name):
            return Power(watts=gpu.watts, source="table", note=f"{gpu.watts:g} W, {gpu.sheet}")
        watts = statistics.median(row.watts for row in PEAKS.values())
        return Power(watts=watts, source="assumed", note=f"{watts:g} W, median of the GPUs listed; {name!r} is not")
    threads, model = torch.get_num_threads(), _cpu_facts()["model name"]
    if cpu := find_cpu(model):
        watts = cpu.watts * min(1.0, threads / cpu.cores)
        note = f"{watts:.3g} W, {threads} of {cpu.cores} cores of {cpu.watts:g} W, {cpu.sheet}"
        return Power(watts=watts, source="table", note=note)
    each = statistics.median(row.watts / row.cores for row in CPU_POWER.values())
    note = f"{each * threads:.3g} W, {threads} threads at {each:.3g} W, median of the CPUs listed; {model!r} is not"
    return Power(watts=each * threads, source="assumed", note=note)


def peak_flops(device: str, dtype: "str | torch.dtype", threads: int | None = None) -> Peak:
    """Dense operations per second that the device could do in `dtype` ("bfloat16" or a torch dtype).

    A GPU of the table: its data sheet; where the chip lacks the dtype, its fp32 peak, and fp32 is TF32 where torch may
    use it. Any other device: the best of many square matmuls within 1.5 s, in `dtype` and in fp32, whichever is faster
    (a CPU without bf16 instructions multiplies bf16 100 times slower than fp32), once per process.

    Raises OptionError for a dtype that the table lacks and a matmul cannot measure.
    """
    import torch

    found, dtype = device_of(device), str(dtype).removeprefix("torch.")
    gpu = find_gpu(torch.cuda.get_device_name(found)) if found.type == "cuda" else None
    if gpu is None:
        if dtype not in _MEASURED_DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(_MEASURED_DTYPES)} on {device}, not {dtype!r}")
        return _measured_peak(str(found), dtype, threads or torch.get_num_threads())
    single = "tf32" if "tf32" in gpu.flops_per_s and torch.get_float32_matmul_precision() != "highest" else "float32"
    wanted = single if dtype == "float32" else dtype.partition("_")[0]
    used = wanted if wanted in gpu.flops_per_s else "float32"
    lacks = "" if used == wanted else f", which has no {dtype}"
    return Peak(flops_per_s=gpu.flops_per_s[used], source="table", note=f"{used} of {gpu.sheet}{lacks}")


@functools.cache
def _measured_peak(device: str, dtype: str, threads: int) -> Peak:
    tried = dict.fromkeys((dtype, "float32"))
    with _threads(threads):
        rates = {each: _matmul_rate(device, each, _MEASURE_SECONDS / len(tried)) for each in tried}
    best = max(rates, key=rates.__getitem__)
    figures = ", ".join(f"{each} {rate / 1e9:.3g} GFLOP/s" for each, rate in rates.items())
    return Peak(flops_per_s=rates[best], source="measured", note=f"{best} matmul, {threads} threads ({figures})")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matmul_rate(device: str, dtype: str, seconds: float) -> float:
    """The best rate of square products, doubled in size for as long as the next size fits into the time left."""
    import torch

    end, best, n = time.perf_counter() + seconds, 0.0, 128
    largest = 8192 if device.startswith("cuda") else 4096
    while True:
        a = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
        took = math.inf
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            a @ a
            synchronize(device)
            took = min(took, time.perf_counter() - start)
        best = max(best, 2 * n**3 / took)
        left = end - time.perf_counter()
        if n < largest and left > 3 * 8 * took:
            n *= 2
        elif left < 3 * took:
            return best


def memory_total(device: str) -> int:
    """Bytes of memory the device has; on a CPU no more than the control group of this process may use."""
    import psutil
    import torch

    found = device_of(device)
    if found.type == "cuda":
        return int(torch.cuda.mem_get_info(found)[1])
    return min(psutil.virtual_memory().total, _cgroup()[0])


def memory_free(device: str) -> int:
    """Bytes that could be allocated now without swapping and without passing the limit of the control group."""
    import psutil
    import torch

    found = device_of(device)
    if found.type == "cuda":
        return int(torch.cuda.mem_get_info(found)[0])
    limit, used = _cgroup()
    return max(0, min(psutil.virtual_memory().available, limit - used))


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Limit and use in bytes of the control group that a container sees as its root; no limit is `sys.maxsize`."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            allowed, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:
            continue
        if allowed != "max":
            return int(allowed), taken - int(cache[1] if cache else 0)
    return sys.maxsize, 0
