"""What the contract of methods expects: rows of settings, the cheapest parameters, and the checks that must fail.

Methods come from the registry. A new one adds its rows to EXPECTED; without any the completeness test of the contract
fails. What its parameters must be to run in a moment stands in CHEAPEST.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from compression import Recipe
from compression.recipes.registry import built_in


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


def fp4_bytes(group, whole):
    """Half a byte to a weight, a byte to a group, and `whole` bytes to the weight."""
    return lambda rows, cols, itemsize: rows * cols // 2 + rows * (cols // group) + whole


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


def int8_bytes(rows, cols, itemsize):
    """A byte to a weight, one fp32 scale to a row."""
    return rows * cols + 4 * rows


def range_bytes(bits, clusters, index=True):
    """Codes, one fp32 scale to a row; fp32 steps and zero points of clusters of inputs, and 2 bytes to each input."""
    return lambda rows, cols, itemsize: rows * (cols * bits // 8 + 4) + 8 * clusters + 2 * cols * index


def signed_bytes(bits):
    """Codes of `bits` bits, one fp32 scale to a row."""
    return lambda rows, cols, itemsize: rows * math.ceil(cols * bits / 8) + 4 * rows


def level_bytes(bits):
    """Dense layers, those of keys and values with fp32 levels and two thresholds to a channel behind them."""
    heads = 64  # outputs of keys and of values in the tiny shapes
    return lambda rows, cols, itemsize: rows * cols * itemsize + (rows == heads) * 4 * rows * (2**bits + 2)


def block_bytes(size):
    """Blocks of 32 weights, in so many bytes each."""
    return lambda rows, cols, itemsize: rows * cols // 32 * size


def super_block_bytes(size, fallback):
    """Blocks of 256 weights in so many bytes, and of 32 where these do not tile a row."""
    return lambda rows, cols, itemsize: rows * (cols // 32 * fallback if cols % 256 else cols // 256 * size)


def sliced_bytes(share):
    """Untied embeddings and head, norms, and a square matrix beside each half of a block."""

    def count(config, itemsize):
        width, halves = int(config.hidden_size * (1 - share)) // 8 * 8, 2 * config.num_hidden_layers
        return itemsize * (2 * config.vocab_size * width + (halves + 1) * width + halves * width**2)

    return count


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
    """Settings of a method, the relative error of outputs and weights of a Gaussian layer under them, and its size.

    Attributes:
        error: |y - y_dense| / |y_dense|, Frobenius, for Gaussian weights and inputs. (Calibrated methods are worse on
            these than rounding to nearest: they trade them for the inputs that they have seen. `awq` scales weights
            besides, which counts as error here; `test_scaling.py` compares what the whole block computes.)
        stored: bytes of a layer without its bias, from (rows, cols, bytes of the base's dtype).
        settings: parameters as recipes write them; those of CHEAPEST are added.
        zeros: how many weights of a layer are zero, from (rows, cols); None where nothing is promised of one layer.
        cuts: whether layers, or rows and columns of them, are taken out; what is left keeps its bits.
        whole: whether a layer is changed together with what is before it or behind it, so that `error` is that of the
            logits of the model.
        kept: the bytes of the model beside its linear layers, where they change too, from its configuration.
        unties: whether the head has a weight of its own afterwards.
        second: whether the contract runs on the second shape too: one row for each kind of stored tensors.
    """

    error: float
    stored: Callable[[int, int, int], int]
    settings: str = ""
    zeros: Callable[[int, int], int] | None = None
    cuts: bool = False
    second: bool = False
    whole: bool = False
    kept: Callable[..., int] | None = None
    unties: bool = False


@dataclass(frozen=True)
class Case:
    """A row of a registered method, as the contract runs it."""

    method: str
    row: Row

    @property
    def recipe(self) -> str:
        parameters = ",".join(filter(None, (self.row.settings, CHEAPEST.get(self.method, ""))))
        return f"{self.method}({parameters})" if parameters else self.method

    def __str__(self) -> str:
        return self.recipe


FEW = "samples=8,sequence_length=32"  # of calibration text
CHEAPEST = {
    "awq": FEW,
    "fp8": FEW,
    "int8": FEW,
    "nvfp4": FEW,
    "mxfp4": FEW,
    "olive": FEW,
    "distilled": "samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2,warmup=0",
    "gptq": FEW,
    "kd": "samples=4,sequence_length=16,epochs=1,batch=2,accumulation=2",
    "kivi": "group_size=4,residual=2",
    "kvquant": FEW,
    "os_plus": f"{FEW},steps=3",
    "p": FEW,
    "quarot": FEW,
    "recover": "rank=4,warmup=0",
    "rptq": FEW,
    "slicegpt": FEW,
    "smoothquant": FEW,
    "sparsegpt": FEW,
    "spinquant": f"steps=2,{FEW}",
    "structured": "samples=4",
    "wanda": FEW,
}

REFUSED_GROUPS = {  # what a method says of 200 inputs that has no parameter group_size
    "nvfp4": ("group_size=16 does not divide the 200 inputs",),
    "mxfp4": ("group_size=32 does not divide the 200 inputs",),
    "gguf": ("has blocks of 32 weights, which do not tile 200 inputs",),
}
TRAINS = "training fills zeros that no step before it has pruned"
EXPECTED_FAILURES = {  # by method and check, and why
    ("kd", "test_a_weight_of_zero_gives_the_bias_alone"): TRAINS,
    ("distilled", "test_a_weight_of_zero_gives_the_bias_alone"): TRAINS,
    ("recover", "test_a_weight_of_zero_gives_the_bias_alone"): TRAINS,
}

EXPECTED = {
    "nf4": (
        Row(0.11, nf4_bytes(64), second=True),
        Row(0.10, nf4_bytes(32, double=False), "double_quant=false,group_size=32", second=True),
        Row(0.11, nf4_bytes(64), "compute_dtype=bfloat16"),
        Row(0.11, nf4_bytes(64), "compute_dtype=float16,backend=bitsandbytes"),
    ),
    "int8": (
        Row(0.02, int8_bytes, second=True),
        Row(
            0.1,
            lambda rows, cols, itemsize: int8_bytes(rows, cols, itemsize) + 4,
            "activations=static",
            second=True,
            whole=True,
        ),
        Row(
            0.1,
            range_bytes(8, 1, index=False),
            "activations=static,symmetric=false,observer=mse",
            second=True,
            whole=True,
        ),
        Row(0.3, lambda rows, cols, itemsize: rows * cols // 2 + 4 * rows, "bits=4,scale=power_of_two", second=True),
    ),
    "fp8": (
        Row(0.05, rtn_bytes(8, -1, zeros=False), second=True),
        Row(
            0.1,
            lambda rows, cols, itemsize: rtn_bytes(8, -1, zeros=False)(rows, cols, itemsize) + 4,
            "activations=static",
            second=True,
            whole=True,
        ),
    ),
    "os_plus": (
        Row(0.1, lambda rows, cols, itemsize: int8_bytes(rows, cols, itemsize) + 4, second=True, whole=True),
        Row(0.1, int8_bytes, "activations=token,shift=false", whole=True),
    ),
    "rptq": (
        Row(0.5, range_bytes(4, 8), "clusters=8", second=True, whole=True),  # 4 to each of two heads of values
        Row(0.1, range_bytes(8, 8), "clusters=8,bits=8,activation_bits=8,rounding=nearest", whole=True),
    ),
    "nvfp4": (Row(0.5, fp4_bytes(16, 8), second=True, whole=True),),
    "mxfp4": (
        Row(0.35, fp4_bytes(32, 0), second=True),
        Row(0.5, fp4_bytes(32, 0), "rounding=gptq"),
    ),
    "olive": (
        Row(0.6, lambda rows, cols, itemsize: rows * cols // 2 + 4 * rows + 4, second=True, whole=True),
        Row(0.2, lambda rows, cols, itemsize: rows * cols // 2 + 4 * rows, "activation_bits=16", second=True),
    ),
    "llm_int8": (Row(0.02, lambda rows, cols, itemsize: rows * cols + 4 * rows, second=True),),
    "rtn": (
        Row(0.012, rtn_bytes(8, 128), "bits=8"),
        Row(0.015, rtn_bytes(8, -1, zeros=False), "bits=8,group_size=-1,symmetric=true"),
        Row(0.12, rtn_bytes(4, 128), second=True),
        Row(0.11, rtn_bytes(4, 32, zeros=False), "group_size=32,symmetric=true,backend=torch", second=True),
        Row(0.25, rtn_bytes(3, 64), "bits=3,group_size=64"),
        Row(0.12, rtn_bytes(4, 128), "embeddings=8", second=True),
        Row(0.35, rtn_bytes(2, 8), "bits=2,group_size=8"),
        Row(0.65, rtn_bytes(2, 128), "bits=2"),
    ),
    "rtn_fp": (
        Row(0.03, rtn_bytes(8, -1, zeros=False), second=True),
        Row(0.15, fp4_bytes(16, 4), "element=e2m1,group_size=16,scale=e4m3", second=True),
        Row(0.25, fp4_bytes(32, 0), "element=e2m1,group_size=32,scale=e8m0", second=True),  # cuts 8 steps off to 6
    ),
    "hqq": (
        Row(0.11, hqq_bytes(4, 64), second=True),
        Row(0.25, hqq_bytes(3, 32), "bits=3,group_size=32,backend=torch"),
        Row(0.55, hqq_bytes(2, 32), "bits=2,group_size=32"),
        Row(0.015, hqq_bytes(8, -1), "bits=8,group_size=-1"),
    ),
    "gguf": (
        Row(0.1, block_bytes(18), "type=q4_0", second=True),
        Row(0.1, block_bytes(20), "type=q4_1"),
        Row(0.05, block_bytes(22), "type=q5_0"),
        Row(0.05, block_bytes(24), "type=q5_1"),
        Row(0.01, block_bytes(34), "type=q8_0"),
        Row(0.1, super_block_bytes(144, 22), "type=q4_k"),
        Row(0.03, super_block_bytes(210, 34), "type=q6_k"),
    ),
    "gptq": (
        Row(0.22, rtn_bytes(4, 128)),
        Row(0.35, rtn_bytes(3, 32), "bits=3,group_size=32,act_order=false,static_groups=false"),
        Row(0.02, rtn_bytes(8, -1), "bits=8,group_size=-1,static_groups=false"),
        Row(0.21, act_order_bytes(4, 32), "group_size=32,symmetric=true,static_groups=false", second=True),
        Row(1.0, rtn_bytes(2, 32, zeros=False), "bits=2,group_size=32,symmetric=true"),
    ),
    "awq": (
        Row(0.12, rtn_bytes(4, 128), "n_grid=1,clip=false"),
        Row(0.35, rtn_bytes(4, 128)),
        Row(0.5, rtn_bytes(3, 32, zeros=False), "bits=3,group_size=32,symmetric=true,duo_scaling=true"),
        Row(0.35, rtn_bytes(8, -1), "bits=8,group_size=-1,rounding=gptq"),
    ),
    "magnitude": (
        Row(0.29, dense_bytes, zeros=half, second=True),
        Row(0.15, bitmask_bytes(thirds_of_rows), "sparsity=0.3,scope=row,store=bitmask", thirds_of_rows, second=True),
        Row(0.29, dense_bytes, "sparsity=0.4,scope=global"),
    ),
    "wanda": (Row(0.36, bitmask_bytes(half), "pattern=4:8,store=bitmask", half),),
    "sparsegpt": (
        Row(0.8, dense_bytes, zeros=half),
        Row(0.5, nm_bytes(2, 4, 2), "pattern=2:4,store=nm,damp=1.0", half, second=True),
    ),
    "structured": (
        Row(0.0, dense_bytes, cuts=True),
        Row(0.0, dense_bytes, "keep_layers=none,keep_kv_heads=1,heads=importance", cuts=True),
    ),
    "p": (Row(0.0, dense_bytes, cuts=True),),
    "slicegpt": (Row(1.0, dense_bytes, second=True, whole=True, kept=sliced_bytes(0.25)),),
    "smoothquant": (
        Row(0.05, int8_bytes, second=True, whole=True),
        Row(
            0.1,
            lambda rows, cols, itemsize: int8_bytes(rows, cols, itemsize) + 4,
            "alpha=0.8,activations=static,smooth=norms",
            second=True,
            whole=True,
        ),
    ),
    "quarot": (
        Row(0.6, signed_bytes(4), second=True, whole=True, unties=True),
        Row(
            0.1,
            lambda rows, cols, itemsize: int8_bytes(rows, cols, itemsize) + 4,
            "bits=8,activation_bits=8,activations=static,rounding=gptq",
            second=True,
            whole=True,
            unties=True,
        ),
        Row(0.4, signed_bytes(4), "rotation=identity,activation_bits=16", whole=True, unties=True),
    ),
    "spinquant": (Row(0.6, signed_bytes(4), whole=True, unties=True),),
    "kv_int": (Row(0.3, dense_bytes, "bits=4,keys=channel,tokens=4,residual=1,keep_first=1", second=True, whole=True),),
    "kv_fp8": (Row(0.1, dense_bytes, whole=True),),
    "kivi": (Row(0.6, dense_bytes, whole=True),),
    "kvquant": (Row(0.2, level_bytes(3), second=True, whole=True),),
    "kd": (Row(0.06, dense_bytes, "learning_rate=0.001"),),
    "distilled": (Row(0.06, dense_bytes, "targets=all,learning_rate=0.005"),),
    "recover": (Row(0.3, dense_bytes, "learning_rate=0.003"),),
}

CASES = [Case(name, row) for name in built_in() for row in EXPECTED.get(name, ())]


def needs(recipe: str) -> set[str]:
    """What the methods of a recipe need besides the package, by their tags and the kernels that the recipe names."""
    found = {need for step in Recipe.parse(recipe).steps for need in step.method.info.needs}
    return found | {"bitsandbytes"} if "bitsandbytes" in recipe else found
