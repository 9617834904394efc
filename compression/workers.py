"""The processes that share the work on one model: this one alone, or those of a torch.distributed group.

    torchrun --nproc-per-node 4 -m compression gptq --base folder --out gptq-model

`ALONE` needs no group and never imports torch.distributed. In a group every process runs the same code; what one of
them works out for all goes out as an object, tensors byte for byte with their strides, over gloo from a CPU and over
NCCL between CUDA devices. Errors that are raised on purpose reach all processes in the same words.
"""

import heapq
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from compression import devices, files
from compression.errors import CompressionError, WorkerError
from compression.files.atomic import code_digest

PATIENCE = timedelta(hours=1)  # that a process waits for another, which may be rounding the widest layer
LAST_WORDS_S = 2  # seconds that one which lost another waits for it to have told why

Result = TypeVar("Result")


class Workers:
    """This process alone, which is what everything falls back to; `Group` is several.

    Attributes:
        rank: the number of this process, from 0.
        count: processes.
    """

    rank, count = 0, 1

    def run(self, owners: Sequence[int], jobs: Sequence[Callable[[], Result]]) -> Iterator[Result]:
        """The results of jobs, in order and on every process; each is run by its owner (`dealt`), before all is sent.

        Alone, a job is run when its result is asked for.
        """
        for job in jobs:
            yield job()

    def first(self, work: Callable[[], Result]) -> Result:
        """What the first process gets from `work`, which the others do not call."""
        return work()

    def each(self, work: Callable[[], Result]) -> Result:
        """What this process gets from `work`; where one raises a CompressionError, all do."""
        return work()

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        return [value]

    def collect(self, value: Any, owner: int) -> Iterable[Any]:
        """The values of all processes, in their order and one at a time, for the owner; nothing for the others."""
        return [value]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """The value of this process out of those that the first one has."""
        assert values is not None
        return values[0]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise WorkerError if a fact is not the same on all processes."""


ALONE = Workers()


def dealt(costs: Sequence[float], count: int) -> list[int]:
    """Who of `count` runs each job: the dearest first, each to the one with the least to do so far.

    >>> dealt([3, 1, 5, 7], 2)
    [1, 0, 1, 0]
    """
    loads, owners = [(0.0, rank) for rank in range(count)], [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        load, owners[job] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[job], owners[job]))
    return owners


class Group(Workers):
    """The processes of torch.distributed's default group.

    Args:
        device: of this process.
        store: of the group, which outlives a process of it.
    """

    def __init__(self, device: str, store: Any):
        import torch
        from torch import distributed

        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self._device, self._store = torch.device(device), store

    def run(self, owners: Sequence[int], jobs: Sequence[Callable[[], Result]]) -> Iterator[Result]:
        mine = {i: _tried(job) for i, (owner, job) in enumerate(zip(owners, jobs, strict=True)) if owner == self.rank}
        for i, owner in enumerate(owners):
            yield _opened(self._broadcast(mine.pop(i, None), owner))

    def first(self, work: Callable[[], Result]) -> Result:
        return _opened(self._broadcast(_tried(work) if self.rank == 0 else None, 0))

    def each(self, work: Callable[[], Result]) -> Result:
        result = _tried(work)
        errors = self.everyone(result if isinstance(result, CompressionError) else None)
        failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if failed is None:
            return result  # type: ignore[return-value]
        if failed == 0:
            raise errors[0]
        raise WorkerError(f"process {failed} of {self.count} cannot take part: {errors[failed]}")

    def everyone(self, value: Any) -> list[Any]:
        return [self._broadcast(value, rank) for rank in range(self.count)]

    def collect(self, value: Any, owner: int) -> Iterable[Any]:
        if self.rank != owner:
            self._send(value, owner)
            return ()
        return (value if rank == owner else self._receive(rank) for rank in range(self.count))

    def scatter(self, values: Sequence[Any] | None) -> Any:
        if values is None:
            return self._receive(0)
        for rank in range(1, self.count):
            self._send(values[rank], rank)
        return values[0]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        for rank, others in enumerate(self.everyone(dict(facts))):
            for name, value in facts.items():
                if others.get(name) != value:
                    raise WorkerError(
                        f"processes {self.rank} and {rank} differ in {name}: {value!r} and {others.get(name)!r}; start "
                        "all with the same command, code and versions, on processors of the same kind"
                    )

    def _broadcast(self, value: Any, source: int) -> Any:
        if self.rank != source:
            return self._receive(source)
        for rank in range(self.count):
            if rank != source:
                self._send(value, rank)
        return value

    def _send(self, value: Any, to: int) -> None:
        from torch import distributed

        with self._said(to):
            for tensor in files.messages.parts(value):
                distributed.send(tensor, to)

    def _receive(self, source: int) -> Any:
        from torch import distributed

        with self._said(source):
            return files.messages.taken(lambda tensor: distributed.recv(tensor, source), self._device)

    def leave(self, error: BaseException) -> None:
        """Tell those who will miss this process why it ended."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", str(error) or type(error).__name__)

    @contextmanager
    def _said(self, other: int) -> Iterator[None]:
        """A connection that broke, in the words of the other process if it left some."""
        try:
            yield
        except RuntimeError as error:
            said = self._last_words(other)
            lost = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[
                0
            ]  # gloo begins with a line of its code
            why = f"is gone, or does not answer any more: {lost.split('. ')[0]}" if said is None else f"ended: {said}"
            raise WorkerError(
                f"process {other} of {self.count} {why}. A folder that was being written keeps its finished blocks: "
                "the same command, with any number of processes, goes on from there"
            ) from error

    def _last_words(self, other: int) -> str | None:
        """What another process left, None if nothing came of it within a while."""
        end = time.monotonic() + LAST_WORDS_S
        with suppress(RuntimeError):
            while not self._store.check([f"left/{other}"]):
                if time.monotonic() > end:
                    return None
                time.sleep(0.05)
            return self._store.get(f"left/{other}").decode()
        return None  # whoever kept the store is gone


def _tried(work: Callable[[], Any]) -> Any:
    """What `work` gives, or the error that it raised on purpose."""
    try:
        return work()
    except CompressionError as error:
        return error


def _opened(result: Any) -> Any:
    if isinstance(result, CompressionError):
        raise result
    return result


def started() -> int:
    """How many processes this one was started with, as torchrun says it; 1 without torchrun."""
    return _variable("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the first of them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Workers, str]]:
    """The processes that torchrun, or who else sets its variables, started beside this one, and the device of this one.

    Without these variables, and for one process, that is `ALONE` and `devices.default(device)`.

    Raises:
        CompressionError: `device` is not there, or names one of several for all.
        WorkerError: the variables cannot be, there are fewer CUDA devices than processes, the others do not come, or
            run other code or versions.
    """
    if started() == 1:
        yield ALONE, devices.default(device)
        return
    from torch import distributed

    device = _own_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        store, rank, count = next(iter(distributed.rendezvous("env://", timeout=PATIENCE)))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the processes of this run do not come together: {error}; start them by torchrun") from error
    group = Group(device, store)
    group.check_same(_machine(device))
    try:
        yield group, device
    except BaseException as error:
        group.leave(error)
        raise
    distributed.destroy_process_group()  # after an error the others wait for nothing that is still to come


def _own_device(text: str | None) -> str:
    """That of this process: the CPU, or the CUDA device of its number on this machine."""
    if text not in (None, "cpu", "cuda"):
        raise WorkerError(f"--device {text}: each of several processes takes a device of its own; give cpu or cuda")
    device = devices.default(text)
    if device == "cpu":
        return device
    import torch

    here, processes = torch.cuda.device_count(), _variable("LOCAL_WORLD_SIZE", 1)
    if here < processes:
        raise WorkerError(f"{processes} processes on this machine, and {here} CUDA devices: each takes one of its own; "
                          f"start at most {here}, or give --device cpu")  # fmt: skip
    device = f"cuda:{_variable('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)  # NCCL and its workspaces go to the current one
    return device


def _machine(device: str) -> dict[str, Any]:
    """What every process must have in common for the bytes of one to be those of all."""
    import torch
    import transformers

    cuda = device.startswith("cuda")
    return {
        "the code of this package": code_digest(),
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
        "the kind of device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "the instructions of the processor": torch.backends.cpu.get_cpu_capability(),
        "the number of threads (OMP_NUM_THREADS)": torch.get_num_threads(),
    }


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise WorkerError(f"{name}={text!r} must be a whole number, as torchrun sets it")
    return int(text)
