"""Linear maps of a layer's inputs that stand before the weight: by channel, in another order, turned.

Where what comes before a layer can take such a map in, that is better (an edit of the decoder); where nothing can, it
is computed at run time here.
"""

from typing import Any, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.layers.parts import InputPart, part
from compression.numeric import hadamard
from compression.numeric.checks import FLOATS, check_finite, check_permutation, check_shape, check_size


@part("scale", place="input")
class Scale(InputPart):
    """x s: every channel times a number of its own. `factors` is fp32 (cols,)."""

    def __init__(self, factors: Tensor):
        super().__init__()
        self.register_buffer("factors", factors.detach().float())

    @classmethod
    def empty(cls, rows: int, cols: int) -> Self:
        return cls(torch.empty(cols, device="meta"))

    def check(self) -> None:
        check_finite("factors", check_shape(self, "factors", (len(self.factors),), FLOATS))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.to(x.dtype)

    def columns(self, kept: Tensor) -> "Scale":
        return Scale(self.factors[kept])

    def folded(self, weight: Tensor) -> Tensor:
        return weight * self.factors.to(weight.dtype)


@part("permutation", place="input")
class Permutation(InputPart):
    """x in another order: input j of the weight is input `order[j]` of the layer. `order` is int32 (cols,)."""

    def __init__(self, order: Tensor):
        super().__init__()
        check_permutation(order, len(order))
        self.register_buffer("order", order.int())

    @classmethod
    def empty(cls, rows: int, cols: int) -> Self:
        return cls(torch.empty(cols, dtype=torch.int32, device="meta"))

    def check(self) -> None:
        check_permutation(check_shape(self, "order", (len(self.order),), {torch.int32}), len(self.order))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def stored_columns(self, kept: Tensor) -> Tensor:
        return torch.nonzero(torch.isin(self.order.cpu(), kept.cpu().int())).flatten()

    def columns(self, kept: Tensor) -> "Permutation":
        place = torch.full((len(self.order),), -1)
        place[kept.cpu()] = torch.arange(len(kept))
        order = place[self.order.cpu().long()]
        return Permutation(order[order >= 0].to(self.order.device))

    def folded(self, weight: Tensor) -> Tensor:
        return weight[:, self.order.argsort()]


@part("rotation", place="input")
class Rotation(InputPart):
    """x R, R orthogonal (block, block), on each block of channels one behind the other. `turn` is fp32.

    Raises:
        LayerError: the blocks do not tile the inputs.
    """

    def __init__(self, turn: Tensor):
        super().__init__()
        self.register_buffer("turn", turn.detach().float())

    @property
    def settings(self) -> dict[str, Any]:
        return {"block": len(self.turn)}

    @classmethod
    def empty(cls, rows: int, cols: int, *, block: Any) -> Self:
        if type(block) is not int or block < 1 or cols % block:
            raise LayerError(f"block={block!r:.80} must be a divisor of the {cols} inputs")
        return cls(torch.empty(block, block, device="meta"))

    def check(self) -> None:
        check_finite("turn", check_shape(self, "turn", (len(self.turn), len(self.turn)), FLOATS))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(self.turn))) @ self.turn.to(x.dtype)).flatten(-2)

    def columns(self, kept: Tensor) -> "Rotation":
        raise LayerError("its inputs are rotated into each other, and none of them can go; remove before rotating")

    def folded(self, weight: Tensor) -> Tensor:
        return (weight.unflatten(-1, (-1, len(self.turn))) @ self.turn.to(weight.dtype).t()).flatten(-2)


@part("hadamard", place="input")
class Hadamard(InputPart):
    """x H / sqrt(block), a Hadamard matrix, on each block of channels one behind the other; nothing is stored.

    Args:
        block: size of the matrix, the number of inputs or a divisor of it.

    Raises:
        LayerError: there is no such matrix, or blocks do not tile the inputs.

    Source: QuaRot, arXiv 2404.00456, stage 1b: in front of down projections, whose weights have its inverse (R4).
    """

    def __init__(self, block: int):
        super().__init__()
        check_size("block", block)
        if hadamard.factors(block) is None:
            raise LayerError(f"block={block}: no Hadamard matrix of that size is made here; {hadamard.block_of(block)} "
                             "is a divisor that can be")  # fmt: skip
        self.block = block

    @property
    def settings(self) -> dict[str, Any]:
        return {"block": self.block}

    @classmethod
    def empty(cls, rows: int, cols: int, *, block: Any) -> Self:
        check_size("block", block)
        if cols % block:
            raise LayerError(f"block={block!r:.80} must be a divisor of the {cols} inputs")
        return cls(block)

    @property
    def words(self) -> str:
        return f"a Hadamard transform of {self.block} inputs"

    def forward(self, x: Tensor) -> Tensor:
        return hadamard.transform(x, self.block)

    def columns(self, kept: Tensor) -> "Hadamard":
        raise LayerError("its inputs are mixed by a Hadamard matrix, and none of them can go; remove before rotating")

    def folded(self, weight: Tensor) -> Tensor:
        return hadamard.back(weight, self.block)

    def taken(self, weight: Tensor) -> Tensor:
        """The weight (rows, cols) that the layer has behind it, so that it computes the same: W H / sqrt(block)."""
        return hadamard.transform(weight, self.block)
