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

from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.layer import Shapes, StoredLayer
from compression.numeric import packing
from compression.numeric.packing import to_bytes, to_words

OPTIONAL = ()
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word from its lowest bits on
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each output of 8 is in the word


def shapes(published: Published, rows: int, cols: int, groups: int) -> Shapes:
    """Shape of each tensor of a layer of `rows` outputs and `cols` inputs."""
    return {"qweight": (cols, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}


def check_shape(published: Published, rows: int, cols: int) -> str | None:
    """Why the format cannot hold a layer of this shape, or None."""
    return f"{rows} outputs do not fill whole words of 8" if rows % 8 else None


def read(tensors: dict[str, Tensor], published: Published) -> StoredLayer:
    """The layer that `tensors` (of the shapes above) stand for."""
    codes, zeros = _unpack(tensors["qweight"]), _unpack(tensors["qzeros"])
    scales = tensors["scales"].t().contiguous()
    return StoredLayer(packing.pack(codes.t().contiguous(), 4), scales, zeros.t().contiguous(), None)


def write(layer: StoredLayer, published: Published) -> dict[str, Tensor]:
    """The inverse of `read`, for layers without a permutation."""
    codes = packing.unpack(layer.codes, 4, layer.codes.shape[1] * 2)
    return {"qweight": _pack(codes.t()), "qzeros": _pack(layer.zeros.t()), "scales": layer.scales.t().contiguous()}


def _unpack(words: Tensor) -> Tensor:
    """int32 (n, out / 8) -> uint8 (n, out)."""
    stored = packing.unpack(to_bytes(words), 4, words.shape[1] * 8)
    return stored.unflatten(-1, (-1, 8))[..., torch.tensor(PLACES)].flatten(-2)


def _pack(codes: Tensor) -> Tensor:
    """uint8 (n, out) -> int32 (n, out / 8)."""
    return to_words(packing.pack(codes.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER)].flatten(-2), 4))
