"""Names and layouts of published checkpoints, and those of the model: fused layers and experts opened apart.

One tensor of a checkpoint is one or several of the model; `apart` and `together` are inverse to each other.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import fused
from compression.architectures.anatomy import Architecture
from compression.architectures.experts import Experts
from compression.errors import CheckpointError

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|)")
_OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def open_apart(model: Any, row: Architecture) -> None:
    """Give a model of transformers without weights the layers that its row names: parts and experts by themselves.

    Raises:
        CheckpointError: a fused layer has other outputs than its parts.
    """
    for number, block in enumerate(model.get_submodule(row.blocks)):
        try:
            for each in row.fused:
                fused.open_apart(block, each, model.config)
        except ValueError as error:
            raise CheckpointError(f"{row.block(number)}.{each.path}: {error}") from None
        for half in row.mlps:
            if half.experts is not None and _has(block, half.experts.path):
                block.set_submodule(half.experts.path, Experts(block.get_submodule(half.experts.path)))


def apart(name: str, tensor: Tensor, row: Architecture, config: Any) -> dict[str, Tensor]:
    """The tensors of the model that one of a published checkpoint holds, by name.

    Args:
        name, tensor: of the checkpoint; on the meta device for shapes alone.
        config: of transformers.

    Raises:
        CheckpointError: its shape is not that of what it holds.
    """
    name = our_name(name, row)
    further = getattr(config, "num_nextn_predict_layers", None) or 0  # of DeepSeek, which transformers does not run
    blocks = range(config.num_hidden_layers, config.num_hidden_layers + further)
    if any(name.startswith(f"{row.block(number)}.") for number in blocks):
        return {}
    try:
        if row.stacked_experts and (found := _STACKED.fullmatch(name)):
            return _of_experts(found[1], found[2], found[3], tensor)
        for each in row.fused:
            path, _, what = name.rpartition(".")
            if path.endswith(f".{each.path}") and what in ("weight", "bias"):
                parts = fused.split(tensor, each.sizes(config), by_head=each.by_head)
                return {f"{path}.{part}.{what}": value for part, value in zip(each.names, parts, strict=True)}
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}: {error}") from None
    return {name: tensor}


def together(tensors: Mapping[str, Tensor], row: Architecture, config: Any) -> dict[str, Tensor]:
    """The dense tensors of a model under the names, and in the layout, of its published checkpoints."""
    found = dict(tensors)
    for each in row.fused:
        inside = re.compile(rf"(.*\.{re.escape(each.path)})\.{each.names[0]}\.(weight|bias)")
        for match in list(filter(None, map(inside.fullmatch, found))):
            names = [f"{match[1]}.{name}.{match[2]}" for name in each.names]
            if all(name in found for name in names):
                parts = [found.pop(name) for name in names]
                found[f"{match[1]}.{match[2]}"] = fused.join(parts, each.sizes(config), by_head=each.by_head)
    if row.stacked_experts:
        found = _stacked(found)
    return {their_name(name, row): tensor for name, tensor in found.items()}


def our_name(name: str, row: Architecture) -> str:
    """What the model calls a tensor, or a layer, of a published checkpoint; fused layers as they are."""
    name = f"{name}."
    for theirs, ours in row.renamed:
        name = name.replace(theirs, ours)
    body = f"{row.embeddings.partition('.')[0]}."
    if not name.startswith((body, f"{row.head}.")):  # exports of the model without its head
        name = body + name
    return name[:-1]


def their_name(name: str, row: Architecture) -> str:
    """The inverse of `our_name`."""
    name = f"{name}."
    for theirs, ours in row.renamed:
        name = name.replace(ours, theirs)
    return name[:-1]


def _of_experts(path: str, what: str, bias: str, tensor: Tensor) -> dict[str, Tensor]:
    """gpt-oss: (experts, inputs, outputs), the outputs of gate and up in turn; biases (experts, outputs)."""
    names = ("gate_proj", "up_proj") if what == "gate_up_proj" else ("down_proj",)
    kind = "bias" if bias else "weight"
    if tensor.ndim != 3 - bool(bias):
        raise ValueError("all experts together have one dimension more")
    found = {}
    for number in range(len(tensor)):
        own = tensor[number] if bias else tensor[number].t()
        for part, name in enumerate(names):
            found[f"{path}.{number}.{name}.{kind}"] = own[part :: len(names)].contiguous()
    return found


def _stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_of_experts` for all of a model."""
    rest: dict[str, Tensor] = {}
    groups: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _OF_EXPERT.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            groups.setdefault((match[1], match[4]), {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for (path, kind), experts in groups.items():
        own = [experts[number] for number in range(len(experts))]
        both = [torch.stack([each["gate_proj"], each["up_proj"]], 1).flatten(0, 1) for each in own]
        down, suffix = [each["down_proj"] for each in own], "_bias" if kind == "bias" else ""
        for name, values in (("gate_up_proj", both), ("down_proj", down)):
            rest[f"{path}.{name}{suffix}"] = torch.stack([v if suffix else v.t() for v in values])
    return rest


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
