"""The KV cache of a shared prefix: computed once, truncated, and copied to the rows that continue it.

transformers' own dynamic cache copies all it holds for every token that is added; the layers here write into room that
they keep, and a cut leaves that room where it is.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, tokens, head size), as views of buffers with room for more tokens."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < end:
            self._make_room(key_states, value_states, begin, tokens=max(end, 2 * begin))
        assert self.room is not None
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)
        return self.keys, self.values

    def _make_room(self, keys: Tensor, values: Tensor, held: int, tokens: int) -> None:
        made = [new.new_empty((*new.shape[:2], tokens, new.shape[-1])) for new in (keys, values)]
        if held:
            for buffer, old in zip(made, (self.keys, self.values), strict=True):
                buffer[:, :, :held] = old
        self.room = (made[0], made[1])

    def take(self, rows: Tensor, room: int) -> "RoomyLayer":
        """A layer with these rows (indices, repeated ones are copied), and room for so many more tokens."""
        taken = RoomyLayer()
        taken.lazy_initialization(self.keys, self.values)
        made = []
        for held in (self.keys, self.values):
            tokens = held.shape[-2]
            buffer = held.new_empty((len(rows), held.shape[1], tokens + room, held.shape[-1]))
            buffer[:, :, :tokens] = held if len(held) == 1 else held[rows]
            made.append(buffer)
        taken.room = (made[0], made[1])
        taken.keys, taken.values = (buffer[:, :, : held.shape[-2]] for buffer, held in
                                    zip(made, (self.keys, self.values), strict=True))  # fmt: skip
        return taken


def new_cache(model: Any) -> Cache:
    """An empty cache for a decoder of transformers; a sliding window is kept by the masks, not by the cache."""
    return Cache(layers=[RoomyLayer() for _ in range(model.config.num_hidden_layers)])


def take(cache: Cache, rows: list[int], room: int) -> Cache:
    """A cache with copies of these rows, and room for so many more tokens in each."""
    chosen = torch.tensor(rows, device=cache.layers[0].keys.device)
    return Cache(layers=[layer.take(chosen, room) for layer in cache.layers])


def cut(cache: Cache, tokens: int) -> None:
    """Back to the first `tokens` tokens."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.crop(tokens - layer.get_seq_length())


def read(model: Any, ids: list[int], cache: Cache) -> None:
    """Append the keys and values of further tokens to a cache of one row."""
    with torch.inference_mode():
        model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
