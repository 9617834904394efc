"""Several parts in one place of a layer: inputs and outputs one after the other, weights added up."""

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.parts import InputPart, OutputPart, Part, WeightPart, build, described, part
from compression.numeric.checks import check_size


def each_described(given: Part | None) -> tuple[dict[str, Any], ...]:
    """The parts of a place, each as it is described."""
    parts = () if given is None else given if isinstance(given, _Several) else (given,)
    return tuple(described(each) for each in parts)


def gathered(value: Any, place: str) -> Part | None:
    """One part for a place, of one, several or none. LayerError if one belongs elsewhere."""
    if value is None and place != "weight":
        return None
    parts = (value,) if isinstance(value, Part) else tuple(value) if isinstance(value, Iterable) else (value,)
    for each in parts:
        if not isinstance(each, Part) or each.place != place:
            raise LayerError(f"{type(each).__name__} is no part for the place {place!r} of a layer")
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise LayerError(f"the place {place!r} of a layer cannot be filled with no part at all")
    return Sum(*parts) if place == "weight" else (Chain if place == "input" else OutputChain)(*parts)


class _Several(Part):
    """Parts in one place, in order."""

    def __init__(self, *parts: Part):
        super().__init__()
        for number, each in enumerate(parts):
            self.add_module(str(number), each)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    @classmethod
    def empty(cls, rows: int, cols: int, *, parts: Any) -> Self:
        if not isinstance(parts, list) or len(parts) < 2:
            raise LayerError(f"parts={parts!r:.80} must be a list of two parts or more")
        if any(isinstance(each, dict) and each.get("kind") == cls.kind for each in parts):
            raise LayerError(f"parts={parts!r:.80} must not hold a {cls.kind} within a {cls.kind}")
        return cls(*(build(each, rows, cols, cls.place) for each in parts))

    def extra_repr(self) -> str:
        return ""

    @property
    def settings(self) -> dict[str, Any]:
        return {"parts": [described(each) for each in self]}

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self)

    @property
    def words(self) -> str:
        return ", ".join(each.words for each in self)

    @property
    def simulated(self) -> bool:  # type: ignore[override]
        return any(each.simulated for each in self)

    def check(self) -> None:
        for each in self:
            each.check()

    def rows(self, kept: Tensor) -> Self:
        return type(self)(*(each.rows(kept) for each in self))


@part("chain", place="input")
class Chain(_Several, InputPart):
    """One after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for each in self:
            x = each(x)
        return x

    def exact(self, x: Tensor) -> Tensor:
        for each in self:
            x = each.exact(x)
        return x

    def columns(self, kept: Tensor) -> "Chain":
        cut = []
        for each in self:
            cut.append(each.columns(kept))
            kept = each.stored_columns(kept)
        return Chain(*cut)

    def stored_columns(self, kept: Tensor) -> Tensor:
        for each in self:
            kept = each.stored_columns(kept)
        return kept

    def folded(self, weight: Tensor) -> Tensor:
        for each in reversed(tuple(self)):
            weight = each.folded(weight)
        return weight


@part("output_chain", place="output")
class OutputChain(_Several, OutputPart):
    """One after the other."""

    def forward(self, y: Tensor) -> Tensor:
        for each in self:
            y = each(y)
        return y


@part("sum", place="weight")
class Sum(_Several, WeightPart):
    """W is the sum of the parts' values; the first one says in which dtype, and may have a kernel."""

    def __init__(self, *parts: WeightPart):
        check_size("parts of a sum", len(parts), least=2)
        for each in parts:
            if each.shape != parts[0].shape:
                raise LayerError(f"parts of {parts[0].shape} and {each.shape} cannot be added up")
        super().__init__(*(inner for each in parts for inner in each.summands))

    @property
    def bound(self) -> Any:  # type: ignore[override]
        return self._modules["0"].bound  # type: ignore[union-attr]

    @property
    def shape(self) -> tuple[int, int]:
        return self.summands[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.summands[0].dtype

    @property
    def summands(self) -> tuple[WeightPart, ...]:
        return tuple(self)

    @property
    def weights(self) -> int:
        return sum(each.weights for each in self)

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum, taken in fp32 (in fp64 where that is asked for), and rounded once; without a dtype, of the first
        part as it is in its own."""
        wide = torch.promote_types(dtype or self.dtype, torch.float32)
        first, *others = self.summands
        total = first.value(None if dtype is None else wide).to(wide)
        for other in others:
            total = total + other.value().to(wide)
        return total.to(dtype or self.dtype)

    def lookup(self, places: Tensor) -> Tensor:
        first, *others = self.summands
        total = first.lookup(places).float()
        for other in others:
            total = total + other.lookup(places).float()
        return total.to(self.dtype)

    def columns(self, kept: Tensor) -> "Sum":
        return Sum(*(each.columns(kept) for each in self))

    def unbind(self) -> None:
        for each in self.summands:
            each.unbind()
