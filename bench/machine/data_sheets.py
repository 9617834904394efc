"""Data sheets of GPUs and CPUs, looked up by the name that the driver or the system reports.

Peaks are dense (no structured sparsity) and, for half precision and float8, with fp32 accumulation, as PyTorch
multiplies. A name with a word that its row does not have is another device, and is not found.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

# TFLOP/s (int8: TOP/s), W, GB/s, GB; "-": the tensor cores do not have it. Columns are two or more spaces apart.
_GPUS = """
name             float32  tf32   float16  bfloat16  int8    float8   W     GB/s  GB   source
t4               8.1      -      65       -         130     -        70    320   16   T4 data sheet; Turing whitepaper
v100 pcie        14       -      112      -         -       -        250   900   32   V100 data sheet
v100 sxm2        15.7     -      125      -         -       -        300   900   32   V100 data sheet
a10              31.2     62.5   125      125       250     -        150   600   24   A10 data sheet
a10g             35       35     70       70        140     -        300   600   24   A10G data sheet (AWS)
a30              10.3     82     165      165       330     -        165   933   24   A30 data sheet
a40              37.4     74.8   149.7    149.7     299.3   -        300   696   48   A40 data sheet
a100 pcie 40gb   19.5     156    312      312       624     -        250   1555  40   A100 data sheet (40 GB)
a100 sxm4 40gb   19.5     156    312      312       624     -        400   1555  40   A100 data sheet (40 GB)
a100 pcie 80gb   19.5     156    312      312       624     -        300   1935  80   A100 data sheet (80 GB)
a100 sxm4 80gb   19.5     156    312      312       624     -        400   2039  80   A100 data sheet (80 GB)
l4               30.3     60     121      121       242.5   242.5    72    300   24   L4 data sheet
l40              90.5     90.5   181      181       362     362      300   864   48   L40 data sheet
l40s             91.6     183    362      362       733     733      350   864   48   L40S data sheet
h100 pcie        51       378    756      756       1513    1513     350   2000  80   H100 data sheet (PCIe)
h100 hbm3 80gb   67       494.7  989.4    989.4     1978.9  1978.9   700   3350  80   H100 data sheet (SXM)
h100 nvl         60       417.5  835.5    835.5     1670.5  1670.5   400   3900  94   H100 data sheet (NVL)
h200             67       494.5  989.5    989.5     1979    1979     700   4800  141  H200 data sheet (SXM)
h200 nvl         60       417.5  835.5    835.5     1670.5  1670.5   600   4800  141  H200 data sheet (NVL)
b200             75       1125   2250     2250      4500    4500     1000  8000  180  HGX B200 data sheet
rtx 3060         12.7     12.7   25.5     25.5      101.9   -        170   360   12   GeForce RTX 3060; GA102 whitepaper
rtx 3080         29.8     29.8   59.5     59.5      238     -        320   760   10   Ampere GA102 whitepaper
rtx 3090         35.6     35.6   71       71        284     -        350   936   24   Ampere GA102 whitepaper
rtx 4070         29.1     29.1   58.3     58.3      233     116.6    200   504   12   Ada whitepaper
rtx 4080         48.7     48.7   97.5     97.5      390     194.9    320   717   16   Ada whitepaper
rtx 4090         82.6     82.6   165.2    165.2     660.6   330.3    450   1008  24   Ada whitepaper
rtx 5090         104.8    104.8  209.5    209.5     838     419      575   1792  32   RTX Blackwell whitepaper
rtx a4000        19.2     38.3   76.7     76.7      153.4   -        140   448   16   RTX A4000 data sheet
rtx a5000        27.8     55.6   111.1    111.1     222.2   -        230   768   24   RTX A5000 data sheet
rtx a6000        38.7     77.4   154.8    154.8     309.7   -        300   768   48   RTX A6000 data sheet
rtx 6000 ada     91.1     182.1  364.2    364.2     728.5   728.5    300   960   48   RTX 6000 Ada data sheet
"""

# Words that a device name may have beside those of its row; any other ("Ti", "Laptop", "MIG") is another device.
_NEUTRAL = re.compile(r"nvidia|tesla|geforce|generation|\d+gb|hbm\d\w?|sxm\d?|pcie")

# Thermal design power of the whole part, physical cores.
_CPUS = """
name               W    cores  source
epyc 7742          225  64     AMD EPYC 7002 data sheet
epyc 7713          225  64     AMD EPYC 7003 data sheet
epyc 7763          280  64     AMD EPYC 7003 data sheet
epyc 9554          360  64     AMD EPYC 9004 data sheet
epyc 9654          360  96     AMD EPYC 9004 data sheet
epyc 9755          500  128    AMD EPYC 9005 data sheet
xeon gold 6148     150  20     Intel ARK
xeon gold 6248     150  20     Intel ARK
xeon gold 6338     205  32     Intel ARK
platinum 8280      205  28     Intel ARK
platinum 8380      270  40     Intel ARK
platinum 8480+     350  56     Intel ARK
platinum 8592+     350  64     Intel ARK
ryzen 9 5950x      105  16     AMD product page
ryzen 9 7950x      170  16     AMD product page
i9 13900k          125  24     Intel ARK
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One row of `PEAKS`: operations per second by dtype, board power, memory; `sheet` names where they were read."""

    flops_per_s: Mapping[str, float]
    watts: float
    bandwidth_bytes_per_s: float
    memory_bytes: float
    sheet: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cpu:
    """One row of `CPU_POWER`: thermal design power of the whole part, its physical cores."""

    watts: float
    cores: int
    sheet: str


def _rows(table: str) -> Iterator[dict[str, str]]:
    header, *lines = (re.split(r"\s{2,}", line.strip()) for line in table.strip().splitlines())
    return (dict(zip(header, line, strict=True)) for line in lines)


PEAKS: Mapping[str, Gpu] = MappingProxyType(
    {
        row["name"]: Gpu(
            flops_per_s=MappingProxyType(
                {
                    dtype: float(row[dtype]) * 1e12
                    for dtype in ("float32", "tf32", "float16", "bfloat16", "int8", "float8")
                    if row[dtype] != "-"
                }
            ),
            watts=float(row["W"]),
            bandwidth_bytes_per_s=float(row["GB/s"]) * 1e9,
            memory_bytes=float(row["GB"]) * 1e9,
            sheet=row["source"],
        )
        for row in _rows(_GPUS)
    }
)

CPU_POWER: Mapping[str, Cpu] = MappingProxyType(
    {row["name"]: Cpu(watts=float(row["W"]), cores=int(row["cores"]), sheet=row["source"]) for row in _rows(_CPUS)}
)


def words_of(name: str) -> list[str]:
    """The words of a device name: lower case, without trade marks, split at whatever is not a letter, digit or +."""
    return re.findall(r"[a-z0-9+]+", re.sub(r"\((?:r|tm)\)", " ", name.lower()))


def find_gpu(name: str) -> Gpu | None:
    """The row of `PEAKS` for a name as the driver gives it, or None.

    >>> find_gpu("NVIDIA A100-SXM4-80GB").watts, find_gpu("NVIDIA A100 80GB PCIe").watts
    (400.0, 300.0)
    >>> find_gpu("NVIDIA GeForce RTX 3080 Ti") is find_gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    True
    """
    words = set(words_of(name))
    for key in sorted(PEAKS, key=len, reverse=True):
        asked = set(key.split())
        if asked <= words and all(_NEUTRAL.fullmatch(word) for word in words - asked):
            return PEAKS[key]
    return None


def find_cpu(model: str) -> Cpu | None:
    """The row of `CPU_POWER` for a model name as the system gives it, or None.

    >>> find_cpu("AMD EPYC 7763 64-Core Processor").cores
    64
    """
    words = set(words_of(model))
    return next((CPU_POWER[key] for key in sorted(CPU_POWER, key=len, reverse=True) if set(key.split()) <= words), None)
