"""Floating-point operations of a decoder, counted on the modules it has.

A multiply-add is two operations. Counted are the products: every linear layer with the output head, scores and values
of attention over the context. Norms, activations, rotary embeddings and the embedding look-up are left out: below 1 %.

The count is of the dense products of the layers as they are: layers removed and heads or channels cut out count less,
zeros stored as zeros and packed codes count as the dense layer they stand for. It is what the work needs, whatever a
kernel adds to it, as in MFU (PaLM, arXiv 2204.02311, appendix B).

    token    sum over linears 2 in out  +  sum over attentions 4 q min(context, window)
    q        query heads x head size: grouped key-value heads make `k_proj` and `v_proj` narrower, not the attention
    context  keys the token looks at, itself included; `window` is the model's sliding window, where it has one
"""

import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from bench.errors import MetricError, OptionError
from compression import architectures

if TYPE_CHECKING:
    from torch.nn import Module

    from bench.measure.generation import Load


def model_flops_per_token(model: "Module", context_tokens: int) -> int:
    """Operations of one token that is generated when `context_tokens` are in its sight, itself included.

    Raises OptionError for a context below 1, MetricError for a model without linear layers or with an attention whose
    width cannot be read.
    """
    _at_least_one(context_tokens=context_tokens)
    return _linear_flops(model) + sum(4 * q * min(context_tokens, window) for q, window in _attentions(model))


def prefill_flops(model: "Module", tokens: int, *, logits: int = 1) -> int:
    """Operations of a prompt of `tokens`, each of which sees itself and what comes before it.

    `logits` is the number of positions that go through the output head: 1 when generating, `tokens` when scoring.
    Raises as `model_flops_per_token`, and OptionError unless 1 <= logits <= tokens.
    """
    _at_least_one(tokens=tokens, logits=logits)
    if logits > tokens:
        raise OptionError(f"logits must be from 1 to {tokens}, the tokens of the prompt, not {logits}")
    head = model.get_output_embeddings()
    head_flops = 0 if head is None else _linear_flops(head)
    attention = sum(4 * q * _keys_seen(tokens, window) for q, window in _attentions(model))
    return (_linear_flops(model) - head_flops) * tokens + head_flops * logits + attention


def generation_flops(model: "Module", load: "Load") -> int:
    """Operations of one generation: the prompt, and the decode steps at the mean length of their context.

    Raises as `prefill_flops`.
    """
    middle = load.prompt_tokens + load.new_tokens // 2
    steps = (load.new_tokens - 1) * model_flops_per_token(model, middle)
    return load.batch_size * (prefill_flops(model, load.prompt_tokens) + steps)


def _linear_flops(model: "Module") -> int:
    """2 in out of the innermost linear layers: a low-rank or adapted layer counts as the layers it is made of."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    looked_up = set() if embeddings is None else set(embeddings.modules())  # rows of packed ones: nothing is multiplied
    shares, routers = _shares_of_experts(model)
    flops = routers + sum(
        2 * module.in_features * module.out_features * shares.get(id(module), 1)
        for module in model.modules()
        if module not in looked_up
        and _is_linear(module)
        and not any(_is_linear(part) for part in module.modules() if part is not module)
    )
    if not flops:
        raise MetricError(
            f"{type(model).__name__} has no layer with in_features and out_features, so there is nothing to count"
        )
    return int(flops)


def _shares_of_experts(model: "Module") -> tuple[dict[int, Fraction], int]:
    """By identity of a layer of an expert, the share of tokens that reach it when all experts get as many; operations
    of all routers."""
    shares: dict[int, Fraction] = {}
    if type(model).__name__ not in architectures.table.ARCHITECTURES:
        return shares, 0
    flops = 0
    for block in architectures.decoder.decoder_blocks(model):
        if (row := block.mlp.experts) is not None:
            router = block.layer(row.router)
            flops += 2 * router.weight.numel()
            share = Fraction(router.top_k, row.count)
            shares |= {id(module): share for module in block.layer(row.path).modules()}
    return shares, flops


def _is_linear(module: "Module") -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _attentions(model: "Module") -> Iterator[tuple[int, int]]:
    """Width of what is multiplied, the mean of queries and values, and length of the window of every attention."""
    default = getattr(model.config, "sliding_window", None)
    for block in architectures.decoder.decoder_blocks(model):
        half = block.attention
        for path in (half.queries or half.readers[0], half.writer):
            if not _is_linear(layer := block.layer(path)):
                raise MetricError(
                    f"{block.full(path)} is a {type(layer).__name__} without in_features and out_features, so the "
                    "width of its queries is not known; give the layer these two integers"
                )
        queries, writer = block.layer(half.queries or half.readers[0]), block.layer(half.writer)
        window = getattr(block.layer(half.module), "sliding_window", default)
        yield (queries.out_features + writer.in_features) // 2, window or sys.maxsize


def _keys_seen(tokens: int, window: int) -> int:
    """Keys that `tokens` positions look at together, each at its predecessors and itself, at most `window` of them.

    >>> _keys_seen(4, 100), _keys_seen(4, 2)  # 1 + 2 + 3 + 4, 1 + 2 + 2 + 2
    (10, 7)
    """
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, not {count!r}")
