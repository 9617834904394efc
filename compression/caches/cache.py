"""A cache of transformers that holds keys and values packed on grids, beside those that stay as they are.

Decoding token by token, attention reads the first tokens, what the grids give back, and the newest tokens. A pass of
several tokens is a prompt, and reads itself as it is, as KIVI and engines that quantize behind their prefill have it;
what it leaves in the cache is what token by token would have stored of the same keys and values.

A `replaying` cache gives a pass of several tokens both forms of those that are stored in its course, and `visible` says
which of them each query sees: exactly what decoding token by token shows it (`compression.caches.replaying`).
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from compression.caches.policy import Policy
from compression.errors import LayerError
from compression.numeric.cache_grids import Grid, Stored


class Side:
    """Keys or values of one layer, (batch, heads, tokens, head size)."""

    def __init__(self, grid: Grid, like: Tensor):
        self.grid, self.size = grid, like.shape[-1]
        self.dtype, self.device = like.dtype, like.device
        grid.check_head(self.size)
        self.first, self.newest = (like[:, :, :0].clone() for _ in range(2))  # views would keep the prompt
        self.stored: Stored = {}

    def append(self, new: Tensor, first: int) -> None:
        """Behind the newest; into the first while there are fewer than so many."""
        room = max(0, first - self.first.shape[2])
        if room:
            self.first = torch.cat([self.first, new[:, :, :room]], 2)
        self.newest = torch.cat([self.newest, new[:, :, room:]], 2)

    def store(self, tokens: int) -> None:
        """Move so many of the newest, the oldest of them, onto the grid."""
        if tokens:
            packed = self.grid.encode(self.newest[:, :, :tokens])
            self.stored = {name: torch.cat([self.stored[name], each], 2) if self.stored else each
                           for name, each in packed.items()}  # fmt: skip
            self.newest = self.newest[:, :, tokens:].clone()  # a view would keep what has moved

    def decoded(self) -> Tensor:
        """What the grid gives back."""
        if not self.stored:
            return self.first[:, :, :0]
        return self.grid.decode(self.stored, self.size, self.dtype)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.first, *self.stored.values(), self.newest]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        self.first, self.newest = self.first[rows], self.newest[rows]
        self.stored = {name: each[rows] for name, each in self.stored.items()}


class QuantizedLayer(CacheLayerMixin):
    """One layer of a `QuantizedCache`."""

    is_sliding = False

    def __init__(self, policy: Policy, replaying: bool = False):
        super().__init__()
        self.policy, self.replaying, self.held = policy, replaying, 0
        self.sides: tuple[Side, Side] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.sides = (Side(self.policy.keys, key_states), Side(self.policy.values, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns the keys and values that the new tokens read."""
        if self.sides is None:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None
        begin, end = self.held, self.held + key_states.shape[2]
        before, after = self.policy.stored_until(begin), self.policy.stored_until(end)
        prompt = not self.replaying and end - begin > 1
        shown = []
        for side, new in zip(self.sides, (key_states, value_states), strict=True):
            side.append(new, self.policy.keep_first)
            if prompt:
                shown.append(torch.cat([side.first, side.decoded(), side.newest], 2))
                side.store(after - before)
                continue
            exact = side.newest[:, :, self.policy.stored_until(begin + 1) - before :]
            side.store(after - before)
            shown.append(torch.cat([side.first, side.decoded(), exact], 2))
        self.held = end
        return shown[0], shown[1]

    def visible(self, new: int, window: int | None = None) -> Tensor:
        """Whether each of the next `new` queries sees what `update` will return, (queries, columns)."""
        policy, begin, end = self.policy, self.held, self.held + new
        query = torch.arange(begin, end)[:, None]
        until = torch.tensor([policy.stored_until(n + 1) for n in range(begin, end)])[:, None]
        first = torch.arange(min(policy.keep_first, end))
        stored = torch.arange(policy.keep_first, policy.stored_until(end))
        exact = torch.arange(min(policy.stored_until(begin + 1), end), end)
        sees = torch.cat([first <= query, stored < until, (exact >= until) & (exact <= query)], 1)
        if window is not None:
            sees &= torch.cat([first, stored, exact]) > query - window
        return sees

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        return sum(each.nbytes for side in self.sides or () for each in side.tensors())

    def get_seq_length(self) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.sides, self.held, self.is_initialized = None, 0, False

    def batch_select_indices(self, indices: Tensor) -> None:
        for side in self.sides or ():
            side.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sides is not None:
            rows = torch.arange(self.sides[0].newest.shape[0], device=self.sides[0].device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._refuse("be cut back: what was stored in groups does not come apart")

    def offload(self) -> NoReturn:
        self._refuse("be offloaded")

    def _refuse(self, what: str) -> NoReturn:
        raise LayerError(f"a quantized cache cannot {what}; begin a new one")


class QuantizedCache(Cache):
    """The cache of a model under a policy.

    Attributes:
        policy: what it stores.
        replaying: whether a pass of several tokens sees what token by token would (`compression.caches.replaying`).
    """

    def __init__(self, policy: Policy, layers: int, *, replaying: bool = False):
        super().__init__(layers=[QuantizedLayer(policy, replaying) for _ in range(layers)])
        self.policy, self.replaying = policy, replaying

    def replay(self) -> None:
        """From now on see what token by token would."""
        self.replaying = True
        for layer in self.layers:
            layer.replaying = True

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(layer.nbytes for layer in self.layers)
