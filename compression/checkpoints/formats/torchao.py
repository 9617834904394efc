"""The format of torchao: one linear layer as its tensor classes are flattened into safetensors.

    _weight_qdata         int8 or float8_e4m3fn (out, in)
    _weight_scale         float, one to each block: (out / rows of a block, in / columns of a block)
    _weight_zero_point    int8, of whole numbers; 0 everywhere where they are symmetric

What they stand for is what int-quantized and float-quantized of compressed-tensors do, under other names.

Source: torchao 0.18, `prototype/safetensors/safetensors_support.py`, `quantization/quantize_/workflows`.
"""

import torch
from torch import Tensor

from compression.checkpoints.formats.compressed_tensors import Whole
from compression.checkpoints.formats.layer import StoredTensor
from compression.checkpoints.formats.torchao_config import QDATA
from compression.layers.codes import Codes

_NAMES = {"weight": QDATA, "weight_scale": "_weight_scale", "weight_zero_point": "_weight_zero_point"}


class TorchAOStore(Whole):
    """Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor."""

    def scale_shapes(self, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
        return ((1, 1), *super().scale_shapes(rows, cols)) if self.scheme.strategy == "tensor" else (
            super().scale_shapes(rows, cols))  # fmt: skip

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        return {_NAMES[name]: stored for name, stored in super().tensors(rows, cols).items()}

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        return super().read({name: tensors[theirs] for name, theirs in _NAMES.items() if theirs in tensors}, rows, cols,
                            dtype)  # fmt: skip
