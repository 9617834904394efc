"""Peak memory while a model generates: in this process on CUDA, in a fresh child process on a CPU."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from bench.errors import BenchError, MetricError, OptionError
from bench.machine import device as machine
from bench.machine.environment import child_environment
from bench.measure.generation import Load
from compression import devices
from compression.files.strict_json import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

_ROOT = Path(__file__).resolve().parents[2]
SMALL = 2**28  # bytes of a model below which what interpreter and libraries take for themselves shows in a peak
LOADS = 6  # of a small model, in one process
# Freed memory goes back to the system at once. By default glibc keeps pieces below 128 KiB and more in its heap, whose
# holes, of no use to anything, made 3 to 5 MiB of a peak, other ones in every process.
STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Peak bytes while generating, bytes of the model's tensors in memory, bytes the model has when stored.

    `peaks` are those of each time that the model was loaded, where it was more than once; `peak_bytes` their median.
    """

    peak_bytes: int
    model_bytes: int
    stored_bytes: int
    source: str
    peaks: tuple[int, ...] = ()

    def each(self) -> "tuple[MemoryReading, ...]":
        """A reading for each peak."""
        return tuple(dataclasses.replace(self, peak_bytes=peak, peaks=()) for peak in self.peaks)

    def __post_init__(self) -> None:
        for name in ("peak_bytes", "model_bytes", "stored_bytes"):
            if getattr(self, name) < 1:
                raise MetricError(f"memory from {self.source}: {name} must be above 0, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """What the child process opens and generates: an artefact's folder or the text of a base, the load, how often."""

    kind: Literal["artefact", "base"]
    target: str
    load: Load
    threads: int
    loads: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("artefact", "base"):
            raise OptionError(f"kind must be artefact or base, not {self.kind!r}")
        for name in ("threads", "loads"):
            at_least(name, getattr(self, name), 1, OptionError)


def tensors_of(root: object) -> "Iterator[Tensor]":
    """Every tensor that `root` (a module, a tensor, a container) holds, however deep: also what is no buffer.

    Quantization states that hang on a parameter and layouts that a kernel keeps for itself are found this way. Of a
    tensor that has no storage of its own, as sparse ones have not, those that it consists of.
    """
    import torch

    seen: dict[int, object] = {}  # held: the number of an object that is gone may be given to another
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            parts = _parts(item)
            stack.extend(parts)
            if not parts:
                yield item
        if isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, torch.nn.Module) or not (callable(item) or isinstance(item, ModuleType)):
            stack.extend(getattr(item, "__dict__", {}).values())


def _parts(tensor: "Tensor") -> "list[Tensor]":
    """What a tensor without storage consists of: wrappers such as 2:4 weights, and the sparse layouts."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def bytes_of(root: object, *, device: str | None = None) -> int:
    """Bytes of the storages behind the tensors of `root`, each once; of one device if given.

    Raises:
        MetricError: a tensor keeps its bytes where torch does not show them.
    """
    where = machine.device_of(device) if device else None
    storages = {}
    for tensor in tensors_of(root):
        if tensor.device.type == "meta" or where not in (None, tensor.device):
            continue
        try:
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError) as error:
            raise MetricError(f"the bytes of a {type(tensor).__name__} of layout {tensor.layout} cannot be counted: "
                              f"{error}") from error  # fmt: skip
    return sum(storages.values())


def peak_on_cuda(work: Callable[[], object], *, model: "Module", device: str, stored_bytes: int) -> MemoryReading:
    """Peak of the CUDA allocator while `work` runs, less what was allocated before and is not of `model`.

    `work` makes what it generates with (cache, graphs, buffers) itself: what was made before counts as another's. It
    runs twice, the first time unmeasured: copies that kernels make at their first product are then there, whatever
    measured this model before. Counted are the bytes that were requested: the blocks that the allocator gives for them
    may be larger, by what others left behind.
    """
    import torch

    where = machine.device_of(device)
    work()
    gc.collect()
    devices.settle(where)
    model_bytes = bytes_of(model, device=str(where))
    others = _requested(where, "current") - model_bytes
    if others < 0:
        raise MetricError(
            f"the model's tensors take {model_bytes} bytes on {where}, of which its allocator knows "
            f"{others + model_bytes}: memory from another allocator cannot be measured by it"
        )
    torch.cuda.reset_peak_memory_stats(where)
    work()
    torch.cuda.synchronize(where)
    peak = _requested(where, "peak") - others
    return MemoryReading(peak_bytes=peak, model_bytes=model_bytes, stored_bytes=stored_bytes, source="cuda allocator")


def _requested(device: "torch.device", when: str) -> int:
    """Bytes requested of the allocator of a GPU, now ("current") or at most since the last reset ("peak")."""
    import torch

    statistics = torch.cuda.memory_stats(device)
    if (key := f"requested_bytes.all.{when}") not in statistics:
        raise MetricError(f"the allocator of {device} ({torch.cuda.get_allocator_backend()}) does not count requested "
                          "bytes; measure with torch's own: PYTORCH_CUDA_ALLOC_CONF=backend:native")  # fmt: skip
    return int(statistics[key])


def peak_in_child(
    spec: ChildSpec,
    *,
    stored_bytes: int,
    timeout: float | None = None,
    command: Sequence[str] = (sys.executable, "-m", "bench.measure.memory_process"),
) -> MemoryReading:
    """Peak anonymous memory on the CPU of a child process that opens the model of `spec` and generates.

    `command` reads `spec` as JSON from its standard input and ends its output with one JSON line (`peaks`,
    `model_bytes`, `source`). Raises BenchError with the child's last words if it fails, is killed (out of memory), or
    takes longer than `timeout` seconds.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = child_environment(**STEADY_HEAP, PYTHONPATH=os.pathsep.join(paths))
    name = f"the process that measures the memory of {spec.target!r}"
    try:
        child = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(spec)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{name} took longer than {timeout:g} s; generate fewer tokens, or allow more time") from error
    if child.returncode:
        last = " | ".join(child.stderr.strip().splitlines()[-3:]) or "it said nothing"
        raise BenchError(f"{name} {_ending(child.returncode)}: {last}")
    try:
        figures = json.loads(child.stdout.strip().splitlines()[-1])
        peaks, model, source = (figures[key] for key in ("peaks", "model_bytes", "source"))
        peak = round(median(peaks))
    except (ValueError, TypeError, LookupError) as error:
        raise BenchError(f"{name} did not end with a line of JSON, but with {child.stdout[-200:]!r}") from error
    return MemoryReading(
        peak_bytes=peak, model_bytes=model, stored_bytes=stored_bytes, source=source, peaks=tuple(peaks)
    )


def _ending(code: int) -> str:
    if code > 0:
        return f"failed with exit status {code}"
    why = ", most likely because memory ran out" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{why}"
