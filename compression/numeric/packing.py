"""Bit packing: unsigned codes of 1 to 8 bits, stored without a wasted bit.

Layout: the codes of a row form one little-endian bit stream, code i at bits [i*bits, (i+1)*bits). Where 8 is a
multiple of `bits` that is 8/bits codes to a byte, lowest bits first; else 8 codes fill exactly `bits` bytes. Rows start
at whole bytes, so a row can be read alone; at most 7 bits at its end are padding, and those are zero.
"""

from typing import Literal

import torch
from torch import Tensor


def _word(bits: int) -> tuple[torch.dtype, int, int]:
    """(integer type to assemble a word in, codes per word, bytes per word)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} must be between 1 and 8")
    return (torch.uint8, 8 // bits, 1) if 8 % bits == 0 else (torch.int64, 8, bits)


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of a row take.

    >>> packed_width(128, 3), packed_width(128, 4), packed_width(5, 4)
    (48, 64, 3)
    """
    _word(bits)
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension.

    Args:
        codes: uint8 (..., n), every value below 2**bits.
        bits: 1 to 8.

    Returns:
        uint8 (..., packed_width(n, bits)).

    Raises:
        ValueError: a code does not fit or is not of type uint8, or `bits` is out of range.
    """
    dtype, per_word, word_bytes = _word(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be of type torch.uint8, not {codes.dtype}")
    if codes.numel() and not codes.is_meta and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes.clone()
    width = packed_width(codes.shape[-1], bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // per_word, dtype=dtype, device=codes.device)
    for i in range(per_word):
        words |= codes[..., i::per_word].to(dtype) << (i * bits)
    if word_bytes == 1:
        return words
    shifts = torch.arange(0, 8 * word_bytes, 8, device=codes.device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8).flatten(-2)[..., :width].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 (..., packed_width(count, bits)) -> uint8 (..., count)."""
    dtype, per_word, word_bytes = _word(bits)
    if bits == 8:
        return packed[..., :count].clone()
    if word_bytes > 1:
        if packed.shape[-1] % word_bytes:
            packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % word_bytes))
        grouped = packed.unflatten(-1, (-1, word_bytes)).to(dtype)
        words = grouped[..., 0].clone()
        for i in range(1, word_bytes):
            words |= grouped[..., i] << (8 * i)
    else:
        words = packed
    shifts = torch.arange(0, per_word * bits, bits, device=packed.device, dtype=dtype)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def to_bytes(words: Tensor) -> Tensor:
    """int32 (n, m) -> uint8 (n, 4 m), lowest bits first."""
    return words.reshape(-1).view(torch.uint8).view(len(words), -1)


def to_words(packed: Tensor) -> Tensor:
    """uint8 (n, 4 m) -> int32 (n, m): the inverse of `to_bytes`."""
    return packed.reshape(-1).view(torch.int32).view(len(packed), -1)


def shift_zeros(qzeros: Tensor, bits: int, by: Literal[1, -1]) -> Tensor:
    """Packed zero points between version "gptq" (`by` 1 for reading, -1 for writing) and "gptq_v2"."""
    if bits == 3:
        zeros = unpack(to_bytes(qzeros), bits, qzeros.shape[1] * 32 // bits)
        return to_words(pack(zeros + by & 7, bits))
    return qzeros + by * sum(1 << i for i in range(0, 32, bits))  # of int32: modulo 2**32
