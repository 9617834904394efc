"""The format compressed-tensors: what stands at the input of a layer whose activations are rounded.

    int8, fp8 by token, mxfp4        nothing is stored: scales are found at run time
    int8, fp8 under one scale        input_scale float (1,), input_zero_point (1,) of zeros, which may be missing
    nvfp4                            input_global_scale fp32 (1,), the divisor above scales that are found at run time

Departures: int8 under one scale ends at -127 here and at -128 there, which only values beyond those of the calibration
text reach. Scales are written in fp32, and no zero points.
Source: compressed-tensors 0.20 (`quantization/lifecycle/initialize.py`, `forward.py`).
"""

import torch
from torch import Tensor

from compression.checkpoints.formats.compressed_tensors_config import STATIC, Scheme
from compression.checkpoints.formats.layer import LayerStore, StoredTensor
from compression.layers.activations import FloatRange, TokenRange
from compression.layers.parts import InputPart
from compression.numeric.floats import FloatGrid

_GRIDS = {
    "fp8": FloatGrid(element="e4m3", group_size=-1), "mxfp4": FloatGrid(element="e2m1", group_size=32, scale="e8m0"),
    "nvfp4": FloatGrid(element="e2m1", group_size=16, scale="e4m3"),
}  # fmt: skip


class InputStore(LayerStore):
    """How the activations of a scheme lie beside a weight."""

    scheme: Scheme

    @property
    def input_tensors(self) -> dict[str, StoredTensor]:
        one, activations = ((1,), ()), self.scheme.activations or ""
        if activations == "nvfp4":
            return {"input_global_scale": StoredTensor(one, (torch.float32,))}
        if not activations.endswith(STATIC):
            return {}
        zeros = StoredTensor(one, (torch.int8, torch.float8_e4m3fn), optional=True)
        return {"input_scale": StoredTensor(one), "input_zero_point": zeros}

    def input_part(self) -> InputPart | None:
        name = (self.scheme.activations or "").removesuffix(STATIC)
        number = torch.empty((), device="meta") if self.input_tensors else None
        if name == "int8":
            return TokenRange(8, number)
        return FloatRange(_GRIDS[name], number) if name else None

    def read_input(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not (given := [each for key, each in tensors.items() if key in ("input_scale", "input_global_scale")]):
            return {}
        if "input_zero_point" in tensors and (tensors["input_zero_point"].float() != 0).any():
            raise ValueError("input_zero_point is not 0: activations with zero points are not read")
        if not given[0] > 0:
            raise ValueError(f"the scale of its inputs is {float(given[0])}; it must be above 0")
        return {"step" if self.scheme.activations == f"int8{STATIC}" else "whole": given[0].float().reshape(())}

    def write_input(self, part: InputPart | None) -> dict[str, Tensor]:
        number = None if part is None else next(iter(part.tensors().values()), None)
        return {} if number is None else {next(iter(self.input_tensors)): number.reshape(1)}


def activations_of(part: InputPart) -> str:
    """Which of `compressed_tensors_config.ACTIVATIONS` it is; in words why none."""
    if isinstance(part, TokenRange) and part.bits == 8 and part.clip == 1:
        return "int8" if part.step is None else f"int8{STATIC}"
    if isinstance(part, FloatRange):
        for name, grid in _GRIDS.items():
            if part.grid == grid:
                return f"{name}{STATIC}" if name == "fp8" and part.whole is not None else name
    if isinstance(part, TokenRange | FloatRange):
        return f"it is written with activations in int8, fp8, mxfp4 and nvfp4, not {part.words}"
    return f"it has no place for {part.kind}"
