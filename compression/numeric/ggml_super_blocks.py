"""The ggml types whose blocks hold 256 weights in groups with scales of their own: raw bytes to numbers, and back.

    Q2_K   16 bytes: 4 bits of scale s, 4 of minimum m for each 16 weights; 64 bytes of 2 bits; d, dmin fp16
           x = d s q - dmin m
    Q3_K   32 bytes of third bits; 64 bytes of 2 bits; 12 bytes of 6-bit scales for each 16 weights; d fp16
           x = d (s - 32) (q - 4)
    Q4_K   d, dmin fp16; 12 bytes of 6-bit scales and minima for each 32 weights; 128 bytes of 4 bits
           x = d s q - dmin m
    Q5_K   d, dmin fp16; the same 12 bytes; 32 bytes of fifth bits; 128 bytes of 4 bits
    Q6_K   128 bytes of low 4 bits; 64 bytes of high 2 bits; 16 int8 scales for each 16 weights; d fp16
           x = d s (q - 32)

Shapes: blocks uint8 (n, bytes), weights fp32 (n, 256).
Source of layouts and rounding: ggml, ggml-common.h, quantize_row_q4_K_ref and quantize_row_q6_K_ref of ggml-quants.c;
the searches of scales are in `ggml_searches`.
"""

import torch
from torch import Tensor

from compression.numeric import ggml_searches
from compression.numeric.ggml_blocks import half_at, half_bytes

SIZE = 256
NO_SCALE = 1e-15  # a scale that is smaller is zero


def decode_q2_k(blocks: Tensor) -> Tensor:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80], 2)
    d = (half_at(blocks, 80) * (scales & 15).float())[..., None]
    m = (half_at(blocks, 82) * (scales >> 4).float())[..., None]
    return (d * codes.view(-1, 16, 16).float() - m).view(-1, SIZE)


def decode_q3_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = torch.cat([low & 15, low >> 4], -1) | (_shifted(high, 2) << 4)
    d = half_at(blocks, 108) * (scales.float() - 32)
    codes = _fields(blocks[:, 32:96], 2) | (_shifted(blocks[:, :32], 1) << 2)
    return (d[..., None] * (codes.view(-1, 16, 16).float() - 4)).view(-1, SIZE)


def decode_q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _fields(blocks[:, 16:], 4))


def decode_q5_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _fields(blocks[:, 48:], 4) | (_shifted(blocks[:, 16:48], 1) << 4))


def decode_q6_k(blocks: Tensor) -> Tensor:
    codes = _fields(blocks[:, :128], 4, run=64) | (_fields(blocks[:, 128:192], 2) << 4)
    d = half_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (d[..., None] * (codes.view(-1, 16, 16).float() - 32)).view(-1, SIZE)


def encode_q4_k(x: Tensor) -> Tensor:
    """Scale and minimum of every 32 by search, rounded to 6 bits of the largest of the eight; codes to nearest."""
    groups = x.reshape(-1, 32)
    scale, least, found = ggml_searches.scale_and_minimum(groups, steps=15)
    scales, minima = scale.view(-1, 8), least.view(-1, 8)
    d, dmin = (torch.where((top := each.amax(-1, keepdim=True)) > 0, top, 0.0) for each in (scales, minima))
    s, m = (
        torch.where(top > 0, (top.new_tensor(63) / top * each).round().clamp(max=63), 0.0)
        for top, each in ((d, scales), (dmin, minima))
    )
    stored_d, stored_m = half_bytes(d / 63), half_bytes(dmin / 63)
    step = (half_at(stored_d, 0) * s).view(-1, 1)
    offset = (half_at(stored_m, 0) * m).view(-1, 1)
    codes = torch.where(step == 0, found, ((groups + offset) / step).round().clamp(0, 15)).to(torch.uint8)
    low, high = codes.view(-1, 4, 2, 32).unbind(2)
    packed = (low | (high << 4)).view(-1, 128)
    return torch.cat([stored_d, stored_m, _six_bits(s.to(torch.uint8), m.to(torch.uint8)), packed], -1)


def encode_q6_k(x: Tensor) -> Tensor:
    """Scale of every 16 by search, rounded to 8 bits so that the largest of the sixteen is -128; codes to nearest."""
    groups = x.reshape(-1, 16)
    scale, found = ggml_searches.scale_around_zero(groups, middle=32)
    scales = scale.view(-1, 16)
    top = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    none = top.abs() < NO_SCALE
    inverse = -128 / torch.where(none, torch.ones_like(top), top)
    d = torch.where(none, torch.zeros_like(top), 1 / inverse)
    s = torch.where(none, torch.zeros_like(scales), (inverse * scales).round().clamp(max=127))
    stored = half_bytes(d)
    step = (half_at(stored, 0) * s).view(-1, 1)
    codes = torch.where(step == 0, found, (groups / step).round().clamp(-32, 31) + 32)
    codes = torch.where(none.repeat_interleave(16, 0), torch.zeros_like(codes), codes).to(torch.uint8)
    halves = codes.view(-1, 2, 4, 32)
    low = (halves & 15).view(-1, 2, 2, 64)
    high = halves >> 4
    high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    low = low[:, :, 0] | (low[:, :, 1] << 4)
    return torch.cat([low.reshape(-1, 128), high.reshape(-1, 64), s.to(torch.int8).view(torch.uint8), stored], -1)


def _shifted(packed: Tensor, bits: int) -> Tensor:
    """uint8 (n, w) -> (n, w 8 / bits): the lowest bits of all bytes, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    return ((packed[:, None] >> shifts) & (2**bits - 1)).flatten(1)


def _fields(packed: Tensor, bits: int, run: int = 32) -> Tensor:
    """The same for every `run` bytes by themselves: uint8 (n, 256)."""
    return _shifted(packed.reshape(-1, run), bits).view(len(packed), SIZE)


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Of Q4_K and Q5_K: x = d s q - dmin m."""
    scales, minima, both = blocks[:, 4:16].split(4, -1)
    s = torch.cat([scales & 63, (both & 15) | ((scales >> 2) & 48)], -1).float()
    m = torch.cat([minima & 63, (both >> 4) | ((minima >> 2) & 48)], -1).float()
    d, least = ((half_at(blocks, at) * each)[..., None] for at, each in ((0, s), (2, m)))
    return (d * codes.view(-1, 8, 32).float() - least).view(-1, SIZE)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima below 64 in 12 bytes: the first four of each, with the high bits of the others on
    top, then the low bits of these."""
    first = [each[:, :4] | ((each[:, 4:] >> 4) << 6) for each in (s, m)]
    return torch.cat([*first, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], -1)
