"""Where in their sequences the tokens of a forward pass are, for parts to which that matters.

A layer sees tokens and not their places: with a cache, a pass holds the next ones alone. `watch` has a decoder say
where its pass begins; without it, every pass begins at the start of its sequences.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_now: list[Tensor | int] = [0]


def current(y: Tensor) -> Tensor:
    """int64 (tokens,) or (batch, tokens): the places of the tokens of y (batch, tokens, ...), or (tokens, ...)."""
    begin = _now[-1]
    tokens = y.shape[-2]
    if isinstance(begin, Tensor) and begin.shape[-1] == tokens:
        return begin.to(y.device)
    return torch.arange(tokens, device=y.device) + (begin if isinstance(begin, int) else 0)


@contextmanager
def beginning(at: int) -> Iterator[None]:
    """Within it, passes begin at this place of their sequences: for who runs layers without their decoder."""
    _now.append(at)
    try:
        yield
    finally:
        _now.pop()


def is_watching(hook: Any) -> bool:
    """Whether a hook of a module is one of `watch`."""
    return hook is _enter or hook is _leave


def watch(model: nn.Module) -> None:
    """Have the decoder of a model say where each of its passes is, if a part wants to know; once is enough."""
    if not any(getattr(each, "positional", False) for each in model.modules()):
        return
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    if not any(hook is _enter for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        decoder.register_forward_hook(_leave, always_call=True)


def _enter(decoder: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    places, cache = named.get("position_ids"), named.get("past_key_values")
    if places is not None:
        _now.append(places)
    else:
        _now.append(0 if cache is None else int(cache.get_seq_length()))


def _leave(decoder: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
    if len(_now) > 1:
        _now.pop()
