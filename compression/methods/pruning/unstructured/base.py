"""What the methods that set single weights to zero have in common: how many go, in which pattern, how it is stored."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compression import calibration, layers, numeric
from compression.errors import LayerError, RecipeError
from compression.methods.base import LayerMethod
from compression.methods.calibrated import CalibratedMethod
from compression.recipes.registry import spell

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compression.methods.base import Context
    from compression.numeric.sparsity import Pruned

MOST_NEIGHBOURS = 32  # m of a pattern
DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Pruner(LayerMethod):
    """A method that sets weights to zero.

    A `pattern` n:m leaves n of every m neighbouring inputs of a row, as NVIDIA and Wanda count; SparseGPT's n are the
    zeros, which for 2:4 and 4:8 is the same. Without it `sparsity` of each unit of weights goes; what the unit is, the
    methods say.
    """

    sparsity: float | None = None  # share of weights that become zero; none: 0.5, or what the pattern leaves
    pattern: str | None = None  # n:m, n weights of m neighbouring inputs stay
    store: Literal["dense", "bitmask", "nm"] = "dense"  # as large as before, values and a bitmap, or values and places

    def __post_init__(self) -> None:
        super().__post_init__()
        name, implied = self.info.name, DEFAULT_SPARSITY
        if self.pattern is not None:
            if self.kept is None:
                raise RecipeError(f"{name}(pattern={self.pattern!r}): allowed are none and n:m with 0 < n < m <= "
                                  f"{MOST_NEIGHBOURS}, n weights of m neighbours that stay, e.g. 2:4")  # fmt: skip
            n, m = self.kept
            implied = 1 - n / m
            if self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
                raise RecipeError(f"{name}(sparsity={self.sparsity},pattern={self.pattern}): the pattern makes "
                                  f"{m - n} of {m} weights zero, a sparsity of {implied:g}; leave one of the two "
                                  "out")  # fmt: skip
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RecipeError(f"{name}(sparsity={self.sparsity}): allowed are 0 to below 1; the papers take 0.5")
        if self.store == "nm" and self.pattern is None:
            raise RecipeError(f"{name}(store=nm): needs a pattern, e.g. pattern=2:4; without one, store=bitmask")
        if self.sparsity is not None and abs(self.sparsity - implied) <= 1e-9:
            object.__setattr__(self, "sparsity", None)  # one spelling for one recipe

    @property
    def share(self) -> float:
        """The share of weights that become zero."""
        if self.sparsity is not None:
            return self.sparsity
        return DEFAULT_SPARSITY if self.kept is None else 1 - self.kept[0] / self.kept[1]

    @property
    def kept(self) -> tuple[int, int] | None:
        """(n, m) of the pattern; None if there is none, or it is no pattern."""
        found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", self.pattern or "")
        n, m = map(int, found.groups()) if found else (0, 0)
        return (n, m) if 0 < n < m <= MOST_NEIGHBOURS else None

    def check_layer(self, in_features: int, out_features: int) -> None:
        if self.kept is not None and in_features % self.kept[1]:
            divisors = [m for m in range(2, MOST_NEIGHBOURS + 1) if in_features % m == 0]
            raise LayerError(
                f"pattern={self.pattern} does not divide the {in_features} inputs of the layer; an m that does: "
                f"{', '.join(map(str, divisors)) or 'none'}; pattern=none takes any number"
            )

    def magnitude_mask(self, weight: "torch.Tensor") -> "torch.Tensor":
        """Where the smallest weights of fp32 (rows, cols) are, in as many places as the method takes."""
        return numeric.sparsity.choose(weight.abs(), self.share, self.kept, by_row=False)

    def compress_linear(self, linear: "nn.Linear", context: "Context") -> "nn.Module":
        """What a linear of which no input is known becomes: the smallest weights go."""
        import torch

        if not torch.isfinite(linear.weight).all():
            raise LayerError(
                "the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too narrow a dtype"
            )
        weight = linear.weight.detach()
        return self.layer(weight.masked_fill(self.magnitude_mask(weight.float()), 0), linear.bias)

    def layer(self, weight: "torch.Tensor", bias: "torch.Tensor | None") -> "nn.Module":
        """A pruned weight in the dtype of the base, stored as the method says."""
        if self.store != "dense":
            return layers.linear.Linear(
                layers.sparse.Sparse.from_weight(weight, self.kept if self.store == "nm" else None), bias
            )
        return layers.dense.dense_linear(weight, None if bias is None else bias.detach())

    def describe(self, linear: "nn.Linear", layer: Any) -> str:
        before, after = linear.weight.float(), layer.weight.float()
        whole = float(before.norm())
        error = float((before - after).norm()) / whole if whole > 0 else 0.0
        return f"{self.facts(layer)}, weight error {error:.3g}"

    def facts(self, layer: Any) -> str:
        """The settings, the sparsity that was reached, and the kernel of a layer that is not stored densely."""
        weight = layer.weight
        kernel = f", kernel {layer.kernel_name()}" if self.store != "dense" else ""
        return f"{spell(self)}{kernel}, sparsity {float((weight == 0).sum()) / weight.numel():.4g}"


@dataclass(frozen=True, kw_only=True)
class CalibratedPruner(Pruner, CalibratedMethod):
    """A pruner that reads the inputs of each linear; subclasses define `prune`."""

    samples: int = 128  # of calibration text
    sequence_length: int = 512  # tokens of each sample

    def prune(self, weights: "list[torch.Tensor]", seen: Any) -> "Pruned":
        """The pruned weights, fp32 (rows, cols), of layers that read the same input, by what was seen of it.

        Raises:
            LayerError: an input is not finite.
        """
        raise NotImplementedError

    def compress_stack(self, block: Any, layers: Any, seen: Any, note: str) -> None:
        calibration.blockwise.prune(block, self, layers, seen, note)
