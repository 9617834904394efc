"""Objects on their way from process to process: a text, and the bytes of every tensor with its strides.

Texts are pickled, so that only processes of one run may talk so.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def parts(value: Any) -> Iterator[Tensor]:
    """What an object is sent as: the length of its text (int64, on the CPU), the text, the bytes of each tensor."""
    text = io.BytesIO()
    pickler = _Pickler(text)
    pickler.dump(value)
    head = pickle.dumps((pickler.shapes, text.getvalue()))
    yield torch.tensor([len(head)])
    yield torch.frombuffer(bytearray(head), dtype=torch.uint8)
    yield from map(_flat, filter(Tensor.numel, pickler.tensors))


def taken(fill: Callable[[Tensor], Any], device: torch.device) -> Any:
    """The inverse of `parts`: `fill` puts the next of them into a tensor. What was on CUDA is on `device`."""
    length = torch.tensor([0])
    fill(length)
    head = torch.empty(int(length), dtype=torch.uint8)
    fill(head)
    shapes, text = pickle.loads(head.numpy().tobytes())
    tensors = []
    for shape, strides, dtype, cuda in shapes:
        tensors.append(torch.empty_strided(shape, strides, dtype=dtype, device=device if cuda else "cpu"))
        if tensors[-1].numel():
            fill(_flat(tensors[-1]))
    return _Unpickler(io.BytesIO(text), tensors, device).load()


class _Pickler(pickle.Pickler):
    """Keeps tensors out of the text; a CUDA device in it is that of whoever reads it."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.shapes: list[tuple[Any, ...]] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.device) and obj.type == "cuda":
            return "device", 0
        if not isinstance(obj, Tensor):
            return None
        dense = obj.detach()
        if _has_gaps(dense):
            dense = torch.empty_like(dense).copy_(dense)
        self.tensors.append(dense)
        self.shapes.append((tuple(dense.shape), dense.stride(), dense.dtype, dense.is_cuda))
        return "parameter" if isinstance(obj, nn.Parameter) else "tensor", len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor], device: torch.device):
        super().__init__(file)
        self._tensors, self._device = tensors, device

    def persistent_load(self, pid: Any) -> Any:
        kind, number = pid
        if kind == "device":
            return self._device
        tensor = self._tensors[number]
        return nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor


def _has_gaps(tensor: Tensor) -> bool:
    """Whether the elements of a tensor are not one run of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return True
            expected *= size
    return False


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a tensor without gaps, as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
