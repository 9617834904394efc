"""What a kernel is: what it accepts, and how it holds and multiplies what is stored.

A kernel says what it accepts (`Accepts`): kinds of weight, grids, bits, and the parts at inputs and outputs that it
computes itself. Whatever a layer holds that a kernel does not name, the kernel is refused for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.numeric import packing
from compression.numeric.grouping import Params

NARROW = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a kernel has to know of a layer before it sees the tensors.

    Attributes:
        weight: the kind of the part that it multiplies by.
        facts: what that part says of itself, such as its `grid` or `pattern`.
        device: with its index on CUDA ("cuda:1"): the devices of a machine may differ.
        dtype: in which the product is taken.
        backend: "auto", or the name of the library whose kernel was asked for.
        inputs, outputs: the parts there, in order, each as it is described.
    """

    weight: str
    in_features: int
    out_features: int
    device: str
    dtype: torch.dtype
    backend: str = "auto"
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
    outputs: tuple[Mapping[str, Any], ...] = ()

    @property
    def grid(self) -> Any:
        """Of codes; None for other kinds."""
        return self.facts.get("grid")

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def words(self) -> str:
        """What the weight is stored as."""
        return getattr(self.grid, "kind", self.weight)

    @property
    def group(self) -> int:
        return self.in_features if self.grid.group_size == -1 else self.grid.group_size


@dataclass(frozen=True, kw_only=True)
class Accepts:
    """What a layer may hold for a kernel to take it.

    Attributes:
        words: what the kernel is for, said where a layer is anything else.
        weight: kinds of the weight.
        grids, bits: of codes; None for any.
        inputs, outputs: kinds of the parts there that the kernel computes itself: these, in this order, and no others.
        dtypes: in which products are taken.
        devices: types of device.
    """

    words: str
    weight: tuple[str, ...] = ("codes",)
    grids: tuple[type, ...] | None = None
    bits: tuple[int, ...] | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = NARROW
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refusal(self, spec: LayerSpec) -> str | None:
        """Why a layer is not of this kind, or None."""
        fits = (
            spec.weight in self.weight
            and (self.grids is None or isinstance(spec.grid, self.grids))
            and (self.bits is None or spec.grid.bits in self.bits)
        )
        if not fits or spec.device_type not in self.devices:
            return self.words
        for place, wanted, held in (("input", self.inputs, spec.inputs), ("output", self.outputs, spec.outputs)):
            kinds = tuple(each["kind"] for each in held)
            if kinds != wanted:
                found = "nothing" if not kinds else " and ".join(kinds)
                return (
                    f"{self.words}, with {' and '.join(wanted) or 'nothing'} at the {place} of the layer, not {found}"
                )
        if spec.dtype not in self.dtypes:
            *some, last = [DTYPE_WORDS[dtype] for dtype in self.dtypes]
            return f"{', '.join(some) + ' or ' if some else ''}{last} only, not {spec.dtype}"
        return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to multiply by what is stored.

    Attributes:
        accepts: what it takes.
        refuses: why a layer that it accepts cannot have it all the same, by shapes or what is installed; or None.
        pack: canonical packed codes (rows, bytes), stored parameters, spec -> the kernel's layout.
        unpack: layout, spec -> exactly those codes.
        bind: layout, stored parameters, spec -> the product as a function of x (..., in_features) in the spec's dtype,
            to (..., out_features), without bias; what can be prepared is prepared once.
            Of a part that is not made of codes, the layout is the dense weight and there is nothing to pack.
            Among the parameters are the tensors of the parts that it takes at the input, by their names there.
        fuses_bias: whether it adds the bias itself; it is then among the parameters, if there is one.
        max_rows: rows of input, as a function of the spec, up to which the kernel is the faster way.
        rowwise: whether some rows of the layout are the layout of these rows of codes.
        graph_safe: whether a CUDA graph can hold it: not if it waits for the device to decide what to do next.

    A product may keep tensors of its own, made by `bind`; it names them in an attribute `held`.
    """

    name: str
    library: str
    accepts: Accepts
    refuses: Callable[[LayerSpec], str | None]
    bind: Callable[[Tensor, Params, LayerSpec], Product]
    max_rows: Callable[[LayerSpec], float]
    pack: Callable[[Tensor, Params, LayerSpec], Tensor] | None = None
    unpack: Callable[[Tensor, LayerSpec], Tensor] | None = None
    graph_safe: bool = True
    rowwise: bool = False
    fuses_bias: bool = False

    def refusal(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot have it, or None."""
        return self.accepts.refusal(spec) or self.refuses(spec)


def canonical(codes: Tensor, spec: LayerSpec) -> Tensor:
    """Canonical packed codes -> uint8 codes (out_features, in_features)."""
    return packing.unpack(codes, spec.grid.bits, spec.in_features)


def unlimited(spec: LayerSpec) -> float:
    return float("inf")
