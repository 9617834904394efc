"""Linear: y = output(W input(x) + b), with a part, or several, in each place.

How it multiplies is found at the first forward and kept with the weight: by a kernel that accepts all that the layer
holds, or the plain way, which is also the oracle of every kernel (`reference`).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.dense import Dense, dense_linear
from compression.layers.kernels.choose import BACKENDS, choose
from compression.layers.kernels.kernel import Kernel, LayerSpec, Product
from compression.layers.parts import InputPart, OutputPart, Part, WeightPart
from compression.layers.several import each_described, gathered
from compression.numeric.checks import FLOATS, check_finite, check_incoming, check_one_of, check_shape

PLACES = ("input_part", "weight_part", "output_part")
SIMULATED = "simulated"
"""The plain product of a layer whose activations are quantized: in floating point, so no faster for it."""


@dataclass
class Bound:
    """How a weight multiplies where it is.

    Attributes:
        product: x (..., cols) in `dtype` -> y (..., rows), without bias; None: there is none but the plain one.
        most: elements of x up to which it is taken; -1: never.
        bias: to be added behind it.
        others: further summands of the weight, each multiplied by itself.
    """

    product: Product | None
    dtype: torch.dtype
    most: float
    bias: Tensor | None = None
    others: tuple[WeightPart, ...] = ()
    kernel: Kernel | None = None
    spec: LayerSpec | None = None


class Linear(nn.Module):
    """A linear layer made of parts.

    Args:
        weight: a part, or several whose values add up.
        bias: (rows,), or None.
        input_part, output_part: a part, several one behind the other, or None.
        compute_dtype: in which the product is taken; that of the weight if None.
        backend: "auto", or a library whose kernel to insist on: "native", "torch", "bitsandbytes", "gptqmodel".

    Raises:
        LayerError: a part is of another place, or its shape is not the weight's.
    """

    input_part: InputPart | None
    weight_part: WeightPart
    output_part: OutputPart | None

    def __init__(
        self,
        weight: WeightPart | Sequence[WeightPart],
        bias: Tensor | None = None,
        *,
        input_part: InputPart | Sequence[InputPart] | None = None,
        output_part: OutputPart | Sequence[OutputPart] | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        check_one_of("compute_dtype", compute_dtype, (None, *FLOATS))
        check_one_of("backend", backend, BACKENDS)
        self.compute_dtype, self._backend = compute_dtype, backend
        self.weight_part, self.input_part, self.output_part = weight, input_part, output_part  # type: ignore[assignment]
        self.out_features, self.in_features = self.weight_part.shape
        if bias is not None:
            check_finite("bias", bias)
        if isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of(cls, linear: "nn.Linear | Linear") -> "Linear":
        """The layer itself, or one around the weight and bias of a dense layer, which it shares."""
        return linear if isinstance(linear, Linear) else cls(Dense(linear.weight), linear.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PLACES:
            value = gathered(value, name.removesuffix("_part"))
            if name != "weight_part":
                value = self._where_the_weight_is(value)
        if (name in PLACES or name == "bias") and "weight_part" in self._modules:
            self._modules["weight_part"].unbind()  # type: ignore[union-attr, operator]
        if name in PLACES:
            self._modules[name] = value
        else:
            super().__setattr__(name, value)

    def _where_the_weight_is(self, part: Part | None) -> Part | None:
        """The part itself, or where it has been made elsewhere, as of numbers that a method found, a copy."""
        weight = self._modules.get("weight_part")
        if weight is None or part is None:
            return part
        device = next(iter(weight.tensors().values())).device  # type: ignore[operator, union-attr]
        others = {tensor.device for tensor in part.tensors().values()} - {device}
        return copy.deepcopy(part).to(device) if others and torch.device("meta") not in {device, *others} else part

    # --- what it computes ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        bound = self._modules["weight_part"].bound or self._bind(x.device)  # type: ignore[union-attr]
        if x.numel() > bound.most or (x.requires_grad and torch.is_grad_enabled()):
            return self.plain(x)
        y = bound.product(x if x.dtype == bound.dtype else x.to(bound.dtype))
        if bound.bias is not None:
            y = y + bound.bias
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        for other in bound.others:
            y = y + other.multiply(x).to(y.dtype)
        return y

    def plain(self, x: Tensor) -> Tensor:
        """The product with the dense weight, made anew."""
        first, *others = self.weight_part.summands
        entering, leaving = self.input_part, self.output_part
        given = x.to(first.product_dtype(x, self.compute_dtype))
        if entering is not None:
            given = entering(given)
        y = first.multiply(given, self.bias).to(x.dtype)
        for other in others:
            y = y + other.multiply(x if entering is None else entering.exact(x)).to(y.dtype)
        return y if leaving is None else leaving(y)

    def reference(self, x: Tensor) -> Tensor:
        """The slow, obvious product in fp32: the oracle of every kernel. Same shape and dtype as `forward`."""
        entering, (first, *others) = self.input_part, self.weight_part.summands
        y = (x.float() if entering is None else entering(x.float())) @ first.value(torch.float32).t()
        for other in others:
            y = y + (x.float() if entering is None else entering.exact(x.float())) @ other.value(torch.float32).t()
        y = y if self.bias is None else y + self.bias.float()
        return (y if self.output_part is None else self.output_part(y)).to(x.dtype)

    def _bind(self, device: torch.device) -> Bound:
        """Find how the layer multiplies on a device, and keep it with the weight."""
        first, *others = self.weight_part.summands
        spec = self.spec_on(device)
        kernel, _ = choose(spec)
        if kernel is None:
            first.bound = Bound(None, spec.dtype, -1, spec=spec)  # no x is small enough
        else:
            product, after = first.hold(kernel, spec, self._beside(kernel)), None if kernel.fuses_bias else self.bias
            most = kernel.max_rows(spec) * self.in_features
            first.bound = Bound(product, spec.dtype, most, after, tuple(others), kernel, spec)
        return first.bound

    def _beside(self, kernel: Kernel) -> dict[str, Tensor]:
        """What a kernel computes with beside the weight: the bias, and tensors of the parts at the input."""
        found = {} if self.input_part is None or not kernel.accepts.inputs else dict(self.input_part.tensors())
        return found if self.bias is None or not kernel.fuses_bias else found | {"bias": self.bias}

    def spec_on(self, device: torch.device | str | None = None) -> LayerSpec:
        """What kernels on a device (default: where the layer is) look at."""
        first = self.weight_part.summands[0]
        where = device or next(iter(first.tensors().values())).device
        return LayerSpec(
            weight=first.kind, facts=first.facts, in_features=self.in_features, out_features=self.out_features,
            device=str(torch.device(where)), dtype=self.compute_dtype or self.dtype, backend=self.backend,
            inputs=each_described(self.input_part), outputs=each_described(self.output_part),
        )  # fmt: skip

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight that the layer stands for."""
        return self.weight_part.dtype

    @property
    def weight(self) -> Tensor:
        """W (out_features, in_features) in the dtype of the layer, made anew at every reading."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out_features, in_features) as it acts on the inputs of the layer, in `dtype` (default: the layer's)."""
        weight = self.weight_part.value(dtype)
        return weight if self.input_part is None else self.input_part.folded(weight)

    def lookup(self, places: Tensor) -> Tensor:
        """W[places] for int64 (...): (..., in_features) in the dtype of the layer."""
        return self.weight_part.lookup(places)

    def parts(self) -> Iterator[Part]:
        """The parts in its places, those that consist of several as one."""
        yield from (each for name in PLACES if (each := self._modules[name]) is not None)  # type: ignore[misc]

    def check(self) -> None:
        """Raise LayerError unless the tensors are what the layer is described as."""
        for each in self.parts():
            each.check()
        if self.bias is not None:
            check_finite("bias", check_shape(self, "bias", (self.out_features,), FLOATS))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Of its own it has the bias; the parts check what is theirs."""
        self.weight_part.unbind()
        check_incoming(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.bias is not None and f"{prefix}bias" in state_dict:
            try:
                check_finite("bias", check_shape(self, "bias", (self.out_features,), FLOATS))
            except LayerError as error:
                raise LayerError(f"{prefix.removesuffix('.') or 'the layer'}: {error}") from None

    def rows(self, kept: Tensor) -> "Linear":
        """The layer with these outputs alone, int64 (kept,); their weights are the same bits."""
        return self._cut("rows", kept, kept, None if self.bias is None else self.bias.detach()[kept])

    def columns(self, kept: Tensor) -> "Linear":
        """The layer with these inputs alone, int64 (kept,) ascending.

        Raises:
            LayerError: a part cannot be cut there.
        """
        stored = kept if self.input_part is None else self.input_part.stored_columns(kept)
        return self._cut("columns", kept, stored, None if self.bias is None else self.bias.detach())

    def _cut(self, way: str, kept: Tensor, stored: Tensor, bias: Tensor | None) -> "Linear":
        cut = {name: getattr(each, way)(kept) for name in ("input_part", "output_part")
               if (each := self._modules[name]) is not None}  # fmt: skip
        weight = getattr(self.weight_part, way)(stored)
        return Linear(weight, bias, compute_dtype=self.compute_dtype, backend=self.backend, **cut)

    def to_linear(self) -> nn.Linear:
        """A dense layer with the same weight; what its parts do to activations beside is left out."""
        return dense_linear(self.dequantize().detach(), None if self.bias is None else self.bias.detach())

    def simplest(self) -> nn.Module:
        """A dense layer of torch's where there is nothing but a dense weight, the layer itself elsewhere."""
        if self.input_part is not None or self.output_part is not None:
            return self
        return self.weight_part.alone(self.bias) or self

    def densified(self) -> nn.Module:
        """The layer with its weight unpacked once for many products; what its parts do to activations stays."""
        if self.input_part is None and self.output_part is None:
            return self.to_linear()
        return self.with_weight(Dense(self.weight_part.value().detach()))

    def with_weight(self, *parts: WeightPart) -> "Linear":
        """A layer with other summands as its weight, and everything else of this one."""
        return Linear(
            parts, self.bias, input_part=self.input_part, output_part=self.output_part,
            compute_dtype=self.compute_dtype, backend=self.backend,
        )  # fmt: skip

    @property
    def is_meta(self) -> bool:
        """Whether there are shapes and no values."""
        return next(iter(self.weight_part.tensors().values())).is_meta

    @property
    def exact(self) -> bool:
        """Whether the weight is floating-point numbers, which training or merging can change freely."""
        return self.weight_part.exact

    @property
    def stored_bytes(self) -> int:
        """Bytes in the state dict: those of the parts, and the bias."""
        return sum(each.bytes for each in self.parts()) + (0 if self.bias is None else self.bias.nbytes)

    @property
    def weights(self) -> int:
        """How many weights and biases of the model it stands for."""
        return self.weight_part.weights + (0 if self.bias is None else self.out_features)

    def kernel_name(self, device: torch.device | str | None = None) -> str:
        """How small batches are multiplied on the device (default: where the layer is).

        Raises:
            BackendError: the layer names a backend, and that has no kernel for it there.
        """
        kernel, _ = choose(self.spec_on(device))
        if kernel is not None:
            return kernel.name
        quantized = any(each.simulated for each in (self.input_part, self.output_part) if each is not None)
        return SIMULATED if quantized else self.weight_part.summands[0].plain

    def graph_refusal(self, device: torch.device | str | None = None) -> str | None:
        """Why a CUDA graph cannot hold the product, or None."""
        kernel, _ = choose(self.spec_on(device))
        if kernel is None or kernel.graph_safe:
            return None
        return f"the kernel {kernel.name} waits for the device within a step, which no CUDA graph can hold"

    @property
    def backend(self) -> str:
        """The library whose kernel is insisted on, or "auto"."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        check_one_of("backend", value, BACKENDS)
        self._backend = value
        self.weight_part.unbind()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
