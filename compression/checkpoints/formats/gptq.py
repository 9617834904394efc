"""The GPTQ format: one linear layer as AutoGPTQ and GPTQModel write it.

    qweight  int32 (in * bits / 32, out)      codes of a column form one little-endian bit stream along the inputs; at
                                              3 bits 32 codes fill 3 words
    qzeros   int32 (groups, out * bits / 32)  zero points, in the same order along the outputs; version "gptq" stores
                                              them less one, "gptq_v2" as they are
    scales   fp16 (groups, out)
    g_idx    int32 (in,)                      the group of each input; left out by some where it is input // group_size

    W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]),   g = g_idx[i]

The less-one of version "gptq" wraps: GPTQModel adds 1 to every field of a packed word by one addition of words, so that
a field of all ones carries into its neighbour (as the subtraction that wrote it had borrowed); at 3 bits it adds field
by field, modulo 8. That is done here too. AutoGPTQ reads a field of all ones as 2**bits instead; where none is stored,
which holds for all symmetric checkpoints, the two are the same.

Sources: GPTQModel 7.6, `nn_modules/qlinear/__init__.py` (`pack_block`, `dequantize_weight`), `utils/model.py`
(`convert_gptq_v1_to_v2_format_module`); AutoGPTQ, `nn_modules/qlinear/qlinear_cuda.py`.
"""

import torch
from torch import Tensor

from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.layer import Shapes, StoredLayer
from compression.numeric import packing
from compression.numeric.packing import shift_zeros, to_bytes, to_words

OPTIONAL = ("g_idx",)


def shapes(published: Published, rows: int, cols: int, groups: int) -> Shapes:
    """Shape of each tensor of a layer of `rows` outputs and `cols` inputs."""
    bits = published.bits
    return {
        "qweight": (cols * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
        "g_idx": (cols,),
    }


def check_shape(published: Published, rows: int, cols: int) -> str | None:
    """Why the format cannot hold a layer of this shape, or None."""
    for what, count in (("inputs", cols), ("outputs", rows)):
        if count * published.bits % 32:
            return f"{count} {what} of {published.bits} bits do not fill whole 32-bit words"
    return None


def read(tensors: dict[str, Tensor], published: Published) -> StoredLayer:
    """The layer that `tensors` (of the shapes above) stand for.

    Raises:
        ValueError: the groups of `g_idx` are not all of one size.
    """
    bits, scales = published.bits, tensors["scales"]
    groups, rows = scales.shape
    codes = to_bytes(tensors["qweight"].t())  # a column of words is a row of our own packing
    qzeros = tensors["qzeros"]
    if published.version == "gptq":
        qzeros = shift_zeros(qzeros, bits, 1)
    zeros = packing.unpack(to_bytes(qzeros), bits, rows)
    cols = codes.shape[1] * 8 // bits
    permutation = _order(tensors["g_idx"], cols, groups) if "g_idx" in tensors else None
    if permutation is not None:
        codes = packing.pack(packing.unpack(codes, bits, cols)[:, permutation], bits)
    return StoredLayer(codes, scales.t().contiguous(), zeros.t().contiguous(), permutation)


def write(layer: StoredLayer, published: Published) -> dict[str, Tensor]:
    """The inverse of `read`; always with `g_idx`, which vLLM and GPTQModel expect."""
    bits, codes = published.bits, layer.codes
    cols, groups = codes.shape[1] * 8 // bits, layer.scales.shape[1]
    g_idx = torch.arange(cols, device=codes.device) // (cols // groups)
    if layer.permutation is not None:
        inverse = layer.permutation.argsort()
        codes = packing.pack(packing.unpack(codes, bits, cols)[:, inverse], bits)
        g_idx = g_idx[inverse]
    qzeros = to_words(packing.pack(layer.zeros.t().contiguous(), bits))
    if published.version == "gptq":
        qzeros = shift_zeros(qzeros, bits, -1)
    return {
        "qweight": to_words(codes).t().contiguous(),
        "qzeros": qzeros,
        "scales": layer.scales.t().contiguous(),
        "g_idx": g_idx.int(),
    }


def _order(g_idx: Tensor, cols: int, groups: int) -> Tensor | None:
    """The order of the inputs in which groups are contiguous, int64 (cols,); None if they are already."""
    if torch.equal(g_idx.long(), torch.arange(cols, device=g_idx.device) // (cols // groups)):
        return None
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= groups:  # before a table of as many groups is made
        raise ValueError(f"g_idx names groups from {lowest} to {highest}; there are 0 to {groups - 1}")
    if not (torch.bincount(g_idx, minlength=groups) == cols // groups).all():
        raise ValueError(f"g_idx does not divide {cols} inputs into {groups} groups of {cols // groups}")
    return g_idx.argsort(stable=True)
