"""The AWQ format, version "gemm": one linear layer as AutoAWQ writes it, 4 bits with zero points.

    qweight  int32 (in, out / 8)      8 outputs to a word, lowest bits first, in the order 0 2 4 6 1 3 5 7
    qzeros   int32 (groups, out / 8)  zero points, likewise
    scales   fp16 (groups, out)

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),   g = i // group_size

Sources: AutoAWQ, `modules/linear/gemm.py` (`WQLinear_GEMM.from_linear`); GPTQModel 7.6,
`quantization/awq/utils/packing_utils.py`.
"""

import torch
from torch import Tensor

from compression.checkpoints.formats.layer import FLOATS, AffineStore, StoredTensor
from compression.layers.codes import Codes
from compression.numeric import packing
from compression.numeric.packing import to_bytes, to_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word from its lowest bits on
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each output of 8 is in the word


class AWQStore(AffineStore):
    """See the module; for weights whose columns are in order."""

    def __init__(self, group_size: int):
        super().__init__(4, group_size, symmetric=False)

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        groups, words = self.groups(cols), (torch.int32,)
        return {
            "qweight": StoredTensor(((cols, rows // 8),), words),
            "qzeros": StoredTensor(((groups, rows // 8),), words),
            "scales": StoredTensor(((groups, rows),), FLOATS),
        }

    def unfit(self, rows: int, cols: int) -> str | None:
        return f"{rows} outputs do not fill whole words of 8" if rows % 8 else None

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        codes, zeros = _unpack(tensors["qweight"]), _unpack(tensors["qzeros"])
        packed = packing.pack(codes.t().contiguous(), 4)
        return self.part(packed, tensors["scales"].t().contiguous(), zeros.t().contiguous(), cols, dtype, None)

    def write(self, part: Codes) -> dict[str, Tensor]:
        codes = packing.unpack(part.canonical(), 4, part.shape[1])
        scales = part.scales.half().t().contiguous()
        return {"qweight": _pack(codes.t()), "qzeros": _pack(self.zeros(part).t()), "scales": scales}


def _unpack(words: Tensor) -> Tensor:
    """int32 (n, out / 8) -> uint8 (n, out)."""
    stored = packing.unpack(to_bytes(words), 4, words.shape[1] * 8)
    return stored.unflatten(-1, (-1, 8))[..., torch.tensor(PLACES)].flatten(-2)


def _pack(codes: Tensor) -> Tensor:
    """uint8 (n, out) -> int32 (n, out / 8)."""
    return to_words(packing.pack(codes.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER)].flatten(-2), 4))
