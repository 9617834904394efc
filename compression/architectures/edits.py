"""Cutting a decoder smaller: whole layers, heads of keys and values with their query heads, neurons of the MLP.

What is kept keeps its values: rows and columns are taken out of dense weights, codes and scales, never computed anew
(but for columns of a packed layer that do not fall into groups, see `PackedLinear.take_columns`). The shape of every
block stays that of all the others, as the configuration of transformers wants it: `conform` writes it there.
Shapes: q_proj (query heads x head size, hidden), k_proj and v_proj (KV heads x head size, hidden), o_proj (hidden,
query heads x head size); query head h attends to KV head h // group, group = query heads / KV heads. gate_proj and
up_proj (neurons, hidden), down_proj (hidden, neurons). Indices that are kept are ascending.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import decoder
from compression.architectures.decoder import Block
from compression.checkpoints import base as _checkpoint
from compression.errors import LayerError
from compression.layers.embedding import PackedEmbedding
from compression.layers.low_rank import LoraLinear
from compression.layers.packed import PackedLinear

Linear = nn.Linear | PackedLinear | LoraLinear


def share_of(share: float, count: int) -> int:
    """So many of `count`, rounded down as the papers' code does; a product that is whole but for its last bit is whole.

    >>> share_of(0.625, 32), share_of(0.75, 2), share_of(0.29, 100)
    (20, 1, 29)
    """
    return int(share * count + 1e-9)


def count_heads(block: Block) -> tuple[int, int]:
    """Number of query heads and of heads of keys and values."""
    attention = block.module.self_attn
    return tuple(layer.out_features // attention.head_dim for layer in (attention.q_proj, attention.k_proj))


def check_weights(model: nn.Module) -> None:
    """Raise LayerError, naming the layer, if a dense weight of a block is not finite."""
    for block in decoder.decoder_blocks(model):
        for name, linear in block.linears():
            if isinstance(linear, nn.Linear) and not torch.isfinite(linear.weight).all():
                raise LayerError(
                    f"{name}: the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too "
                    "narrow a dtype"
                )


def weight_of(linear: Linear) -> Tensor:
    """fp32 (rows, cols), dequantized where it is packed, with its adapter where it has one."""
    if isinstance(linear, LoraLinear):
        return weight_of(linear.base) + linear.product().detach().float()
    return linear.dequantize(torch.float32) if isinstance(linear, PackedLinear) else linear.weight.detach().float()


def keep_layers(model: nn.Module, kept: Sequence[int]) -> None:
    """Leave the blocks of these numbers; they are numbered anew, as the cache counts them."""
    body, config = model.model, model.config
    body.layers = nn.ModuleList([body.layers[i] for i in kept])
    for number, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = number
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def keep_heads(block: Block, kept: Tensor) -> dict[str, str]:
    """Leave these KV heads, int64 (kept,), and the query heads of their groups; returns and raises as `_cut`."""
    query_heads, kv_heads = count_heads(block)
    size = block.module.self_attn.head_dim
    query = _spread(_spread(kept, query_heads // kv_heads), size)
    rows = {"q_proj": query, "k_proj": _spread(kept, size), "v_proj": _spread(kept, size)}
    return _cut(block, "self_attn", rows, "o_proj", query)


def keep_neurons(block: Block, kept: Tensor) -> dict[str, str]:
    """Leave these neurons of the MLP, int64 (kept,); returns and raises as `_cut`."""
    return _cut(block, "mlp", {"gate_proj": kept, "up_proj": kept}, "down_proj", kept)


def _spread(indices: Tensor, size: int) -> Tensor:
    """The members of blocks of `size`: 2 and 0 of size 3 are 6, 7, 8, 0, 1, 2."""
    return (indices[:, None] * size + torch.arange(size)).flatten()


def _cut(block: Block, part: str, rows: dict[str, Tensor], reader: str, columns: Tensor) -> dict[str, str]:
    """Takes rows out of the layers of a part and columns out of the one that reads them.

    Returns:
        The full name of each of these layers, with words on how a packed one is stored now, for reports.

    Raises:
        LayerError: the groups of a packed layer cannot be cut so; the message names it.
    """
    told = {}
    for path, kept in (*rows.items(), (reader, columns)):
        name, before, change = f"{block.name}.{part}.{path}", block.module.get_submodule(f"{part}.{path}"), 0.0
        try:
            if path == reader:
                after, change = _take_columns(before, kept)
            else:
                after = _take_rows(before, kept)
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from error
        block.replace(name, after)
        told[name] = _tell(before, after, change)
    return told


def _tell(before: Linear, after: Linear, change: float) -> str:
    if not isinstance(before, PackedLinear) or not isinstance(after, PackedLinear) or after.codes.is_meta:
        return ""
    words = f", kernel {after.kernel_name()}"
    if before.grid.group_size != after.grid.group_size:
        words += f", groups of {after.grid.group_size} instead of {before.grid.group_size}"
    if getattr(before.grid, "double_quant", False) != getattr(after.grid, "double_quant", False):
        words += ", scales in fp32 because their blocks of 256 were cut"
    return words + (f", rounded again, which moved its weights by {change:.3g} of their norm" if change else "")


def _take_rows(layer: Linear, rows: Tensor) -> Linear:
    if isinstance(layer, LoraLinear):
        return layer.with_base(_take_rows(layer.base, rows), layer.lora_a, layer.lora_b[rows])
    if isinstance(layer, PackedLinear):
        return layer.take_rows(rows)
    return _dense(layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def _take_columns(layer: Linear, columns: Tensor) -> tuple[Linear, float]:
    if isinstance(layer, LoraLinear):
        base, change = _take_columns(layer.base, columns)
        return layer.with_base(base, layer.lora_a[:, columns], layer.lora_b), change
    if isinstance(layer, PackedLinear):
        return layer.take_columns(columns)
    return _dense(layer.weight[:, columns], layer.bias), 0.0


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def conform(model: nn.Module) -> nn.Module:
    """The model with the shapes of its blocks in its configuration; of another class where its own refuses them.

    transformers' Llama wants a hidden size that is a multiple of the number of heads, though nothing it computes needs
    that. Mistral without a sliding window is the same function and does not, so such a Llama becomes a Mistral.

    Raises:
        LayerError: there is no such class, because the Llama has biases.
    """
    config, block = model.config, decoder.decoder_blocks(model)[0]
    config.head_dim = block.module.self_attn.head_dim
    config.num_attention_heads, config.num_key_value_heads = count_heads(block)
    config.intermediate_size = block.module.mlp.gate_proj.out_features
    if config.model_type != "llama" or config.hidden_size % config.num_attention_heads == 0:
        return model
    for name, linear in block.linears():
        if linear.bias is not None:
            raise LayerError(
                f"{name} has a bias, and transformers has no class for {config.num_attention_heads} heads of a Llama "
                f"of width {config.hidden_size} with biases; keep a number of heads that divides the width, or all of "
                "them"
            )
    return _as_mistral(model)


def _as_mistral(model: nn.Module) -> nn.Module:
    from transformers import MistralConfig

    fields = {field.name for field in dataclasses.fields(MistralConfig)}
    config: dict[str, Any] = {key: value for key, value in model.config.to_dict().items() if key in fields}
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    weight = model.get_submodule("model.embed_tokens").weight
    renamed = _checkpoint.build(config, weight.dtype, device="meta")
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | LoraLinear | PackedEmbedding) or (
            module._parameters and not any(module.children())
        ):
            renamed.set_submodule(name, module)
    return _checkpoint.finish(renamed, weight.device, model.generation_config)
