"""The format of the hqq library: one linear layer as its `state_dict` is written to safetensors.

    W_q            packed codes. Groups are rows, (out * in / group_size, group_size), packed along the rows. 4 bits:
                   the first half of them is in the high bits of a byte; 2 bits: the first quarter in the highest; 3
                   bits: the first tenth in the highest of the 30 bits of an int32, rows of zeros at the end; 8 bits as
                   they are. With `view_as_float` the same bytes, called floating-point numbers.
    scale, zero    float (out * in / group_size, 1): W = scale * (code - zero), zero a real number
    shape, nbits, group_size, axis, packing, view_as_float, ...    the settings once more, as tensors

Departure: a weight is decoded in fp32 and rounded once to the dtype of the model; the library computes in the dtype
that its `compute_dtype` names.

Source: hqq 0.2.8, `core/bitpack.py`, `core/quantize.py` (`HQQLinear.state_dict`), `core/utils.py`.
"""

import torch
from torch import Tensor

from compression.checkpoints.formats.compressed_tensors_config import Scheme
from compression.checkpoints.formats.layer import FLOATS, LayerStore, StoredTensor
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.numeric import grouping, packing
from compression.numeric.grids import AffineGrid

_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4}  # codes in a byte, or in an int32, by their bits
_NUMBERS = ("nbits", "group_size", "axis")
_FLAGS = {"channel_wise": True, "quant_scale": False, "quant_zero": False, "offload_meta": False}  # as they must be
_UNREAD = ("optimize", "round_zero", "encoded_state_dict", "stores_quant_config", "view_as_float")
_TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
_WHOLE = (torch.uint8, torch.int32, torch.int64)


class HQQStore(LayerStore):
    """Layers of one number of bits and one group size."""

    required = True

    def __init__(self, scheme: Scheme):
        self.bits, self.group_size = scheme.bits, scheme.group_size or -1
        self.words = scheme.words
        self.grid = AffineGrid(bits=self.bits, group_size=self.group_size, symmetric=False, float_zeros=True)
        self.packed = torch.int32 if self.bits == 3 else torch.uint8

    def refusal(self, rows: int, cols: int) -> str | None:
        try:
            grouping.check_group(cols, self.group_size)
        except LayerError as error:
            return f"{error}; a scale that two outputs share is not read"
        if self.bits != 3 and self._groups(rows, cols) % _PER_WORD[self.bits]:
            return f"{self._groups(rows, cols)} groups do not fill the bytes of {self.bits} bits"
        return None

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        groups = self._groups(rows, cols)
        words, width = -(-groups // _PER_WORD[self.bits]), rows * cols // groups
        sizes = dict.fromkeys([self.packed.itemsize, *(dtype.itemsize for dtype in FLOATS)])
        found = {
            "W_q": StoredTensor(tuple((words, width * self.packed.itemsize // size) for size in sizes),
                                (self.packed, *FLOATS)),
            "scale": StoredTensor(((groups, 1),)),
            "zero": StoredTensor(((groups, 1),)),
            "shape": StoredTensor(((2,),), _WHOLE),
            **{name: StoredTensor(((),), _WHOLE) for name in _NUMBERS},
        }  # fmt: skip
        found |= {name: StoredTensor(((),), _WHOLE, optional=True) for name in (*_FLAGS, *_UNREAD)}
        return found | {name: StoredTensor(None, (torch.uint8,), optional=True) for name in _TEXTS}

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        self._check(tensors, rows, cols)
        groups = self._groups(rows, cols)
        words = tensors["W_q"].view(self.packed)
        if words.shape[1] != rows * cols // groups:
            said = f"{tensors['W_q'].dtype} of shape {tuple(tensors['W_q'].shape)}"
            raise ValueError(f"W_q is {said}, which are not the bytes of {words.shape[0]} x {rows * cols // groups} "
                             f"numbers of {self.packed}")  # fmt: skip
        named = {
            "codes": packing.pack(self._unpacked(words)[:groups].reshape(rows, cols), self.bits),
            "scales": tensors["scale"].reshape(rows, -1),
            "zero_points": tensors["zero"].reshape(rows, -1),
        }
        return Codes.from_packed(named, self.grid, cols, dtype=dtype)

    def _unpacked(self, words: Tensor) -> Tensor:
        """uint8 (rows, n) -> uint8 (rows times the codes in a word, n)."""
        count = _PER_WORD[self.bits]
        shifts = [self.bits * place for place in reversed(range(count))]
        return torch.cat([(words >> shift) & (2**self.bits - 1) for shift in shifts]).to(torch.uint8)

    def _groups(self, rows: int, cols: int) -> int:
        return rows * grouping.groups_of(cols, self.group_size)

    def _check(self, tensors: dict[str, Tensor], rows: int, cols: int) -> None:
        """Raise ValueError where a layer says another thing of itself than config.json."""
        if (shape := tensors["shape"].tolist()) != [rows, cols]:
            raise ValueError(f"shape is {shape}; the layer has {rows} outputs and {cols} inputs")
        size = cols if self.group_size == -1 else self.group_size
        wanted = dict(zip(_NUMBERS, (self.bits, size, 1), strict=True)) | _FLAGS
        wanted["view_as_float"] = tensors["W_q"].is_floating_point()
        for name, value in wanted.items():
            if name in tensors and int(tensors[name]) != value:
                raise ValueError(f"{name} is {int(tensors[name])}, and config.json and W_q make it {int(value)}")
        packed = f"{self.bits}bit_{'32' if self.bits == 3 else 'u8'}"
        if "packing" in tensors and (said := bytes(tensors["packing"].flatten().tolist())) != packed.encode():
            raise ValueError(f"packing is {said!r:.80}, which is not read; that of {self.bits} bits is {packed}")
