"""`--plan`: what a run would take, said before anything starts."""

import shutil
import tempfile
import time
from typing import TYPE_CHECKING, Any

from compression._errors import CheckpointError

if TYPE_CHECKING:
    from bench.options import Options

_OPEN_SECONDS = 8  # imports and warm-up of one process
_ENERGY_SECONDS = 5


def plan(options: "Options") -> str:
    """Memory, disk, downloads and a rough time for each recipe.

    Sizes are counted from the shapes of the layers. Times assume that a token costs one pass over the stored weights at
    the memory bandwidth of the device as measured now, which packed layers without a kernel exceed by far.

    Raises:
        CompressionError: the base or a recipe cannot be.
    """
    import pandas as pd

    from bench import machine
    from compression import _checkpoint, _weights
    from compression._artefact import stored_bytes
    from compression._checks import check, check_source

    source = _checkpoint.locate(options.base)
    download = _download_bytes(source)
    if source.kind == "hub" and download:
        return f"{source.text} is not here: {_mib(download)} would be downloaded; shapes are known afterwards"
    skeleton = check_source(options.recipes, source.fetch(), options.calibration, options.teacher, options.downstream)
    skeleton = skeleton.to(_weights.open_weights(source).dtype)
    base = stored_bytes(skeleton)
    bandwidth = _bandwidth(options.device)
    rounds = (options.runs + options.warmup) * options.new_tokens
    rows = []
    for recipe in options.recipes:
        size = stored_bytes(check(recipe, skeleton))
        resident = base + (size if recipe.steps else 0)
        child = max(base, size) if options.device == "cpu" else 0
        seconds = sum(
            2 * _OPEN_SECONDS + 2 * _ENERGY_SECONDS + rounds * (base + size) / bandwidth for _ in options.batch_sizes
        )
        rows.append({
            "recipe": recipe.text, "stored": _mib(size), "memory at once": _mib(resident + child),
            "disk": _mib(size if recipe.steps and options.device == "cpu" else 0), "download": _mib(0),
            "about": f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s",
        })  # fmt: skip
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return "\n".join([
        f"base {source.label}: {_mib(base)} on {options.device}; {_mib(machine.memory_free(options.device))} of memory "
        f"free, {_mib(free)} of disk, {bandwidth / 1e9:.1f} GB/s read",
        pd.DataFrame(rows).to_string(index=False),
        "times are for efficiency alone, without the prompt, and rough",
    ])  # fmt: skip


def _download_bytes(source: Any) -> int:
    """Bytes that opening the base would fetch from the hub; 0 if it is here."""
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

    from bench import machine

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


def _mib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
