"""Devices that work runs on; the current device of the process is never changed permanently."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from compression.errors import CompressionError


def check(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`, as it is.

    Raises:
        CompressionError: it is no device, or not there.
    """
    import torch

    if text == "cpu":
        return text
    if not re.fullmatch(r"cuda(:\d+)?", text):
        raise CompressionError(f"device {text!r} is not known; allowed: cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(text.partition(":")[2] or 0) >= count:
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
        raise CompressionError(f"device {text!r} is not here; torch {torch.__version__} sees {there}")
    return text


def default(text: str | None) -> str:
    """A device as `check` has it; where none is named, CUDA if there is any."""
    import torch

    if text is not None:
        return check(text)
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def on(device: "torch.device | str") -> Iterator[None]:
    """While it lasts, streams, events, graphs, random states and whoever asks for the current device get this one.

    On a CPU nothing happens.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def repeatable(device: "torch.device | str") -> Iterator[None]:
    """As `on`, with algorithms that give the same bits every time, or an error where torch has none.

    On CUDA `index_add_`, `scatter_add_`, embeddings and attention going backward otherwise add up by atomics, in
    whatever order threads come. torch gives cuBLAS a workspace of its own for each stream, which makes its products
    repeatable; the variable is what torch wants to see before it believes that.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def settle(device: "torch.device | str") -> None:
    """Bring a GPU's allocator to a state that does not depend on what ran before: nothing pending, nothing kept.

    Garbage is to be collected before.
    The cache of freed blocks goes, and the workspaces of cuBLAS, which else whoever multiplies first would pay for.
    """
    import torch

    torch.cuda.synchronize(device)
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # not in builds without CUDA
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
