"""A copy of a model that computes in fp32 with the stored 16-bit weights.

fp32 holds every 16-bit number exactly, so the weights stay what is stored and only the arithmetic is wider. Dense
weights, biases and norms are copied, 4 bytes each. The copy shares packed codes, scales, masks and indices with the
model. Its packed layers use kernels that accept fp32; layers without such a kernel dequantize.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compression.layers.parts import Part, WeightPart


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of the model in fp32, frozen; tensors that need no conversion are shared.

    Neither model may be changed while both are in use. The model unbinds its kernels, and binds them again at its next
    forward pass.
    """
    for module in model.modules():
        if isinstance(module, WeightPart):
            module.unbind()
    memo: dict[int, object] = {}
    for tensor in _tensors(model):
        wide = tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(tensor.detach().float(), requires_grad=False) if wide else tensor
    copied: nn.Module = copy.deepcopy(model, memo)
    return nn.Module.float(copied)


def bytes_in_float32(model: nn.Module) -> int:
    """Bytes that the copy of `in_float32` adds to those of the model."""
    parts = [module for module in model.modules() if isinstance(module, Part)]
    kept = {id(each) for part in parts for name, each in part._buffers.items() if name not in part.follows_dtype}
    return sum(4 * each.numel() for each in _tensors(model) if id(each) not in kept and is_narrow(each.dtype))


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype is floating point and narrower than fp32."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once, those that are not saved included."""
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
