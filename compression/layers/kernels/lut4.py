"""An optional CPU kernel for weights of up to 4 bits and few rows of x, compiled on this machine at first use.

    W[n,k] = scales[n,g] * (table[codes[n,k]] - zeros[n,g]),   g = k // group_size,   y = x W^T

Decoding at batch 1 is limited by how fast weights come from memory; `lut4.c` reads 4 bits of each and nothing more, and
its arithmetic is exact in the levels (no rounding of table, scales or zeros; sums in fp32). Where the table is 0..15
and x is bf16, x is held in each group as whole numbers of 15 bits, and the sums of a group are exact: nothing of x is
lost down to a 64th of the group's largest value; what is smaller is rounded to 2^-13 of that one's power of two. The
kernel shares torch's OpenMP threads and obeys `torch.set_num_threads`. The result does not depend on the number of
threads, to the bit.

Nothing happens at import. The first call of `available` or `matmul` compiles the C file with `$CC` (or cc, gcc, clang)
into the folder `native` of the cache (`$COMPRESSION_CACHE`, or compression-bench in the user's cache folder) and loads
it; later processes find it there, and take it only if it is what was compiled (`_library`). `COMPRESSION_NATIVE=0`
turns it off, `COMPRESSION_NATIVE=portable` builds the scalar loop that any machine can run, which is slow and meant for
tests. Inference only: autograd does not see what is done here.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compression.errors import BackendError
from compression.layers.kernels import native_library

__all__ = ["available", "matmul", "pack", "reason", "supports", "threaded", "unpack"]

SOURCE = Path(__file__).with_name("lut4.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11")
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # what the kernel reads and writes; fp16 goes through fp32
BLOCK = 64  # codes that share 32 bytes

_lock = threading.Lock()


class _Unavailable(Exception):
    """Why there is no kernel: only ever turned into the text of `reason`."""


# ------------------------------------------------------------------------------------------------- building, once


def _compiler() -> list[str]:
    """The C compiler's command, from `$CC` (which may hold flags) or the usual names."""
    wanted = os.environ.get("CC")
    for command in [shlex.split(wanted)] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    raise _Unavailable(
        f"no C compiler: {f'CC={wanted!r} is not a command' if wanted else 'none of cc, gcc, clang is on PATH'}; "
        "install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; conda: conda install c-compiler) "
        "or name one in the environment variable CC"
    )


def _cpu() -> str:
    """What `-march=native` depends on: model and feature flags of the processor."""
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(wanted))
    return f"{platform.machine()} {platform.processor()}"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=120, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"the C compiler {command[0]!r} did not run: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise _Unavailable(f"{shlex.join(command[:3])} ... failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def _build(compiler: list[str], flags: list[str], library: Path) -> None:
    """Compile and link into a file.

    Linked without an OpenMP library on purpose: its symbols are found, at load time, in the one that torch brought, or
    there would be two pools of threads, each spinning while the other works.
    """
    made = library.with_suffix(".o")
    _run([*compiler, *flags, "-c", str(SOURCE), "-o", str(made)])
    _run([*compiler, "-shared", str(made), "-o", str(library)])


def _build_and_open(compiler: list[str], version: str, flags: list[str]) -> ctypes.CDLL:
    parts = "\0".join((SOURCE.read_text(encoding="utf-8"), *compiler, *flags, version, _cpu(), torch.__version__))
    key = hashlib.sha256(parts.encode()).hexdigest()[:32]
    loaded = native_library.library(key, lambda path: _build(compiler, flags, path))
    loaded.lut4_matmul.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 6
    loaded.lut4_matmul.restype = ctypes.c_int
    loaded.lut4_isa.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _load(setting: str) -> tuple[ctypes.CDLL | None, bool, str | None]:
    """The library, whether it has threads, and why there is none."""
    if setting == "0":
        return None, False, "turned off by COMPRESSION_NATIVE=0"
    if os.name != "posix":
        return None, False, f"built on Linux and macOS only, not on {platform.system()}"
    try:
        compiler = _compiler()
        version = _run([*compiler, "--version"])
        flags = [*FLAGS, "-DLUT4_PORTABLE"] if setting == "portable" else [*FLAGS]
        # OpenMP only where torch's runtime has the entry point that this compiler calls: otherwise one thread
        threads = hasattr(ctypes.CDLL(None), "__kmpc_fork_call" if "clang" in version else "GOMP_parallel")
        library = _build_and_open(compiler, version, [*flags, "-fopenmp"] if threads else flags)
        if library.lut4_isa() == b"portable" and setting != "portable":
            return None, False, f"this processor ({platform.machine()}) has no AVX2 with FMA"
        return library, threads, None
    except (_Unavailable, OSError, AttributeError, RuntimeError) as error:
        return None, False, str(error)


def _loaded() -> tuple[ctypes.CDLL | None, bool, str | None]:
    with _lock:
        return _load(os.environ.get("COMPRESSION_NATIVE", "1"))


# ------------------------------------------------------------------------------------------------------- the kernel


def available() -> bool:
    """Whether the kernel can be used here; compiles it at the first call. Never raises: `reason` says why not."""
    return _loaded()[0] is not None


def reason() -> str | None:
    """Why the kernel is not available, in words; None when it is."""
    return _loaded()[2]


def threaded() -> bool:
    """Whether it runs on torch's OpenMP threads (False: available, but on one thread)."""
    return _loaded()[1]


@functools.cache
def supports(out_features: int, in_features: int, group_size: int) -> bool:
    """Whether a matrix of this shape can be packed: whole blocks of 64 codes, groups of 32 or of whole blocks.

    >>> supports(4096, 4096, 128), supports(5, 64, 32), supports(64, 192, 192)  # the last: one group for each row
    (True, True, True)
    >>> supports(64, 192, 96), supports(64, 96, 32)
    (False, False)
    """
    return (
        out_features > 0
        and in_features > 0
        and in_features % BLOCK == 0
        and group_size > 0
        and in_features % group_size == 0
        and (group_size == 32 or group_size % BLOCK == 0)
    )


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 (N, K), to the layout of the kernel, uint8 (N, K/2). See the head of `lut4.c`.

    >>> codes = torch.arange(64, dtype=torch.uint8).remainder(16).repeat(2, 1)
    >>> torch.equal(unpack(pack(codes), 64), codes)
    True
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8 or codes.shape[1] % BLOCK:
        raise ValueError(
            f"codes must be a matrix of torch.uint8 with a multiple of {BLOCK} columns, "
            f"not {codes.dtype} {tuple(codes.shape)}"
        )
    rows, columns = codes.shape
    parts = codes.view(rows, columns // BLOCK, 2, 2, 2, 2, 4)  # n, block, nibble, h, o, L, p
    low, high = parts.permute(2, 0, 1, 5, 3, 6, 4).contiguous()  # each n, block, L, h, p, o
    return (low | high << 4).view(rows, columns // 2)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """The exact inverse of `pack`."""
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] * 2 != in_features or in_features % BLOCK:
        raise ValueError(
            f"packed must be torch.uint8 of (rows, {in_features} / 2), a multiple of {BLOCK // 2} columns, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    rows, blocks = packed.shape[0], in_features // BLOCK
    both = torch.stack([packed & 15, packed >> 4], dim=1)  # n, nibble, bytes
    parts = both.view(rows, 2, blocks, 2, 2, 4, 2)  # n, nibble, block, L, h, p, o
    return parts.permute(0, 2, 1, 4, 6, 3, 5).reshape(rows, in_features)  # n, block, nibble, h, o, L, p


def _kernel() -> Callable[..., int]:
    library, _, why = _loaded()
    if library is None:
        raise BackendError(f"the native 4-bit kernel is not available: {why}")
    return library.lut4_matmul


def bind(
    packed: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> Callable[[Tensor], Tensor]:
    """The product with one weight, as a function of x (..., K) of fp32, bf16 or fp16; the result has x's type.

    `table` is 16 floats, `scales` and `zeros` (or None) are (N, K / group_size), all contiguous fp32 on the CPU;
    `packed` comes from `pack`. The table 0..15 is the fastest, one that bf16 holds exactly (FP4) is next, then others.
    Everything but x is checked here, once; the tensors must not be resized while the function lives.
    """
    kernel = _kernel()
    rows, columns = packed.shape[0], packed.shape[-1] * 2
    if not (
        packed.ndim == 2
        and supports(rows, columns, group_size)
        and packed.dtype == torch.uint8
        and table.numel() == 16
        and scales.shape == (rows, columns // group_size)
        and table.dtype == scales.dtype == torch.float32
        and packed.is_contiguous()
        and table.is_contiguous()
        and scales.is_contiguous()
        and packed.device.type == table.device.type == scales.device.type == "cpu"
        and (zeros is None or (zeros.shape == scales.shape and zeros.dtype == torch.float32 and zeros.is_contiguous()))
    ):
        raise ValueError(_complaint(packed, table, scales, zeros, group_size))
    pairs = _pairs(scales, zeros)
    scales_and_zeros = (None, None, pairs) if pairs is not None else (scales, zeros, None)
    held = (packed, table, *scales_and_zeros)  # what the addresses below point into
    addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in held)

    def product(x: Tensor, held: object = held) -> Tensor:
        kind = TYPES.get(x.dtype)
        if kind is None or x.shape[-1] != columns or x.is_cuda:
            if x.dtype == torch.float16 and x.shape[-1] == columns and not x.is_cuda:
                return product(x.float()).half()
            raise ValueError(
                f"x must be float32, bfloat16 or float16 (..., {columns}) on the CPU, "
                f"not {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], rows))
        failed = kernel(
            x.data_ptr(), *addresses, y.data_ptr(), kind,
            x.numel() // columns, rows, columns, group_size, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"the native 4-bit kernel could not allocate a copy of x, {tuple(x.shape)}")
        return y

    product.held = held  # type: ignore[attr-defined]
    return product


def _pairs(scales: Tensor, zeros: Tensor | None) -> Tensor | None:
    """Scale and zero of each group in one int32, as bf16; None without zeros, or if bf16 would round one of them."""
    if zeros is None:
        return None
    both = torch.stack([zeros, scales], -1)
    narrow = both.bfloat16()
    return narrow.view(torch.int32).squeeze(-1) if torch.equal(narrow.float(), both) else None


def matmul(x: Tensor, packed: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """One product; see `bind`, which checks its arguments once for many."""
    return bind(packed, table, scales, zeros, group_size)(x)


def _complaint(packed: Tensor, table: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> str:
    rows, columns = packed.shape[0], packed.shape[-1] * 2
    if not supports(rows, columns, group):
        return (
            f"group_size={group} with {columns} columns and {rows} rows: the kernel takes columns in multiples of "
            f"{BLOCK} and groups of 32 or of a multiple of {BLOCK} that divide them (see `supports`)"
        )
    named = {"packed": packed, "table": table, "scales": scales, "zeros": zeros}
    got = ", ".join(
        f"{name} {t.dtype} {tuple(t.shape)} {t.device} {'contiguous' if t.is_contiguous() else 'strided'}"
        for name, t in named.items()
        if t is not None
    )
    return (
        f"wanted, contiguous and on the CPU: packed uint8 (N, K/2), table float32 (16,), "
        f"scales and zeros float32 {(rows, columns // group)}; got {got}"
    )
