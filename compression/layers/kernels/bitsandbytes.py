"""Products of bitsandbytes: NF4, and LLM.int8()."""

import torch
from torch import Tensor

from compression.layers.kernels.kernel import Accepts, Kernel, LayerSpec, Product, unlimited
from compression.numeric.grids import Int8RowGrid
from compression.numeric.grouping import Params
from compression.numeric.normal_float import DOUBLE_QUANT_BLOCK, NF4Grid, dynamic_levels


def _bitsandbytes_missing() -> str | None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
    return None


def _bnb4_refuses(spec: LayerSpec) -> str | None:
    if spec.device_type == "cpu" and spec.backend == "auto":
        return "on CPU only when asked for by backend=bitsandbytes"
    return _bitsandbytes_missing()


def _bnb4_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    """bitsandbytes holds the first of two codes in the high half of a byte."""
    return _bnb4_unpack(codes, spec)


def _bnb4_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return (layout << 4 | layout >> 4).view(spec.out_features, -1)


def _bnb4_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    import bitsandbytes
    import bitsandbytes.functional as F

    grid, shape = spec.grid, torch.Size((spec.out_features, spec.in_features))
    common = {"shape": shape, "blocksize": grid.group_size, "quant_type": "nf4", "dtype": spec.dtype,
              "code": grid.table(layout.device)}  # fmt: skip
    if "absmax" in params:
        state = F.QuantState(absmax=params["absmax"], **common)
    else:
        levels = dynamic_levels(str(layout.device))
        outer = F.QuantState(
            absmax=params["absmax_scales"], code=levels, blocksize=DOUBLE_QUANT_BLOCK, dtype=torch.float32
        )
        state = F.QuantState(absmax=params["absmax_codes"], offset=params["absmax_offset"], state2=outer, **common)
    flat = layout.view(-1, 1)
    return lambda x: bitsandbytes.matmul_4bit(x, flat, quant_state=state)


def _bnb8_refuses(spec: LayerSpec) -> str | None:
    return _bitsandbytes_missing()


def _bnb8_pack(codes: Tensor, params: Params, spec: LayerSpec) -> Tensor:
    return (codes ^ 0x80).view(torch.int8)


def _bnb8_unpack(layout: Tensor, spec: LayerSpec) -> Tensor:
    return layout.view(torch.uint8) ^ 0x80


def _bnb8_bind(layout: Tensor, params: Params, spec: LayerSpec) -> Product:
    import bitsandbytes

    state, threshold = bitsandbytes.MatmulLtState(), spec.inputs[0]["threshold"]
    state.CB, state.SCB, state.threshold = layout, params["absmax"], threshold
    state.has_fp16_weights = state.is_training = False

    def product(x: Tensor) -> Tensor:
        # bitsandbytes quantizes activations from fp16, whatever their dtype: the cast is made here, not warned of there
        return bitsandbytes.matmul(x.to(torch.float16), layout, state=state, threshold=threshold).to(x.dtype)

    return product


BNB4 = Kernel(
    name="bitsandbytes-nf4", library="bitsandbytes", refuses=_bnb4_refuses,
    accepts=Accepts(words="NF4 weights only", grids=(NF4Grid,)),
    pack=_bnb4_pack, unpack=_bnb4_unpack,
    bind=_bnb4_bind, max_rows=unlimited,
)  # fmt: skip
BNB8 = Kernel(
    name="bitsandbytes-int8", library="bitsandbytes", refuses=_bnb8_refuses,
    accepts=Accepts(words="LLM.int8() only", grids=(Int8RowGrid,), inputs=("outlier_columns",)),
    pack=_bnb8_pack, unpack=_bnb8_unpack,
    bind=_bnb8_bind, max_rows=unlimited, graph_safe=False,
)  # fmt: skip
