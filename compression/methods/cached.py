"""Methods that store the keys and values of the cache in another way, and leave every layer as it is.

Nothing is computed: the policy is known from the settings, and is of the model when all steps are done
(`compression.caches`). So such a step stands before or behind any other, and streams.
"""

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING

from compression.errors import LayerError, RecipeError
from compression.methods.base import Context, check_finite
from compression.recipes.registry import Method, method, spell

if TYPE_CHECKING:
    from compression.architectures.decoder import Block
    from compression.caches.policy import Policy
    from compression.calibration.capture import Seen

__all__ = ["CacheMethod", "method"]

LEAST = {"group_size": 1, "tokens": 1, "residual": 0, "keep_first": 0}  # beside what is the default
MOST = 2**20


class CacheMethod(Method):
    """Stores keys and values of the cache in another way: subclasses define `policy`. Layers stay as they are."""

    unit = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, least = getattr(self, field.name), LEAST.get(field.name)
            if least is not None and value != field.default and not least <= value <= MOST:
                raise RecipeError(f"{self.info.name}({field.name}={value}): must be from {least} to {MOST:,}")

    @property
    @abstractmethod
    def policy(self) -> "Policy":
        """What the cache of the model stores.

        Raises:
            LayerError: settings contradict each other.
        """

    def check_block(self, block: "Block") -> None:
        """Raise LayerError if the cache of a block cannot be stored so; called for all blocks before any work."""
        if block.attention.keys is None:
            raise LayerError(f"{block.full(block.attention.module)}: {spell(self)} stores keys and values of heads, "
                             f"and the cache of {block.row.name} holds a latent of both")  # fmt: skip
        policy = self.policy
        for grid in (policy.keys, policy.values):
            grid.check_head(block.head_size)

    def apply_block(self, block: "Block", seen: "Seen | None", context: Context) -> None:
        """Checks weights, and reports each layer as kept."""
        for name, layer in block.linears():
            check_finite(name, layer)
            context.kept(name, f"{spell(self)} changes the cache alone: {self.policy.words}")
