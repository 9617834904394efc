"""Cutting a decoder smaller: whole layers, heads of keys and values with their query heads, neurons of the MLP.

What is kept keeps its values: rows and columns are taken out of dense weights, codes and scales, never computed anew
(but for columns of codes that do not fall into groups, see `layers.codes.Codes.columns`). The shape of every
block stays that of all the others, as the configuration of transformers wants it: `conform` writes it there.
Shapes: q_proj (query heads x head size, hidden), k_proj and v_proj (KV heads x head size, hidden), o_proj (hidden,
query heads x head size); query head h attends to KV head h // group, group = query heads / KV heads. gate_proj and
up_proj (neurons, hidden), down_proj (hidden, neurons). Indices that are kept are ascending.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import decoder as _blocks
from compression.architectures import skeleton
from compression.architectures.anatomy import Half
from compression.architectures.decoder import Block, Decoder
from compression.architectures.turned import TurnedBlock
from compression.errors import LayerError
from compression.layers.dense import dense_linear
from compression.layers.linear import Linear


def share_of(share: float, count: int) -> int:
    """So many of `count`, rounded down as the papers' code does; a product that is whole but for its last bit is whole.

    >>> share_of(0.625, 32), share_of(0.75, 2), share_of(0.29, 100)
    (20, 1, 29)
    """
    return int(share * count + 1e-9)


def check_weights(model: nn.Module) -> None:
    """Raise LayerError, naming the layer, if a dense weight of a block is not finite."""
    for block in _blocks.decoder_blocks(model):
        for name, linear in block.linears():
            if isinstance(linear, nn.Linear) and not torch.isfinite(linear.weight).all():
                raise LayerError(
                    f"{name}: the weight has NaN or infinite values: the checkpoint is damaged, or was saved in too "
                    "narrow a dtype"
                )


def weight_of(linear: nn.Linear | Linear) -> Tensor:
    """fp32 (rows, cols), dequantized where it is packed, with its adapter where it has one."""
    weight = linear.dequantize(torch.float32) if isinstance(linear, Linear) else linear.weight
    return weight.detach().float()


def keep_layers(model: nn.Module, kept: Sequence[int]) -> None:
    """Leave the blocks of these numbers; they are numbered anew, as the cache counts them.

    Raises:
        LayerError: the residual stream is turned: a block reads another basis than the one before it.
    """
    decoder, config = Decoder(model), model.config
    blocks = decoder.blocks
    if len(kept) < len(blocks) and any(isinstance(block.module, TurnedBlock) for block in blocks):
        raise LayerError(f"{blocks[0].name}: the residual stream is turned from block to block, so that none of them "
                         "can go; remove layers before the step that turns it")  # fmt: skip
    model.set_submodule(decoder.row.blocks, nn.ModuleList([blocks[i].module for i in kept]))
    for number, block in enumerate(decoder.blocks):
        block.layer(block.attention.module).layer_idx = number
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    dense = [number for number, block in enumerate(decoder.blocks) if block.mlp.experts is None]
    if hasattr(config, "mlp_only_layers"):  # Qwen's mixtures, of which every `decoder_sparse_step`th layer is one
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = len(dense)


def keep_heads(block: Block, kept: Tensor) -> dict[str, str]:
    """Leave these KV heads, int64 (kept,), and the query heads of their groups; returns and raises as `_cut`."""
    check_heads(block)
    (query_heads, kv_heads), size, half = block.heads, block.head_size, block.attention
    query, own = _spread(_spread(kept, query_heads // kv_heads), size), _spread(kept, size)
    rows = {path: query if path == half.queries else own for path in half.readers}
    module = block.layer(half.module)
    if hasattr(module, "num_key_value_heads"):
        module.num_key_value_heads = len(kept)
    if block.row.fused:  # whose outputs transformers takes apart by the configuration; `conform` gives it all blocks
        module.config = copy.copy(module.config)
        module.config.num_attention_heads = len(kept) * (query_heads // kv_heads)
        module.config.num_key_value_heads = len(kept)
    return _cut(block, half, rows, query)


def check_heads(block: Block) -> None:
    """Raise LayerError, naming the reason, if heads of a block cannot be taken out."""
    _check(block, block.attention, "heads")


def check_neurons(block: Block) -> None:
    """Raise LayerError, naming the reason, if neurons of a block cannot be taken out."""
    _check(block, block.mlp, "neurons")


def _check(block: Block, half: Half, what: str) -> None:
    if half.uncut is not None:
        raise LayerError(f"{block.full(half.module)}: {what} of {block.row.name} cannot be taken out, because "
                         f"{half.uncut}")  # fmt: skip


def keep_neurons(block: Block, kept: Tensor) -> dict[str, str]:
    """Leave these neurons of the MLP, int64 (kept,); returns and raises as `_cut`."""
    check_neurons(block)
    return _cut(block, block.mlp, dict.fromkeys(block.mlp.readers, kept), kept)


def _spread(indices: Tensor, size: int) -> Tensor:
    """The members of blocks of `size`: 2 and 0 of size 3 are 6, 7, 8, 0, 1, 2."""
    return (indices[:, None] * size + torch.arange(size)).flatten()


def _cut(block: Block, half: Half, rows: dict[str, Tensor], columns: Tensor) -> dict[str, str]:
    """Takes rows out of the readers of a half and columns out of its writer, which reads what they make.

    Returns:
        The full name of each of these layers, with words on how a packed one is stored now, for reports.

    Raises:
        LayerError: the groups of a packed layer cannot be cut so; the message names it.
    """
    told = {}
    for path, kept in (*rows.items(), (half.writer, columns)):
        name, before = block.full(path), block.layer(path)
        try:
            after = _cut_layer(before, kept, "columns" if path == half.writer else "rows")
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from error
        block.replace(name, after)
        told[name] = _tell(before, after, kept if path == half.writer else None)
    return told


def _cut_layer(layer: nn.Linear | Linear, kept: Tensor, way: str) -> nn.Linear | Linear:
    """The layer with these outputs alone (`way` "rows"), or these inputs ("columns")."""
    if isinstance(layer, Linear):
        return layer.rows(kept) if way == "rows" else layer.columns(kept)
    bias = None if layer.bias is None else layer.bias.detach()
    if way == "rows":
        return dense_linear(layer.weight.detach()[kept], None if bias is None else bias[kept])
    return dense_linear(layer.weight.detach()[:, kept], bias)


def _tell(before: nn.Linear | Linear, after: nn.Linear | Linear, columns: Tensor | None) -> str:
    """How a stored layer is stored now, and how far what is left of its weight moved where it was rounded again."""
    if not isinstance(before, Linear) or not isinstance(after, Linear) or after.is_meta:
        return ""
    pairs = list(zip(before.weight_part.summands, after.weight_part.summands, strict=True))
    words = f", kernel {after.kernel_name()}" + "".join(now.changed(was) for was, now in pairs)
    if columns is None or after.input_part is not None:
        return words
    was = before.dequantize()[:, columns]
    if torch.equal(was, after.dequantize()):
        return words
    change = float(((after.dequantize(torch.float32) - was.float()).norm() / was.float().norm()).nan_to_num())
    return words + (f", rounded again, which moved its weights by {change:.3g} of their norm" if change else "")


def conform(model: nn.Module) -> nn.Module:
    """The model with the shapes of its blocks in its configuration; of another class where its own refuses them.

    transformers' Llama wants a hidden size that is a multiple of the number of heads, though nothing it computes needs
    that. Mistral without a sliding window is the same function and does not, so such a Llama becomes a Mistral.

    Raises:
        LayerError: there is no such class, because the Llama has biases.
    """
    config, blocks = model.config, _blocks.decoder_blocks(model)
    block = blocks[0]
    for each in blocks if block.row.fused else ():
        each.layer(each.attention.module).config = config
    if block.attention.uncut is None:
        config.head_dim = block.head_size
        config.num_attention_heads, config.num_key_value_heads = block.heads
    if block.mlp.uncut is None:
        setattr(config, block.row.neurons, block.neurons)
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
    weight = Decoder(model).embeddings.weight
    renamed = skeleton.build(config, weight.dtype, device="meta")
    stored = _blocks.stored_layers(model)
    inside = tuple(f"{name}." for name in stored)
    for name, module in model.named_modules():
        whole = name in stored or (module._parameters and not any(module.children()))
        if whole and not name.startswith(inside):
            renamed.set_submodule(name, module)
    return skeleton.finish(renamed, weight.device, model.generation_config)
