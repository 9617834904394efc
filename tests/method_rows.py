"""The table of the contract of methods: a recipe, the errors that it may have, and its size.

A new method adds its row to ROWS; without one, `test_every_registered_method_has_a_row` fails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


def rtn_bytes(bits, group, *, zeros=True):
    """Codes, one scale and one zero point to a group; every row rounded up to whole bytes."""

    def count(rows, cols, itemsize):
        groups = 1 if group == -1 else cols // group
        return rows * (math.ceil(cols * bits / 8) + groups * itemsize + zeros * math.ceil(groups * bits / 8))

    return count


def hqq_bytes(bits, group):
    """Zero points are real numbers, as large as scales."""

    def count(rows, cols, itemsize):
        groups = 1 if group == -1 else cols // group
        return rtn_bytes(bits, group, zeros=False)(rows, cols, itemsize) + rows * groups * itemsize

    return count


def act_order_bytes(bits, group):
    """The same without zero points, and 4 bytes to a column for its place."""
    return lambda rows, cols, itemsize: rtn_bytes(bits, group, zeros=False)(rows, cols, itemsize) + 4 * cols


def nf4_bytes(group, *, double=True):
    """Half a byte to a weight; absmax in 8 bits, with one fp32 scale to 256 of them and one mean, or in fp32."""

    def count(rows, cols, itemsize):
        n = rows * cols // group
        return rows * cols // 2 + (n + 4 * math.ceil(n / 256) + 4 if double else 4 * n)

    return count


def dense_bytes(rows, cols, itemsize):
    return rows * cols * itemsize


def half(rows, cols):
    return rows * cols // 2


def thirds_of_rows(rows, cols):
    """0.3 of each row."""
    return rows * (cols * 3 // 10)


def bitmask_bytes(zeros):
    """A bit to a weight, rows rounded up to whole bytes, and the values that are not zero."""
    return lambda rows, cols, itemsize: rows * math.ceil(cols / 8) + itemsize * (rows * cols - zeros(rows, cols))


def nm_bytes(n, m, bits):
    """n values of m, and the place of each in `bits` bits."""
    return lambda rows, cols, itemsize: rows * (itemsize * cols * n // m + math.ceil(cols * n // m * bits / 8))


@dataclass(frozen=True)
class Row:
    """A recipe, the relative error of outputs and weights that a Gaussian layer may have under it, and its size.

    Attributes:
        error: |y - y_dense| / |y_dense|, Frobenius, for Gaussian weights and inputs. (Calibrated methods are worse on
            these than rounding to nearest: they trade them for the inputs that they have seen. `awq` scales weights
            besides, which counts as error here; `test_scaling.py` compares what the whole block computes.)
        stored: bytes of a layer without its bias, from (rows, cols, bytes of the base's dtype).
        zeros: how many weights of a layer are zero, from (rows, cols); None where nothing is promised of one layer.
        cuts: whether layers, or rows and columns of them, are taken out; what is left keeps its bits.
    """

    recipe: str
    error: float
    stored: Callable[[int, int, int], int]
    zeros: Callable[[int, int], int] | None = None
    cuts: bool = False

    def __str__(self):
        return self.recipe


ROWS = (
    Row("nf4", 0.11, nf4_bytes(64)),
    Row("nf4(double_quant=false,group_size=32)", 0.10, nf4_bytes(32, double=False)),
    Row("nf4(compute_dtype=bfloat16)", 0.11, nf4_bytes(64)),
    Row("nf4(compute_dtype=float16,backend=bitsandbytes)", 0.11, nf4_bytes(64)),
    Row("llm_int8", 0.02, lambda rows, cols, itemsize: rows * cols + 4 * rows),
    Row("rtn(bits=8)", 0.012, rtn_bytes(8, 128)),
    Row("rtn(bits=8,group_size=-1,symmetric=true)", 0.015, rtn_bytes(8, -1, zeros=False)),
    Row("rtn", 0.12, rtn_bytes(4, 128)),
    Row("rtn(group_size=32,symmetric=true,backend=torch)", 0.11, rtn_bytes(4, 32, zeros=False)),
    Row("rtn(bits=3,group_size=64)", 0.25, rtn_bytes(3, 64)),
    Row("rtn(embeddings=8)", 0.12, rtn_bytes(4, 128)),
    Row("rtn(bits=2,group_size=8)", 0.35, rtn_bytes(2, 8)),
    Row("rtn(bits=2)", 0.65, rtn_bytes(2, 128)),
    Row("hqq", 0.11, hqq_bytes(4, 64)),
    Row("hqq(bits=3,group_size=32,backend=torch)", 0.25, hqq_bytes(3, 32)),
    Row("hqq(bits=2,group_size=32)", 0.55, hqq_bytes(2, 32)),
    Row("hqq(bits=8,group_size=-1)", 0.015, hqq_bytes(8, -1)),
    Row("gptq(samples=8,sequence_length=32)", 0.22, rtn_bytes(4, 128)),
    Row("gptq(bits=3,group_size=32,act_order=false,static_groups=false,samples=8,sequence_length=32)", 0.35,
        rtn_bytes(3, 32)),
    Row("gptq(bits=8,group_size=-1,static_groups=false,samples=8,sequence_length=32)", 0.02, rtn_bytes(8, -1)),
    Row("gptq(group_size=32,symmetric=true,static_groups=false,samples=8,sequence_length=32)", 0.21,
        act_order_bytes(4, 32)),
    Row("gptq(bits=2,group_size=32,symmetric=true,samples=8,sequence_length=32)", 1.0, rtn_bytes(2, 32, zeros=False)),
    Row("awq(n_grid=1,clip=false,samples=8,sequence_length=32)", 0.12, rtn_bytes(4, 128)),
    Row("awq(samples=8,sequence_length=32)", 0.35, rtn_bytes(4, 128)),
    Row("awq(bits=3,group_size=32,symmetric=true,duo_scaling=true,samples=8,sequence_length=32)", 0.5,
        rtn_bytes(3, 32, zeros=False)),
    Row("awq(bits=8,group_size=-1,rounding=gptq,samples=8,sequence_length=32)", 0.35, rtn_bytes(8, -1)),
    Row("magnitude", 0.29, dense_bytes, half),
    Row("magnitude(sparsity=0.3,scope=row,store=bitmask)", 0.15, bitmask_bytes(thirds_of_rows), thirds_of_rows),
    Row("magnitude(sparsity=0.4,scope=global)", 0.29, dense_bytes),
    Row("wanda(pattern=4:8,store=bitmask,samples=8,sequence_length=32)", 0.36, bitmask_bytes(half), half),
    Row("sparsegpt(samples=8,sequence_length=32)", 0.8, dense_bytes, half),
    Row("sparsegpt(pattern=2:4,store=nm,damp=1.0,samples=8,sequence_length=32)", 0.5, nm_bytes(2, 4, 2), half),
    Row("structured", 0.0, dense_bytes, cuts=True),
    Row("structured(keep_layers=none,keep_kv_heads=1,heads=importance,samples=4)", 0.0, dense_bytes, cuts=True),
    Row("p(samples=8,sequence_length=32)", 0.0, dense_bytes, cuts=True),
    Row("kd(samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2,learning_rate=0.001)", 0.06, dense_bytes),
    Row("distilled(targets=all,samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2,warmup=0,learning_rate=0.005)",
        0.06, dense_bytes),
    Row("recover(rank=4,learning_rate=0.003,warmup=0)", 0.3, dense_bytes),
)  # fmt: skip
