"""What is kept of activations that pass: their largest values, their mean, their Hessian, their norms, some of them.

An observer of `cols` channels takes activations (..., cols) by `add` and has what it keeps as its `value()`. Observers
merge: `a.merge(b)` leaves a as if it had seen, after its own, what b saw; so that text can be split over workers.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from compression.errors import LayerError
from compression.numeric.rounding import ERROR_ROWS, Factored

PANEL = 256  # rows of H that are summed from their diagonal block on
ERROR_TOKENS = 1024


class Observer(Protocol):
    """What methods ask for; a class or function that makes one of (cols, device)."""

    def add(self, x: Tensor) -> None:
        """Take activations (..., cols) in."""

    def merge(self, other: Self) -> None:
        """Take in what another one saw after this."""

    def value(self) -> Any:
        """What is kept."""


class Largest:
    """The largest absolute value of each channel: fp32 (cols,), zero as long as nothing was added."""

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        self._largest = torch.zeros(cols, device=device)

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        torch.maximum(self._largest, flat.abs().amax(0).float(), out=self._largest)

    def merge(self, other: "Largest") -> None:
        torch.maximum(self._largest, other._largest, out=self._largest)

    def value(self) -> Tensor:
        """Raises LayerError: an activation is not finite."""
        return _finite(self._largest)


class Mean:
    """The mean of |x| over all tokens: float64 (cols,) on the CPU, zero as long as nothing was added."""

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        self._sum, self._tokens = torch.zeros(cols, dtype=torch.float64), 0

    def add(self, x: Tensor) -> None:
        leading = tuple(range(x.ndim - 1))
        self._sum += x.detach().abs().double().sum(leading).cpu()
        self._tokens += x.numel() // x.shape[-1]

    def merge(self, other: "Mean") -> None:
        self._sum += other._sum
        self._tokens += other._tokens

    def value(self) -> Tensor:
        return self._sum / max(1, self._tokens)


class Hessian:
    """H = 2/n sum x x^T of the inputs of a linear layer; the inputs themselves are not kept.

    What is added at once is multiplied in fp32, and added up in fp64. H is symmetric: there are its panels of at most
    PANEL rows alone, each from its diagonal block on to the right, which in fp64 take no more than all of H in fp32.
    """

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        self._cols, self._device, self._count = cols, device, 0
        self._panels: list[Tensor] = []  # none until something is added

    def add(self, x: Tensor) -> None:
        """Count inputs (..., cols) in."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self._count += len(x)
        products = (x[:, begin : begin + PANEL].t() @ x[:, begin:] for begin in range(0, self._cols, PANEL))
        if self._panels:
            for panel, product in zip(self._panels, products, strict=True):
                panel += product
        else:
            self._panels = [product.double() for product in products]

    def merge(self, other: "Hessian") -> None:
        self._count += other._count
        if self._panels and other._panels:
            for panel, more in zip(self._panels, other._panels, strict=True):
                panel += more
        else:
            self._panels = self._panels or other._panels

    def value(self) -> Tensor:
        """H, fp32 (cols, cols), zero as long as nothing was added."""
        whole = torch.zeros(self._cols, self._cols, device=self._device)
        for number, panel in enumerate(self._panels):
            begin, end = number * PANEL, number * PANEL + len(panel)
            upper = panel[:, : len(panel)].triu()
            panel = torch.cat([upper + upper.triu(1).t(), panel[:, len(panel) :]], 1) * (2 / max(1, self._count))
            whole[begin:end, begin:] = panel
            whole[end:, begin:end] = whole[begin:end, end:].t()
        return whole


@dataclass
class Reached:
    """What rounding needs of what reaches a layer.

    Attributes:
        largest: the largest absolute value of each channel, fp32 (cols,).
        hessian: fp32 (cols, cols).
    """

    largest: Tensor
    hessian: Tensor
    _factored: tuple[float, Factored] | None = None

    def factored(self, damp: float) -> Factored:
        """The Hessian factorized, once for all layers that share this."""
        if self._factored is None or self._factored[0] != damp:
            self._factored = damp, Factored.of(self.hessian, damp)
        return self._factored[1]


class Reaching:
    """The largest values and the Hessian at once: `Reached`."""

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        self._largest, self._hessian = Largest(cols, device), Hessian(cols, device)

    def add(self, x: Tensor) -> None:
        self._largest.add(x)
        self._hessian.add(x)

    def merge(self, other: "Reaching") -> None:
        self._largest.merge(other._largest)
        self._hessian.merge(other._hessian)

    def value(self) -> Reached:
        """Raises LayerError: an activation is not finite."""
        return Reached(self._largest.value(), self._hessian.value())


class Sample:
    """The activations themselves, of every `every`-th token that is added at once: fp32 (tokens, cols)."""

    def __init__(self, cols: int, device: torch.device | str = "cpu", *, every: int = 1):
        self._cols, self._device, self._every = cols, device, every
        self._some: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._some.append(x.detach().reshape(-1, x.shape[-1])[:: self._every].float().clone())

    def merge(self, other: "Sample") -> None:
        self._some += other._some

    def value(self) -> Tensor:
        return torch.cat(self._some) if self._some else torch.zeros(0, self._cols, device=self._device)


class Norms:
    """||x_j||_2 of the inputs of a linear layer, each over all tokens; and some of the inputs, evenly spread, by which
    output errors are judged.

    Args:
        tokens: how many are to come.
    """

    def __init__(self, cols: int, tokens: int, device: torch.device | str = "cpu"):
        self._squares = torch.zeros(cols, dtype=torch.float64, device=device)
        self._sample = Sample(cols, device, every=max(1, tokens // ERROR_TOKENS))

    def add(self, x: Tensor) -> None:
        """Count inputs (..., cols) in."""
        self._squares += x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
        self._sample.add(x)

    def merge(self, other: "Norms") -> None:
        self._squares += other._squares
        self._sample.merge(other._sample)

    def value(self) -> "Norms":
        """Itself; what `Hessian` calls its value is the sums here."""
        return self

    @property
    def norms(self) -> Tensor:
        """fp32 (cols,).

        Raises:
            LayerError: an input is not finite.
        """
        return _finite(self._squares).sqrt().float()

    def relative_error(self, weight: Tensor, changed: Tensor) -> float:
        """||x D^T||^2 / ||x W^T||^2 over the inputs that were kept and at most ERROR_ROWS rows of D = W - changed,
        evenly spread; 0 where the outputs are all zero."""
        rows, x = slice(0, None, -(-len(weight) // ERROR_ROWS)), self._sample.value()
        whole = float((x @ weight[rows].t()).square().sum())
        return float((x @ (weight - changed)[rows].t()).square().sum()) / whole if whole > 0 else 0.0


def _finite(kept: Tensor) -> Tensor:
    if not kept.isfinite().all():
        raise LayerError("the inputs of the calibration text to this layer are not finite; check the base")
    return kept
