"""The ggml types whose blocks hold 32 weights: raw bytes to numbers, and numbers to raw bytes.

    Q4_0    d fp16, 16 bytes of 4 bits                         x = d (q - 8)
    Q4_1    d fp16, m fp16, 16 bytes of 4 bits                 x = d q + m
    Q5_0    d fp16, 4 bytes of high bits, 16 bytes of 4 bits   x = d (q - 16)
    Q5_1    d fp16, m fp16, 4 bytes, 16 bytes                  x = d q + m
    Q8_0    d fp16, 32 int8                                    x = d q

Byte i of the 16 holds weight i in its low and weight i + 16 in its high bits; bit i of the 4 bytes, the lowest first,
is the fifth bit of weight i. Shapes: blocks uint8 (n, bytes), weights fp32 (n, 32).
Source of layouts and rounding: ggml, ggml-common.h and the functions quantize_row_*_ref of ggml-quants.c. Each
operation is taken in fp32 in their order, so that the bytes are theirs.
"""

import torch
from torch import Tensor

from compression.numeric import packing

SIZE = 32


def half_at(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number that begins at a byte of each block, fp32 (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def half_bytes(values: Tensor) -> Tensor:
    """fp32 (n, 1) as fp16, uint8 (n, 2)."""
    return values.half().contiguous().view(torch.uint8)


def decode_q4_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def decode_q4_1(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * _nibbles(blocks[:, 4:]).float() + half_at(blocks, 2)


def decode_q5_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * (_five_bits(blocks[:, 2:]).float() - 16)


def decode_q5_1(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * _five_bits(blocks[:, 4:]).float() + half_at(blocks, 2)


def decode_q8_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def encode_q4_0(x: Tensor) -> Tensor:
    scale, codes = _around_zero(x, 8)
    return torch.cat([half_bytes(scale), _joined(codes)], -1)


def encode_q4_1(x: Tensor) -> Tensor:
    scale, low, codes = _from_lowest(x, 15)
    return torch.cat([half_bytes(scale), half_bytes(low), _joined(codes)], -1)


def encode_q5_0(x: Tensor) -> Tensor:
    scale, codes = _around_zero(x, 16)
    return torch.cat([half_bytes(scale), packing.pack(codes >> 4, 1), _joined(codes & 15)], -1)


def encode_q5_1(x: Tensor) -> Tensor:
    scale, low, codes = _from_lowest(x, 31)
    return torch.cat([half_bytes(scale), half_bytes(low), packing.pack(codes >> 4, 1), _joined(codes & 15)], -1)


def encode_q8_0(x: Tensor) -> Tensor:
    """d = max|x| / 127; halves are rounded away from zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    size, whole = scaled.abs(), scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (size - whole)).floor())
    return torch.cat([half_bytes(scale), codes.to(torch.int8).view(torch.uint8)], -1)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 (n, 16) -> (n, 32)."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _joined(codes: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _five_bits(packed: Tensor) -> Tensor:
    """Four bytes of high bits and 16 of low ones -> uint8 (n, 32)."""
    return _nibbles(packed[:, 4:]) | (packing.unpack(packed[:, :4], 1, SIZE) << 4)


def _inverse(scale: Tensor) -> Tensor:
    """1 / d; 0 for a scale that is zero, or so small that fp32 has no inverse: fp16 stores it as zero."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


def _around_zero(x: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """Scale (n, 1) and codes: the weight that is largest in magnitude, the first of several, has code 0."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = largest / -middle
    codes = (x * _inverse(scale) + (middle + 0.5)).trunc().clamp(0, 2 * middle - 1)
    return scale, codes.to(torch.uint8)


def _from_lowest(x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (n, 1), lowest weight (n, 1) and codes."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    scale = (high - low) / steps
    codes = ((x - low) * _inverse(scale) + 0.5).trunc().clamp(0, steps)
    return scale, low, codes.to(torch.uint8)
