"""The parts of a linear layer, and the registry of their kinds.

A layer computes y = output(W input(x) + b). Each of its three places, `input`, `weight` and `output`, is empty or holds
one part (the weight is never empty). A part has

    kind          its name in descriptions, given by `@part`
    settings      what `empty` needs to build it again, plain JSON
    tensors       registered as buffers, or as parameters where they can be trained
    rows, columns the same part for some of the outputs, or some of the inputs, of its layer
    bytes         of the tensors as they are stored

and is described, saved, restored, cut, counted and moved by these alone. Another package adds a kind by defining it:
nothing here names one. Several parts in a place are a part too (`several.Sum`, `several.Chain`).

    >>> @part("doubled", place="input")
    ... class Doubled(InputPart):
    ...     def forward(self, x): return 2 * x
    >>> part_kinds()["doubled"] is Doubled
    True
    >>> _ = KINDS.pop("doubled")
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from compression.errors import LayerError
from compression.layers.kernels.kernel import Kernel, LayerSpec, Product
from compression.layers.kernels.torch_products import frozen_product, product_dtype
from compression.numeric.checks import FLOATS, check_finite, check_incoming, check_loaded
from compression.numeric.grouping import Params

Place = Literal["input", "weight", "output"]

KINDS: dict[str, "type[Part]"] = {}
_OWN = (
    "several",
    "dense",
    "codes",
    "rounded",
    "blocks",
    "outlier_victim",
    "sparse",
    "low_rank",
    "columns",
    "activations",
    "ranges",
    "transforms",
)  # the modules here that define kinds

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_Part = TypeVar("_Part", bound="type[Part]")


def part(kind: str, *, place: Place) -> Callable[[_Part], _Part]:
    """Register a class of parts under the name that descriptions hold.

    Raises:
        LayerError: another class has that name.
    """

    def register(cls: _Part) -> _Part:
        other = KINDS.get(kind)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise LayerError(f"the kind {kind!r} of {cls.__module__}.{cls.__qualname__} is that of "
                             f"{other.__module__}.{other.__qualname__} already; choose another name")  # fmt: skip
        cls.kind, cls.place = kind, place
        KINDS[kind] = cls
        return cls

    return register


def part_kinds() -> "dict[str, type[Part]]":
    """Every registered kind of part by its name, those of this package included."""
    for name in _OWN:
        importlib.import_module(f"compression.layers.{name}")
    return dict(KINDS)


class Part(nn.Module):
    """What holds of every part; subclass one of the three below.

    Attributes:
        kind, place: set by `@part`.
        positional: whether it treats tokens by their place in the sequence (`layers.positions`).
        simulated: whether the plain product imitates in floating point what the part stands for, as a quantizer of
            activations does; reports then say so.
    """

    kind: ClassVar[str]
    place: ClassVar[Place]
    simulated: ClassVar[bool] = False
    positional: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `empty`, as plain JSON."""
        return {}

    @classmethod
    def empty(cls, rows: int, cols: int, **settings: Any) -> Self:
        """The part that has these settings, for a layer of `rows` outputs and `cols` inputs, its tensors on the meta
        device.

        Raises:
            LayerError: a setting is not allowed.
        """
        return cls(**settings)

    def check(self) -> None:
        """Raise LayerError unless the tensors are what the settings say; on the meta device there are no values."""
        for name, tensor in self.tensors().items():
            check_finite(name, tensor)

    def rows(self, kept: Tensor) -> "Part":
        """The part of the layer with these outputs alone, int64 (kept,)."""
        return self

    def columns(self, kept: Tensor) -> "Part":
        """The part of the layer with these inputs alone, int64 (kept,).

        Raises:
            LayerError: it cannot be cut there.
        """
        return self

    @property
    def bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def words(self) -> str:
        """What a report says of the part."""
        return self.kind

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, those of parts inside included."""
        named = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in named if name not in self._non_persistent_buffers_set}

    @property
    def follows_dtype(self) -> frozenset[str]:
        """The buffers that a change of the model's dtype reaches; all others stay as they were stored."""
        return frozenset()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: each for name, each in self._buffers.items() if each is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != before.dtype and name not in self.follows_dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_incoming(self, state_dict, prefix, tuple(self.follows_dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
        check_loaded(self, state_dict, prefix)


class InputPart(Part):
    """What happens to x (..., cols) before it is multiplied; `forward` computes it, in the dtype of x."""

    def exact(self, x: Tensor) -> Tensor:
        """What reaches summands of the weight beside the first: all but quantization of x, as adapters and low-rank
        branches multiply in floating point."""
        return x if self.simulated else self(x)

    def stored_columns(self, kept: Tensor) -> Tensor:
        """The inputs of the weight that are left where these inputs of the layer are, int64 (kept,)."""
        return kept

    def folded(self, weight: Tensor) -> Tensor:
        """The weight (rows, cols) that does the same to x itself; what is no linear map of x is left out."""
        return weight


class OutputPart(Part):
    """What happens to y (..., rows) after bias; `forward` computes it, in the dtype of y."""


class WeightPart(Part):
    """A matrix W (rows, cols), or a summand of one.

    Attributes:
        plain: what reports call the plain product.
        takes_others: whether there is an `again`.
        exact: whether that takes any weight as it is, but for zeros that the store has no place for.
        bound: the product with a kernel, once one is chosen; `compression.layers.linear.Bound`.
    """

    plain: ClassVar[str] = "dequantize"
    takes_others: bool = False
    exact: ClassVar[bool] = False
    bound: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight that the part stands for."""
        raise NotImplementedError

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (rows, cols), made anew, in `dtype` (default: its own)."""
        raise NotImplementedError

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b in the dtype of x, the plain way: the oracle of kernels."""
        bias = None if bias is None else bias.to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            y = frozen_product(x, self.value)
            return y if bias is None else y + bias
        return nn.functional.linear(x, self.value(x.dtype), bias)

    def product_dtype(self, x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
        """In which dtype x is multiplied the plain way: `wanted`, or its own, or fp32 where 16 bits are slower."""
        return product_dtype(wanted or x.dtype, x.device)

    def lookup(self, places: Tensor) -> Tensor:
        """W[places] for int64 (...): (..., cols)."""
        return self.value()[places]

    def again(self, weight: Tensor) -> "WeightPart":
        """Another weight (rows, cols) in the same store, on the same grid; rounded to nearest where it has to be.

        Raises:
            LayerError: it cannot be stored so.
        """
        raise LayerError(f"a weight of kind {self.kind} cannot take another one in; dequantize it first")

    def like(self, other: "WeightPart") -> "WeightPart | None":
        """The part with its scales stored as those of another are, None where they are."""
        return None

    def changed(self, before: "WeightPart") -> str:
        """Words on how the part is stored now, where cutting changed that of the one before; else nothing."""
        return ""

    def alone(self, bias: Tensor | None) -> nn.Module | None:
        """A module that computes the same without a `Linear`, None if there is none."""
        return None

    @property
    def weights(self) -> int:
        """How many weights of the model the part stands for, whatever they are stored in."""
        rows, cols = self.shape
        return rows * cols

    @property
    def summands(self) -> "tuple[WeightPart, ...]":
        """The parts whose values add up to this one's."""
        return (self,)

    @property
    def facts(self) -> dict[str, Any]:
        """What kernels look at beside kind, shape and dtype."""
        return {}

    def hold(self, kernel: Kernel, spec: LayerSpec, beside: Params) -> Product:
        """The product by a kernel: x (..., cols) in the dtype of `spec` -> y (..., rows), without bias unless the
        kernel fuses it.

        Args:
            beside: what else of the layer the kernel computes with, see `Kernel`.
        """
        return kernel.bind(self.value(spec.dtype), beside, spec)

    def unbind(self) -> None:
        """Let go of the kernel, and hold the tensors as they are stored."""
        self.bound = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.unbind()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.unbind()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        self.unbind()
        return self.__dict__.copy()


def build(description: Any, rows: int, cols: int, place: Place) -> Part:
    """The part that `described` gave this of, without values.

    Raises:
        LayerError: it describes no part for that place.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    cls = part_kinds().get(kind) if isinstance(kind, str) else None
    if cls is None or cls.place != place:
        known = ", ".join(sorted(name for name, each in part_kinds().items() if each.place == place))
        raise LayerError(f"{place}={description!r:.80} must be a table whose kind is one of {known}")
    settings = {name: value for name, value in description.items() if name != "kind"}
    parameters = list(inspect.signature(cls.empty).parameters.values())[2:]  # behind rows and cols
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        parameters = list(inspect.signature(cls).parameters.values())
    wanted = {each.name for each in parameters}
    needed = {each.name for each in parameters if each.default is each.empty}  # settings that came later have defaults
    if not needed <= settings.keys() <= wanted:
        raise LayerError(f"a part of kind {kind} has {_names(wanted)}, and is described by {_names(settings)}")
    return cls.empty(rows, cols, **settings)


def described(each: Part) -> dict[str, Any]:
    """A part as plain JSON."""
    return {"kind": each.kind, **each.settings}


def name_of(dtype: torch.dtype) -> str:
    """bfloat16, float32, ..."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: Any) -> torch.dtype:
    """The inverse, for types that weights are computed with. Raises LayerError for others."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise LayerError(f"dtype={name!r:.80} must be one of {', '.join(sorted(_DTYPES))}")
    return _DTYPES[name]


def straight_through(x: Tensor, changed: Tensor) -> Tensor:
    """`changed`, to the bit, with the gradient of x: rounding has no slope of its own."""
    return changed.detach() + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else changed


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
