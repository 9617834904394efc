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

from compression.checkpoints.formats.layer import FLOATS, AffineStore, StoredTensor, order_of
from compression.layers.codes import Codes
from compression.numeric import packing
from compression.numeric.packing import shift_zeros, to_bytes, to_words


class GPTQStore(AffineStore):
    """See the module. `v1`: zero points are stored less one; `desc_act`: g_idx has to be there."""

    telling = ("g_idx",)

    def __init__(self, bits: int, group_size: int, *, symmetric: bool, v1: bool, desc_act: bool):
        super().__init__(bits, group_size, symmetric=symmetric)
        self.v1, self.desc_act = v1, desc_act

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        bits, groups, words = self.bits, self.groups(cols), (torch.int32,)
        return {
            "qweight": StoredTensor(((cols * bits // 32, rows),), words),
            "qzeros": StoredTensor(((groups, rows * bits // 32),), words),
            "scales": StoredTensor(((groups, rows),), FLOATS),
            "g_idx": StoredTensor(((cols,),), words, optional=not self.desc_act),
        }

    def unfit(self, rows: int, cols: int) -> str | None:
        for what, count in (("inputs", cols), ("outputs", rows)):
            if count * self.bits % 32:
                return f"{count} {what} of {self.bits} bits do not fill whole 32-bit words"
        return None

    def order(self, tensors: dict[str, Tensor], cols: int) -> Tensor | None:
        return order_of(tensors["g_idx"], cols, self.groups(cols)) if "g_idx" in tensors else None

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        codes = to_bytes(tensors["qweight"].t())  # a column of words is a row of our own packing
        qzeros = shift_zeros(tensors["qzeros"], self.bits, 1) if self.v1 else tensors["qzeros"]
        zeros = packing.unpack(to_bytes(qzeros), self.bits, rows).t().contiguous()
        order = self.order(tensors, cols)
        if order is not None:
            codes = packing.pack(packing.unpack(codes, self.bits, cols)[:, order], self.bits)
        return self.part(codes, tensors["scales"].t().contiguous(), zeros, cols, dtype, order)

    def write(self, part: Codes) -> dict[str, Tensor]:
        """Always with `g_idx`, which vLLM and GPTQModel expect."""
        bits, codes, cols = self.bits, part.canonical(), part.shape[1]
        g_idx = torch.arange(cols, device=codes.device) // (cols // self.groups(cols))
        if part.permutation is not None:
            inverse = part.permutation.argsort()
            codes = packing.pack(packing.unpack(codes, bits, cols)[:, inverse], bits)
            g_idx = g_idx[inverse]
        qzeros = to_words(packing.pack(self.zeros(part).t().contiguous(), bits))
        return {
            "qweight": to_words(codes).t().contiguous(),
            "qzeros": shift_zeros(qzeros, bits, -1) if self.v1 else qzeros,
            "scales": part.scales.half().t().contiguous(),
            "g_idx": g_idx.int(),
        }
