"""What holds of every layer that is stored in another way than dense, however it came to be.

A constructor checks what describes the layer; `check` of each class its tensors, behind every way that they come in by:
`from_weight`, `from_codes`, `load_state_dict`. On the meta device there are shapes and types to check, and no values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.numeric import packing

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # the types that weights are computed with
WIDEST = 2**31 - 1  # inputs or outputs: what int32 can number


def check_size(name: str, value: object, least: int = 1, most: int = WIDEST) -> None:
    """Raise LayerError unless a described number is whole and within its bounds."""
    if type(value) is not int or not least <= value <= most:
        raise LayerError(f"{name}={value!r:.80} must be a whole number from {least} to {most}")


def check_one_of(name: str, value: object, allowed: Any) -> None:
    """Raise LayerError unless a described value is one of those allowed, and of its type."""
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise LayerError(f"{name}={value!r:.80} must be one of {', '.join(map(str, allowed))}")


def check_shape(layer: nn.Module, name: str, shape: tuple[int, ...], kinds: set[torch.dtype]) -> Tensor:
    """The tensor of that name. Raises LayerError unless it is of this shape and one of these types."""
    tensor = getattr(layer, name)
    if tensor.shape != shape or tensor.dtype not in kinds:
        allowed = " or ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        got = str(tensor.dtype).removeprefix("torch.")
        raise LayerError(f"{name} must be {allowed} {shape}, and is {got} {tuple(tensor.shape)}")
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise LayerError if a number is NaN or infinite."""
    if not tensor.is_meta and tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise LayerError(f"{name} has NaN or infinite values")


def check_padding(name: str, packed: Tensor, count: int, bits: int) -> None:
    """Raise LayerError if bits are set behind the last of `count` codes of a row, which no code has."""
    over = packed.shape[-1] * 8 - count * bits
    if over and not packed.is_meta and (packed[..., -1] >> (8 - over)).any():
        raise LayerError(f"{name} has bits set behind the last of the {count} codes of a row; they must be zero")


def check_permutation(order: Tensor, cols: int) -> None:
    """Raise LayerError unless each of 0 .. cols - 1 is there once."""
    if order.is_meta:
        return
    if order.shape != (cols,) or not torch.equal(order.sort().values.long(), torch.arange(cols, device=order.device)):
        raise LayerError(f"the order of the columns is no permutation of 0 .. {cols - 1}")


def ones_in(packed: Tensor) -> int:
    """How many bits of a uint8 tensor are set."""
    pairs = packed - (packed >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return int((nibbles + (nibbles >> 4) & 0x0F).sum(dtype=torch.int64))


def check_places(packed: Tensor, count: int, bits: int, pattern: tuple[int, int]) -> None:
    """Raise LayerError unless the n places of every m neighbours, packed, ascend and lie among the m."""
    if packed.is_meta:
        return
    n, m = pattern
    places = packing.unpack(packed, bits, count).unflatten(-1, (-1, n))
    if (places[..., 1:] <= places[..., :-1]).any() or (places[..., -1] >= m).any():
        raise LayerError(f"indices must name {n} different places of every {m} neighbours, in ascending order")


def check_incoming(
    layer: nn.Module, tensors: Mapping[str, Tensor], prefix: str, described: tuple[str, ...] = ()
) -> None:
    """Raise LayerError where loading would turn numbers of one kind into another: codes into floats, or back.

    Where a layer has no tensors yet, those in `described` must come in the very type that it is described with.
    """
    for name, own in (*layer._parameters.items(), *layer._buffers.items()):
        given = tensors.get(f"{prefix}{name}")
        if own is None or given is None or given.dtype == own.dtype:
            continue
        if {given.dtype, own.dtype} <= FLOATS and not (own.is_meta and name in described):
            continue
        raise LayerError(f"{prefix}{name} is stored as {given.dtype}, expected {own.dtype}")


def check_loaded(layer: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """The check of a layer that was given all of its tensors; LayerError names it."""
    named = {**layer._parameters, **layer._buffers}
    own = [name for name, each in named.items() if each is not None and name not in layer._non_persistent_buffers_set]
    if any(f"{prefix}{name}" not in tensors for name in own):
        return  # it is not whole yet
    try:
        layer.check()
    except LayerError as error:
        raise LayerError(f"{prefix.removesuffix('.') or 'the layer'}: {error}") from None
