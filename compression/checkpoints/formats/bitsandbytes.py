"""The format of bitsandbytes: one linear layer as transformers saves it with that library.

    NF4             weight                 uint8 (out * in / 2, 1), two codes to a byte, the first in the high half
                    weight.absmax          fp32 (blocks,), or with double quantization uint8
                    weight.quant_map       fp32 (16,), the levels
                    weight.nested_absmax   fp32 (blocks / 256,)   \\ with double quantization
                    weight.nested_quant_map fp32 (256,)           /
                    weight.quant_state.bitsandbytes__nf4          uint8, a table in JSON: block size, shape, dtype, mean
    LLM.int8()      weight                 int8 (out, in)
                    SCB                    fp32 (out,), the largest absolute value of each row
                    weight_format          uint8 (), 0: by rows

Limits: blocks of NF4 must not reach over the end of a row.

Source: bitsandbytes 0.50, `functional.QuantState.as_dict`, `nn/modules.py`.
"""

import json
from typing import Any

import torch
from torch import Tensor

from compression.checkpoints.formats.bitsandbytes_config import DTYPES
from compression.checkpoints.formats.layer import LayerStore, StoredTensor
from compression.files.strict_json import exact_fields, strict_json
from compression.layers.codes import Codes
from compression.numeric import grouping, packing
from compression.numeric.grids import Int8RowGrid
from compression.numeric.normal_float import DOUBLE_QUANT_BLOCK, NF4_LEVELS, NF4Grid, dynamic_levels

_STATE = "weight.quant_state.bitsandbytes__nf4"
_BYTES = (torch.uint8,)
_FP32 = (torch.float32,)
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


class NF4Store(LayerStore):
    """NF4 in blocks of any size; each layer says its own."""

    words = "NF4 of bitsandbytes"
    mark = "weight.absmax"
    telling = (_STATE,)

    def __init__(self, double_quant: bool):
        self.double_quant = double_quant

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        found = {
            "weight": StoredTensor(((rows * cols // 2, 1),), _BYTES),
            "weight.absmax": StoredTensor(None, _BYTES if self.double_quant else _FP32),
            "weight.quant_map": StoredTensor(((16,),), _FP32),
            _STATE: StoredTensor(None, _BYTES),
        }
        if self.double_quant:
            found["weight.nested_absmax"] = StoredTensor(None, _FP32)
            found["weight.nested_quant_map"] = StoredTensor(((256,),), _FP32)
        return found

    def outline(self, tensors: dict[str, Tensor], rows: int, cols: int) -> tuple[NF4Grid, bool]:
        size = self._state(tensors[_STATE], [rows, cols])["blocksize"]
        return NF4Grid(group_size=size, double_quant=self.double_quant), False

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        state = self._state(tensors[_STATE], [rows, cols])
        grid, _ = self.outline(tensors, rows, cols)
        grouping.check_group(cols, grid.group_size)
        same_levels("weight.quant_map", tensors["weight.quant_map"], torch.tensor(NF4_LEVELS))
        absmax, blocks = tensors["weight.absmax"], rows * grouping.groups_of(cols, grid.group_size)
        if absmax.shape != (blocks,):
            raise ValueError(f"weight.absmax has shape {tuple(absmax.shape)}; {blocks} blocks make it ({blocks},)")
        named = {"codes": _halves_changed(tensors["weight"].reshape(rows, cols // 2))}
        if not self.double_quant:
            return Codes.from_packed(named | {"absmax": absmax}, grid, cols, dtype=dtype)
        same_levels("weight.nested_quant_map", tensors["weight.nested_quant_map"], dynamic_levels())
        if state["nested_blocksize"] != DOUBLE_QUANT_BLOCK:
            raise ValueError(f"nested_blocksize={state['nested_blocksize']!r} is not read; it must be 256")
        named |= {
            "absmax_codes": absmax, "absmax_scales": tensors["weight.nested_absmax"],
            "absmax_offset": torch.tensor(state["nested_offset"], dtype=torch.float32),
        }  # fmt: skip
        return Codes.from_packed(named, grid, cols, dtype=dtype)

    def _state(self, stored: Tensor, shape: list[int]) -> dict[str, Any]:
        """Raises ValueError unless it is a table that describes such a layer."""
        wanted = {"quant_type", "blocksize", "dtype", "shape"} | (_NESTED if self.double_quant else set())
        state = exact_fields(strict_json(bytes(stored.flatten().tolist())), wanted)
        size, offset = state["blocksize"], state.get("nested_offset", 0.0)
        if state["quant_type"] != "nf4" or state["dtype"] not in DTYPES or state["shape"] != shape:
            raise ValueError(f"its quant_state is {state!r:.200}; the layer is NF4 of shape {shape}")
        if type(size) is not int or size < 2 or isinstance(offset, bool) or not isinstance(offset, int | float):
            raise ValueError(f"its quant_state has blocksize={size!r:.40} and nested_offset={offset!r:.40}")
        return state

    def write(self, part: Codes) -> dict[str, Tensor]:
        rows, cols = part.shape
        state: dict[str, Any] = {
            "quant_type": "nf4", "blocksize": _size(part.grid.group_size, cols),
            "dtype": str(part.dtype).removeprefix("torch."), "shape": [rows, cols],
        }  # fmt: skip
        found = {
            "weight": _halves_changed(part.canonical()).reshape(-1, 1), "weight.quant_map": torch.tensor(NF4_LEVELS),
        }  # fmt: skip
        if self.double_quant:
            state |= {"nested_blocksize": DOUBLE_QUANT_BLOCK, "nested_dtype": "float32",
                      "nested_offset": part.absmax_offset.item()}  # fmt: skip
            found |= {"weight.absmax": part.absmax_codes, "weight.nested_absmax": part.absmax_scales,
                      "weight.nested_quant_map": dynamic_levels().clone()}  # fmt: skip
        else:
            found["weight.absmax"] = part.absmax
        return found | {_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


class Int8Store(LayerStore):
    """LLM.int8(): the weight of a layer whose inputs are quantized too, see `bitsandbytes_format`."""

    words = "8 bits of bitsandbytes"
    mark = "SCB"
    grid = Int8RowGrid()

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        return {
            "weight": StoredTensor(((rows, cols),), (torch.int8,)),
            "SCB": StoredTensor(((rows,),), _FP32),
            "weight_format": StoredTensor(((),), _BYTES, optional=True),
        }

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            raise ValueError(f"weight_format is {int(tensors['weight_format'])}; it must be 0, by rows")
        codes = (tensors["weight"].short() + 128).to(torch.uint8)
        return Codes.from_packed({"codes": codes, "absmax": tensors["SCB"]}, self.grid, cols, dtype=dtype)

    def write(self, part: Codes) -> dict[str, Tensor]:
        codes = packing.unpack(part.canonical(), 8, part.shape[1])
        return {"weight": (codes.short() - 128).to(torch.int8), "SCB": part.absmax,
                "weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip


def same_levels(name: str, given: Tensor, known: Tensor) -> None:
    """Raise ValueError where a table of levels is another one than codes are read by."""
    if not torch.equal(given, known):
        raise ValueError(f"{name} holds other levels than those of bitsandbytes, which codes are read by")


def _halves_changed(packed: Tensor) -> Tensor:
    """Bytes with their high and low half exchanged."""
    return (packed >> 4) | (packed << 4)


def _size(group_size: int, cols: int) -> int:
    return cols if group_size == -1 else group_size
