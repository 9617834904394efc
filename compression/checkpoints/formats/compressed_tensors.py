"""The format compressed-tensors: one linear layer as the library of that name writes it, and vLLM reads it.

    pack-quantized    weight_packed      int32 (out, ceil(in * bits / 32)), codes of a row, a little-endian bit stream
                      weight_scale       float (out, groups)
                      weight_zero_point  int32 (ceil(out * bits / 32), groups), packed along the outputs; asymmetric
                      weight_g_idx       int32 (in,), with actorder "group", which 0.20 has no more: read, not written
                      weight_shape       int64 (2,)
    int-quantized     weight             int8 (out, in), weight_scale, weight_zero_point int8 (out, groups)
    float-quantized   weight             float8_e4m3fn (out, in), weight_scale
    nvfp4-pack-quantized                 weight_packed uint8 (out, in / 2), the even column in the low half;
                                         weight_scale float8_e4m3fn (out, in / 16), weight_global_scale fp32 (1,)
    mxfp4-pack-quantized                 likewise in groups of 32, weight_scale uint8, an exponent

Numbers of activations, which lie beside them, are in `compressed_tensors_inputs`.

Whole numbers are signed there: code q of `bits` bits stands for q - 2**(bits - 1), zero points likewise. Before 2026
the library packed 32 // bits codes to a word, with unused bits above; that is read too, where the two differ (3, 5, 6
and 7 bits), and the dense packing is written.
Departures: a scale of the whole weight is held as one to each row, and one of a block as one to each of its rows; they
are written so.

Source: compressed-tensors 0.20 (`compressors/pack_quantized`, `naive_quantized`, `nvfp4`, `mxfp4`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from compression.checkpoints.formats.compressed_tensors_config import (
    ACTIVATIONS,
    FLOAT,
    INT,
    MXFP4,
    NVFP4,
    PACKED,
    STATIC,
    Scheme,
)
from compression.checkpoints.formats.compressed_tensors_inputs import InputStore, activations_of
from compression.checkpoints.formats.layer import FLOATS, LayerStore, StoredTensor, order_of
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.numeric import grouping, packing
from compression.numeric.floats import FloatGrid
from compression.numeric.grids import AffineGrid, SignedGrid
from compression.numeric.grouping import Grid

_FP8 = (torch.float8_e4m3fn,)


class _Store(InputStore):
    required = True

    def __init__(self, scheme: Scheme):
        self.scheme, self.words = scheme, scheme.words

    def tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        return self.weight_tensors(rows, cols) | self.input_tensors

    def weight_tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        raise NotImplementedError

    def refusal(self, rows: int, cols: int) -> str | None:
        size = self.scheme.block[1] if self.scheme.block else self.scheme.group_size or -1
        try:
            grouping.check_group(cols, size)
        except LayerError as error:
            return str(error)
        return None

    def scale_shapes(self, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
        """Those that `weight_scale` can have."""
        scheme = self.scheme
        if scheme.strategy == "tensor":
            return ((1,), ())
        if scheme.strategy == "channel":
            return ((rows, 1), (rows,))
        if scheme.block:
            return ((-(-rows // scheme.block[0]), cols // scheme.block[1]),)
        assert scheme.group_size is not None
        return ((rows, cols // scheme.group_size),)

    def by_row(self, values: Tensor, rows: int) -> Tensor:
        """Scales or zero points of any of these shapes as (rows, groups)."""
        if self.scheme.strategy == "tensor":
            return values.reshape(1, 1).expand(rows, 1).contiguous()
        if self.scheme.block:
            return values.repeat_interleave(min(self.scheme.block[0], rows), 0)[:rows].contiguous()
        return values.reshape(rows, -1)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale in our own layout; -1 for all."""
        return self.scheme.block[1] if self.scheme.block else self.scheme.group_size or -1


class Packed(_Store):
    """pack-quantized."""

    telling = ("weight_g_idx",)

    @property
    def grid(self) -> AffineGrid:
        return AffineGrid(bits=self.scheme.bits, group_size=self.group_size, symmetric=self.scheme.symmetric)

    def weight_tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        bits, words = self.scheme.bits, (torch.int32,)
        shapes, groups = self.scale_shapes(rows, cols), grouping.groups_of(cols, self.group_size)
        found = {
            "weight_packed": StoredTensor(tuple((rows, width) for width in _widths(cols, bits)), words),
            "weight_scale": StoredTensor(shapes, FLOATS),
            "weight_shape": StoredTensor(((2,),), (torch.int64, torch.int32)),
        }
        if not self.scheme.symmetric:
            packed = tuple((width, groups) for width in _widths(rows, bits))
            found["weight_zero_point"] = StoredTensor(packed, words)
        if self.scheme.ordered:
            found["weight_g_idx"] = StoredTensor(((cols,),), words)
        return found

    def order(self, tensors: dict[str, Tensor], cols: int) -> Tensor | None:
        g_idx = tensors.get("weight_g_idx")
        return None if g_idx is None else order_of(g_idx, cols, grouping.groups_of(cols, self.group_size))

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        bits, shape = self.scheme.bits, tensors["weight_shape"].tolist()
        if shape != [rows, cols]:
            raise ValueError(f"weight_shape is {shape}; the layer has {rows} outputs and {cols} inputs")
        codes, order = _from_words(tensors["weight_packed"], bits, cols), self.order(tensors, cols)
        if order is not None:
            codes = codes[:, order]
        named = {"codes": packing.pack(codes, bits), "scales": self.by_row(tensors["weight_scale"], rows)}
        if not self.scheme.symmetric:
            zeros = _from_words(tensors["weight_zero_point"].t().contiguous(), bits, rows).t().contiguous()
            named["zero_points"] = packing.pack(zeros, bits)
        return Codes.from_packed(named, self.grid, cols, dtype=dtype, permutation=order)

    def write(self, part: Codes) -> dict[str, Tensor]:
        bits, (rows, cols) = self.scheme.bits, part.shape
        codes = packing.unpack(part.canonical(), bits, cols)
        found = {"weight_scale": part.scales.view(rows, -1), "weight_shape": torch.tensor([rows, cols])}
        if not self.scheme.symmetric:
            zeros = packing.unpack(part.zero_points, bits, part.scales.shape[1])
            found["weight_zero_point"] = _to_words(zeros.t().contiguous(), bits).t().contiguous()
        return found | {"weight_packed": _to_words(codes.contiguous(), bits)}


class Whole(_Store):
    """int-quantized and float-quantized: one number of 8 bits to a weight."""

    @property
    def grid(self) -> Grid:
        if self.scheme.float:
            return FloatGrid(element="e4m3", group_size=self.group_size)
        return AffineGrid(bits=self.scheme.bits, group_size=self.group_size, symmetric=self.scheme.symmetric)

    def weight_tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        shapes = self.scale_shapes(rows, cols)
        found = {
            "weight": StoredTensor(((rows, cols),), _FP8 if self.scheme.float else (torch.int8,)),
            "weight_scale": StoredTensor(shapes, FLOATS),
        }
        if not self.scheme.float:
            found["weight_zero_point"] = StoredTensor(shapes, (torch.int8,), optional=self.scheme.symmetric)
        return found

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        named = {"scales": self.by_row(tensors["weight_scale"], rows)}
        if self.scheme.float:
            named["codes"] = tensors["weight"].view(torch.uint8)
            return Codes.from_packed(named, self.grid, cols, dtype=dtype)
        bits = self.scheme.bits
        codes, zeros = self._unsigned("weight", tensors), None
        if "weight_zero_point" in tensors:
            zeros = self.by_row(self._unsigned("weight_zero_point", tensors), rows)
        if self.scheme.symmetric:
            if zeros is not None and not (zeros == 2 ** (bits - 1)).all():
                raise ValueError("symmetric is true, but there are zero points other than 0")
        else:
            assert zeros is not None
            named["zero_points"] = packing.pack(zeros, bits)
        return Codes.from_packed(named | {"codes": packing.pack(codes, bits)}, self.grid, cols, dtype=dtype)

    def _unsigned(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """uint8 of signed whole numbers, from 0."""
        middle = 2 ** (self.scheme.bits - 1)
        values = tensors[name].short() + middle
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2 * middle):
            raise ValueError(f"{name} holds numbers outside of {-middle} to {middle - 1}, those of "
                             f"{self.scheme.bits} bits")  # fmt: skip
        return values.to(torch.uint8)

    def write(self, part: Codes) -> dict[str, Tensor]:
        if self.scheme.float:
            return {"weight": part.canonical().view(torch.float8_e4m3fn), "weight_scale": part.scales}
        bits, middle = self.scheme.bits, 2 ** (self.scheme.bits - 1)
        codes = packing.unpack(part.canonical(), bits, part.shape[1])
        found = {"weight": (codes.short() - middle).to(torch.int8), "weight_scale": part.scales.view(part.shape[0], -1)}
        if not self.scheme.symmetric:
            zeros = packing.unpack(part.zero_points, bits, part.scales.shape[1])
            found["weight_zero_point"] = (zeros.short() - middle).to(torch.int8)
        return found


class FP4(_Store):
    """nvfp4-pack-quantized and mxfp4-pack-quantized."""

    @property
    def grid(self) -> FloatGrid:
        scale = "e4m3" if self.scheme.format == NVFP4 else "e8m0"
        return FloatGrid(element="e2m1", group_size=self.group_size, scale=scale)

    def weight_tensors(self, rows: int, cols: int) -> dict[str, StoredTensor]:
        bytes_of = (torch.uint8,)
        found = {"weight_packed": StoredTensor(((rows, cols // 2),), bytes_of)}
        shapes = self.scale_shapes(rows, cols)
        if self.scheme.format == MXFP4:
            return found | {"weight_scale": StoredTensor(shapes, bytes_of)}
        whole = StoredTensor(((1,), ()), (torch.float32,))
        return found | {"weight_scale": StoredTensor(shapes, _FP8), "weight_global_scale": whole}

    def read(self, tensors: dict[str, Tensor], rows: int, cols: int, dtype: torch.dtype) -> Codes:
        named = {"codes": tensors["weight_packed"], "scales": tensors["weight_scale"].view(torch.uint8)}
        if self.scheme.format == NVFP4:
            named["divisor"] = tensors["weight_global_scale"].reshape(())
        return Codes.from_packed(named, self.grid, cols, dtype=dtype)

    def write(self, part: Codes) -> dict[str, Tensor]:
        found = {"weight_packed": part.canonical(), "weight_scale": part.scales}
        if self.scheme.format == MXFP4:
            return found
        return found | {
            "weight_scale": part.scales.view(torch.float8_e4m3fn), "weight_global_scale": part.divisor.reshape(1)
        }  # fmt: skip


def store_of(scheme: Scheme) -> LayerStore:
    """How layers of a scheme lie in a checkpoint."""
    if scheme.format == PACKED:
        return Packed(scheme)
    return FP4(scheme) if scheme.format in (NVFP4, MXFP4) else Whole(scheme)


def scheme_of(layer: Linear) -> Scheme | str:
    """How a layer is written; in words why it cannot be."""
    first, *beside = layer.weight_part.summands
    if beside:
        return "it has an adapter beside its codes; recover with merge=all"
    if layer.output_part is not None:
        return f"it has no place for {layer.output_part.kind}"
    scheme = _of_weight(first) if first.kind in ("codes", "rounded") else f"its weight is of kind {first.kind}"
    if isinstance(scheme, str) or layer.input_part is None:
        return scheme
    activations = activations_of(layer.input_part)
    if activations not in ACTIVATIONS:
        return activations
    whole = scheme.bits == 8 and scheme.symmetric and not scheme.float
    kind = "int8" if whole else {FLOAT: "fp8", MXFP4: "mxfp4", NVFP4: "nvfp4"}.get(scheme.format)
    if kind != activations.removesuffix(STATIC) or (scheme.strategy != "channel" and kind not in ("mxfp4", "nvfp4")):
        return (f"it has activations in {activations} beside {layer.weight_part.words}; written are int8, fp8, mxfp4 "
                "and nvfp4, weights and activations alike")  # fmt: skip
    return replace(scheme, activations=activations, format=INT if kind == "int8" else scheme.format)


def _of_weight(part: Codes) -> Scheme | str:
    grid = part.grid
    if part.permutation is not None:
        return "its columns are in activation order, for which there is no g_idx since 0.20; leave static_groups=true"
    strategy = "channel" if grid.group_size == -1 else "group"
    size = None if grid.group_size == -1 else grid.group_size
    if isinstance(grid, SignedGrid):
        return Scheme(format=PACKED, bits=grid.bits, float=False, symmetric=True, strategy=strategy)
    if isinstance(grid, AffineGrid) and not grid.float_zeros:
        return Scheme(format=PACKED, bits=grid.bits, float=False, symmetric=grid.symmetric, strategy=strategy,
                      group_size=size)  # fmt: skip
    if isinstance(grid, FloatGrid):
        common = {"bits": grid.bits, "float": True, "symmetric": True}
        if (grid.element, grid.scale) == ("e4m3", "float"):
            return Scheme(format=FLOAT, strategy=strategy, group_size=size, **common)
        if (grid.element, grid.scale, size) == ("e2m1", "e4m3", 16):
            return Scheme(format=NVFP4, strategy="tensor_group", group_size=16, **common)
        if (grid.element, grid.scale, size) == ("e2m1", "e8m0", 32):
            return Scheme(format=MXFP4, strategy="group", group_size=32, **common)
    return f"it holds whole numbers with whole zero points, FP8, NVFP4 and MXFP4, not {grid.words}"


def _widths(count: int, bits: int) -> tuple[int, ...]:
    """Words of a row of codes, packed densely, and as before 2026."""
    return tuple(dict.fromkeys((-(-count * bits // 32), -(-count // (32 // bits)))))


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (n, count) -> int32 (n, ceil(count * bits / 32))."""
    packed = packing.pack(codes, bits)
    return packing.to_words(torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous())


def _from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse, of either packing; uint8 (n, count)."""
    packed = packing.to_bytes(words.contiguous())
    if words.shape[1] == _widths(count, bits)[0]:
        return packing.unpack(packed[:, : packing.packed_width(count, bits)], bits, count)
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :count]
