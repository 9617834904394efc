"""A model whose keys and values are quantized: its policy, its caches, and passes that see what generation would.

One pass over a text has no past: a policy that leaves the newest tokens as they are would look lossless. So a decoder
with a policy replays generation instead: in a pass without a cache each query reads, of every token before it, the form
in which the cache would hold it by then, as decoding token by token from the first token on has it. That takes both
forms of a key at once, and a mask. `hidden` does so in chunks, whose masks and copies are small.

A pass with a `QuantizedCache` decodes; with any other cache it is refused, for it would measure another model.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compression import caches
from compression.caches.policy import Policy
from compression.errors import LayerError

if TYPE_CHECKING:
    from compression.caches.cache import QuantizedCache

CHUNK = 256  # tokens of a pass of `hidden`


def attach(model: nn.Module, policy: Policy | None) -> None:
    """Have a decoder hold its keys and values under a policy; None: in the dtype of the model, as it was."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    for number in [n for n, hook in decoder._forward_pre_hooks.items() if hook is _enter]:
        del decoder._forward_pre_hooks[number]
        decoder._forward_pre_hooks_with_kwargs.pop(number, None)
    decoder.cache_policy = policy
    if policy is not None:
        decoder.register_forward_pre_hook(_enter, with_kwargs=True)


def policy_of(model: nn.Module) -> Policy | None:
    """The policy of a model; None for most."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return getattr(decoder, "cache_policy", None)


def new_cache(model: nn.Module, *, replaying: bool = False) -> "QuantizedCache":
    """An empty cache for a model with a policy.

    Raises:
        LayerError: it has none.
    """
    policy = policy_of(model)
    if policy is None:
        raise LayerError("the model has no cache policy: its keys and values are not quantized")
    return caches.cache.QuantizedCache(policy, model.config.num_hidden_layers, replaying=replaying)  # type: ignore[union-attr]


def hidden(model: nn.Module, ids: Tensor, *, prompt: int = 0, chunk: int = CHUNK) -> Tensor:
    """The last hidden states (batch, tokens, width) of ids (batch, tokens), as generation would have computed them.

    Args:
        model: with a policy.
        ids: rows padded on the right, if at all.
        prompt: tokens that are read in one pass, as generation reads a prompt; those behind it one by one.
        chunk: tokens of one pass.

    Raises:
        LayerError: the model has no policy.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    cache, found = new_cache(model), []
    if prompt:
        found.append(decoder(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)[0])
    cache.replay()
    for begin in range(prompt, ids.shape[1], chunk):
        found.append(decoder(input_ids=ids[:, begin : begin + chunk], past_key_values=cache, use_cache=True)[0])
    return torch.cat(found, 1)


def _enter(decoder: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """What a pass of a decoder with a policy is given."""
    cache, mask = named.get("past_key_values"), named.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())
    if padded and (cache is None or cache.replaying or decoder.cache_policy.needs_alignment):
        raise LayerError("rows are padded on the left, and a quantized cache counts tokens from the beginning of a "
                         "row: pad on the right, or give the rows one length")  # fmt: skip
    if cache is None:
        cache = new_cache(decoder, replaying=True)
    elif not isinstance(cache, caches.cache.QuantizedCache):
        raise LayerError(f"keys and values of this model are quantized, and a {type(cache).__name__} is not: give "
                         "past_key_values=compression.caches.replaying.new_cache(model), or no cache")  # fmt: skip
    if cache.replaying:
        ids = arguments[0] if arguments else named.get("input_ids")
        ids = named["inputs_embeds"] if ids is None else ids
        named = {**named, "attention_mask": _masks(decoder, cache, ids)}
        if named.get("position_ids") is None:  # some decoders count the ones of a mask otherwise
            begin = cache.get_seq_length()
            named["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    return arguments, {**named, "past_key_values": cache, "use_cache": True}


def _masks(decoder: Any, cache: "QuantizedCache", ids: Tensor) -> Any:
    """What attention takes, (batch, 1, queries, columns); by kind of layer where the decoder has several."""
    config, new = decoder.config, ids.shape[1]
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)

    def mask(window: int | None) -> Tensor:
        sees = cache.layers[0].visible(new, window).to(ids.device).expand(ids.shape[0], 1, -1, -1)
        if config._attn_implementation == "sdpa":
            return sees
        dtype = decoder.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill(~sees, torch.finfo(dtype).min)

    if not kinds:
        return mask(window)
    by_kind = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(kinds) - set(by_kind)):
        raise LayerError(f"no quantized cache holds what {', '.join(unknown)} reads")
    masks = {kind: mask(by_kind[kind]) for kind in set(kinds)}
    return masks if len(masks) > 1 or "sliding_attention" in masks else masks["full_attention"]
