"""One decode step of a supported decoder without the overhead of its Python modules.

transformers spends about a millisecond per layer and token on a CPU, most of it on what is not arithmetic; at batch 1
that hides what a kernel gains or loses. The step here calls the model's own linear layers, embedding and norm weights
in the order of the architecture, over the key and value buffers that the prompt has filled. Its logits are those of
the model up to rounding (tests compare them); a model that it does not know keeps its own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import rope
from compression.architectures.decoder import Block, Decoder
from compression.architectures.table import ARCHITECTURES, Architecture
from compression.layers import positions


def lean_step(model: Any, length: int) -> Callable[[Tensor, int, Any], Tensor] | None:
    """A function of (token ids (batch, 1), position, cache) to logits (batch, 1, vocabulary), or None if there is none.

    The cache must be one that `fits`, and hold the prompt: the step writes to its buffers, and does not advance its
    counters. `length` is the number of positions that will be used.
    """
    if (row := ARCHITECTURES.get(type(model).__name__)) is None or not _is_plain(row):
        return None
    hooks = [hook for module in model.modules()
             for each in (module._forward_hooks, module._forward_pre_hooks) for hook in each.values()]  # fmt: skip
    if not all(map(positions.is_watching, hooks)):
        return None
    if (limit := rope.limit(model.config)) is not None and length > limit:
        return None  # each position has the frequencies of its own pass
    decoder = Decoder(model)
    device = decoder.norm.weight.device
    probe = torch.empty(0, dtype=decoder.norm.weight.dtype, device=device)
    rotary = model.get_submodule(decoder.row.rotary)
    cos, sin = (t[0] for t in rotary(probe, torch.arange(length, device=device)[None]))
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], -1)  # with the sign of the rotated half
    embeddings, last, head = decoder.embeddings, _norm(decoder.norm), decoder.head
    blocks = [_block(block, half) for block in decoder.blocks]

    def step(token: Tensor, position: int, cache: Any) -> Tensor:
        h = embeddings(token)
        at, signed = cos[position], sin[position]
        for block, cached in zip(blocks, cache.layers, strict=True):
            h = block(h, at, signed, position, cached.keys, cached.values)
        return head(last(h))

    def step_at(token: Tensor, position: int, cache: Any) -> Tensor:
        with positions.beginning(position):
            return step(token, position, cache)

    return step_at if hooks else step


def _is_plain(row: Architecture) -> bool:
    """Whether a block is x + writer(between(readers(norm(x)))) with RMS norms, twice, and the head is all behind it."""
    halves = (*row.attentions, *row.mlps)
    usual = all(half.norm and not half.after and not half.experts and not half.latents for half in halves)
    around = (row.rotary, row.norm_kind, row.norm_offset, row.residual_scale, row.logits_divisor, row.logits_cap)
    return usual and not row.fused and around == (row.rotary or "", "rms", 0.0, None, None, None)


def fits(cache: Any, length: int) -> bool:
    """Whether a filled cache has a place for each of `length` positions, as a shorter sliding window has not."""
    from transformers.cache_utils import StaticLayer

    return all(isinstance(layer, StaticLayer) and layer.keys.shape[-2] >= length for layer in cache.layers)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The RMS norm of a module, in fp32 as transformers takes it, by one operation."""
    weight, shape, epsilon = norm.weight.float(), norm.weight.shape, norm.variance_epsilon
    return lambda x: F.rms_norm(x.float(), shape, weight, epsilon).to(x.dtype)


def _block(layer: Block, half: int) -> Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor], Tensor]:
    """One decoder layer over its keys and values: x + attention(norm(x)), then x + mlp(norm(x)).

    The query heads of a group attend to one head of keys as if they were that many positions, (batch, KV heads, group,
    head size): the same sums, without a copy of the keys for each of them.
    """
    row, size, (_, kv_heads) = layer.row, layer.head_size, layer.heads
    before, after = (_norm(layer.layer(part.norm or "")) for part in layer.halves)
    attention, mlp = layer.halves
    q_norm, k_norm = (None if path is None else _norm(layer.layer(path)) for path in (row.query_norm, row.key_norm))
    query, key, value, attended = map(layer.layer, (*attention.readers, attention.writer))
    gate, up, down = map(layer.layer, (*mlp.readers, mlp.writer))
    scale, activation = layer.layer(attention.module).scaling, layer.layer(mlp.module).act_fn
    beside_attention, beside_mlp = (layer.residual(number) or _same for number in range(2))

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(half, -1), sin)

    def block(h: Tensor, cos: Tensor, sin: Tensor, position: int, keys: Tensor, values: Tensor) -> Tensor:
        shape = (h.shape[0], kv_heads, -1, size)
        x = before(h)
        q, k = query(x).view(shape), key(x).view(shape)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        keys[:, :, position : position + 1] = rotate(k, cos, sin)
        values[:, :, position : position + 1] = value(x).view(shape)
        o = F.scaled_dot_product_attention(
            rotate(q, cos, sin), keys[:, :, : position + 1], values[:, :, : position + 1], scale=scale
        )
        h = beside_attention(h) + attended(o.reshape(h.shape[0], 1, -1))
        x = after(h)
        return beside_mlp(h) + down(activation(gate(x)) * up(x))

    return block


def _same(x: Tensor) -> Tensor:
    return x
