"""The dtype that models compute in when their quality is measured, and the copies of them in that dtype.

Processors without bf16 instructions multiply many rows of bf16 several times slower than the same rows of fp32. The
quality of a model does not depend on that. Quality of a base in 16 bits is therefore measured in fp32 there, with the
stored weights, and the rows say so. Time, memory and size always belong to the stored model.
"""

import functools
from typing import TYPE_CHECKING

from bench.machine import device as machine
from compression import layers

if TYPE_CHECKING:
    from torch import nn

    from compression import Base, Compressed

FLOAT32 = "float32"


class ComputeModels:
    """Models that compute: the stored ones, or copies in fp32 that are made at their first use.

    Args:
        choice: "auto", "stored" or "float32".
        base: the base of the run.

    Attributes:
        fallback_reason: why "auto" uses the stored dtype although fp32 is faster; None if it does not.
    """

    def __init__(self, choice: str, base: "Base", device: str):
        self._choice, self._base, self._device = choice, base, device
        self._copies: dict[int, tuple[Base | Compressed, nn.Module]] = {}
        self.fallback_reason: str | None = None

    @functools.cached_property
    def dtype(self) -> str | None:
        """The dtype of all models of the run; None for the stored one."""
        model = self._base.model
        if self._choice == "stored" or not layers.float32.is_narrow(model.dtype):
            return None
        if self._choice == FLOAT32:
            return FLOAT32
        if layers.kernels.torch_products.product_dtype(model.dtype, model.device) == model.dtype:
            return None
        copy, stored = layers.float32.bytes_in_float32(model), sum(each.nbytes for each in model.parameters())
        needed, free = 2 * copy + stored, machine.memory_free(self._device)  # two copies, and the compressed model
        if needed <= free:
            return FLOAT32
        name = str(model.dtype).removeprefix("torch.")
        self.fallback_reason = (
            f"computed in {name}, which is slow on this processor: {FLOAT32} copies of the base and the compressed "
            f"model need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; free some, or use "
            f"--compute-dtype {FLOAT32} to make the copies regardless"
        )
        return None

    def of(self, model: "Base | Compressed") -> "nn.Module":
        """The stored model, or its copy."""
        if self.dtype is None:
            return model.model
        if id(model) not in self._copies:
            self._copies[id(model)] = model, layers.float32.in_float32(model.model)
        return self._copies[id(model)][1]

    def release(self) -> None:
        """Let go of the copies."""
        self._copies = {}
