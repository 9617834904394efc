"""The place of this process among the workers of pytest-xdist or Ray, and its device."""

from pathlib import Path
from typing import NamedTuple

import pytest

from bench.results.journal import JOURNAL
from bench.results.row import REFUSED

KEY = "compression_bench"  # of what controller and workers tell each other


class Worker(NamedTuple):
    """What the controller tells a worker."""

    run: str
    began: float  # seconds since the epoch; 0 where what another worker has begun is gone on with
    place: int
    count: int
    grouped: bool
    ray: bool = False
    shared: str | None = None  # of Ray: why no times can be taken


def worker_of(config: pytest.Config) -> Worker | None:
    """What this process was told, None where it is no worker of ours."""
    told = getattr(config, "workerinput", {}).get(KEY)
    return None if told is None else Worker(**told)


def placed(device: str, worker: Worker | None, gpus: int) -> tuple[str, str | None]:
    """The device of a worker, and why no time can be taken on it, None where it can.

    >>> one, three = Worker("r", 0.0, 1, 2, True), Worker("r", 0.0, 2, 3, True)
    >>> placed("cuda", one, 2)
    ('cuda:1', None)
    >>> placed("cuda", three, 2)
    ('cuda:0', 'timings are refused: 3 workers share 2 GPUs; give -n 2')
    >>> placed("cpu", one, 0)
    ('cpu', 'timings are refused: 2 workers share cpu; run without -n')
    >>> placed("cuda", None, 2)
    ('cuda', None)
    """
    if worker is None or worker.count == 1:
        return device, None
    if worker.ray:
        return device, worker.shared
    if device != "cuda":
        return device, f"{REFUSED}: {worker.count} workers share {device}; run without -n"
    here = f"cuda:{worker.place % gpus}"
    if worker.count <= gpus:
        return here, None
    return here, f"{REFUSED}: {worker.count} workers share {gpus} GPUs; give -n {gpus}"


def journal_of(config: pytest.Config) -> Path:
    """The journal that the command line names."""
    return config.getoption("--journal") or config.invocation_params.dir / JOURNAL
