"""Tensors in the block types of ggml, the library under llama.cpp: raw bytes to weights, and weights to raw bytes.

    decode(raw, type)       uint8 (rows, row_bytes) -> fp32 (rows, cols), bit for bit what ggml reads
    encode(weight, type)    fp32 (rows, cols) -> uint8 (rows, row_bytes), as ggml's reference quantizers round

A row is a whole number of blocks. Layouts and rules of rounding are in `ggml_blocks` and `ggml_super_blocks`. Names are
those of ggml, upper case. No library is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric import ggml_blocks, ggml_super_blocks

AT_ONCE = 1 << 22  # weights that are decoded or encoded together


@dataclass(frozen=True)
class BlockType:
    """A block type.

    Attributes:
        weights, bytes: of a block.
        halves: the bytes at which its fp16 numbers begin.
        decode: uint8 (n, bytes) -> fp32 (n, weights).
        encode: the inverse, rounded; None for types that are read alone.
    """

    weights: int
    bytes: int
    halves: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None = None


def _float_of(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


def _bytes_of(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).contiguous().view(torch.uint8)


TYPES: dict[str, BlockType] = {
    "F16": BlockType(1, 2, (0,), _float_of(torch.float16), _bytes_of(torch.float16)),
    "BF16": BlockType(1, 2, (), _float_of(torch.bfloat16), _bytes_of(torch.bfloat16)),
    "Q4_0": BlockType(32, 18, (0,), ggml_blocks.decode_q4_0, ggml_blocks.encode_q4_0),
    "Q4_1": BlockType(32, 20, (0, 2), ggml_blocks.decode_q4_1, ggml_blocks.encode_q4_1),
    "Q5_0": BlockType(32, 22, (0,), ggml_blocks.decode_q5_0, ggml_blocks.encode_q5_0),
    "Q5_1": BlockType(32, 24, (0, 2), ggml_blocks.decode_q5_1, ggml_blocks.encode_q5_1),
    "Q8_0": BlockType(32, 34, (0,), ggml_blocks.decode_q8_0, ggml_blocks.encode_q8_0),
    "Q2_K": BlockType(256, 84, (80, 82), ggml_super_blocks.decode_q2_k),
    "Q3_K": BlockType(256, 110, (108,), ggml_super_blocks.decode_q3_k),
    "Q4_K": BlockType(256, 144, (0, 2), ggml_super_blocks.decode_q4_k, ggml_super_blocks.encode_q4_k),
    "Q5_K": BlockType(256, 176, (0, 2), ggml_super_blocks.decode_q5_k),
    "Q6_K": BlockType(256, 210, (208,), ggml_super_blocks.decode_q6_k, ggml_super_blocks.encode_q6_k),
}
FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # of llama.cpp, for rows that are no whole number of super-blocks


def find(name: str) -> BlockType:
    """The type of a name. Raises LayerError if it is none of `TYPES`."""
    found = TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise LayerError(f"type={name!r:.80} must be one of {', '.join(TYPES)}")
    return found


def row_bytes(name: str, cols: int) -> int:
    """Bytes of a row of `cols` weights.

    >>> row_bytes("Q4_0", 64), row_bytes("Q4_K", 256)
    (36, 144)

    Raises:
        LayerError: blocks do not tile it.
    """
    kind = find(name)
    if cols % kind.weights:
        raise LayerError(f"{name} has blocks of {kind.weights} weights, which do not tile {cols} inputs{_advice(name)}")
    return cols // kind.weights * kind.bytes


def decode(raw: Tensor, name: str) -> Tensor:
    """Weights fp32 (rows, cols) of raw bytes uint8 (rows, row_bytes)."""
    kind = find(name)
    blocks = raw.reshape(-1, kind.bytes)
    chunks = [kind.decode(each) for each in blocks.split(max(1, AT_ONCE // kind.weights))]
    weights = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
    return weights.view(len(raw), -1)


def encode(weight: Tensor, name: str) -> Tensor:
    """Raw bytes uint8 (rows, row_bytes) of weights (rows, cols).

    Raises:
        LayerError: blocks do not tile a row, the type is read alone, or a scale exceeds fp16.
    """
    kind, (rows, cols) = find(name), weight.shape
    width = row_bytes(name, cols)
    if kind.encode is None:
        raise LayerError(f"{name} is read and not written; written are {', '.join(encodable())}")
    if weight.is_meta:
        return torch.empty(rows, width, dtype=torch.uint8, device="meta")
    blocks = weight.detach().float().reshape(-1, kind.weights)
    chunks = [kind.encode(each) for each in blocks.split(max(1, AT_ONCE // kind.weights))]
    raw = torch.cat(chunks).view(rows, width)
    if not finite(raw, name):
        raise LayerError(f"weights up to {float(weight.abs().max()):.3g} exceed what the fp16 scales of {name} reach")
    return raw


def encodable() -> list[str]:
    """Types that `encode` knows."""
    return [name for name, each in TYPES.items() if each.encode is not None]


def finite(raw: Tensor, name: str) -> bool:
    """Whether all numbers that raw bytes stand for are finite."""
    kind = find(name)
    if raw.is_meta:
        return True
    blocks = raw.reshape(-1, kind.bytes)
    if kind.weights == 1:
        return bool(kind.decode(raw).isfinite().all())
    return all(bool(ggml_blocks.half_at(blocks, at).isfinite().all()) for at in kind.halves)


def _advice(name: str) -> str:
    return f"; llama.cpp takes {FALLBACKS[name]} there" if name in FALLBACKS else ""
