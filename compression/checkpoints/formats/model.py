"""Whole checkpoints of the published formats, written from a model with packed layers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints import base
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import reading
from compression.checkpoints.formats.description import BITS, GROUP_SIZES, VERSIONS, Published, read_config
from compression.checkpoints.formats.layer import StoredLayer, check_order, module_of
from compression.checkpoints.formats.recipes import recipe_of
from compression.checkpoints.formats.registry import Format, Written
from compression.errors import LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.numeric.grids import AffineGrid
from compression.recipes.recipe import Recipe


def convert(model: nn.Module, quant_method: str, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model in a published format: its tensors, and what stands as `quantization_config` in config.json.

    GPTQ is written as version "gptq" where all zero points are the middle, which every reader reads alike, and as
    "gptq_v2" where they are not.

    Raises:
        LayerError: the format cannot hold a layer exactly; the message names it, and why.
    """
    published = describe_shapes(model, quant_method)
    format, layers = module_of(published), decoder.stored_layers(model)
    inside = tuple(f"{name}.weight_part." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    row = architecture_of(model)
    state = layouts.together(state, row, model.config)
    stored = {name: _to_stored(layer.weight_part, name) for name, layer in layers.items()}
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            parts = [stored.pop(f"{name}.{each}") for each in module.names]
            check_order(name, [part.permutation for part in parts])
            stored[name] = StoredLayer.joined(parts, module.sizes, by_head=module.by_head)
    for name, each in stored.items():
        theirs = layouts.their_name(name, row)
        state |= {f"{theirs}.{key}": tensor for key, tensor in format.write(each, published).items()}
    return state, _config(published, recipe, row.head in layers)


def check(model: nn.Module, quant_method: str) -> None:
    """Raise LayerError if the format cannot hold the model exactly; nothing is converted."""
    describe_shapes(model, quant_method)
    layers = decoder.stored_layers(model)
    for name, layer in layers.items():
        _half_scales(layer.weight_part, name)
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            check_order(name, [layers[f"{name}.{each}"].weight_part.permutation for each in module.names])


def vllm_refusal(model: nn.Module) -> str | None:
    """Why vLLM does not open the model in the format "gptq", which GPTQModel and transformers do, or None."""
    published = describe_shapes(model, "gptq")
    reasons = []
    if not published.symmetric:
        reasons.append("vLLM opens GPTQ with symmetric=true alone")
    if published.desc_act:
        reasons.append("vLLM refuses columns in activation order: leave static_groups=true")
    return "; ".join(reasons) or None


def describe_shapes(model: nn.Module, quant_method: str) -> Published:
    """The one description that fits every layer; values are not looked at.

    Raises:
        LayerError: there is none.
    """
    row = architecture_of(model)
    if embeddings.is_packed(model):
        raise LayerError(f"format {quant_method} cannot hold {row.embeddings}: its readers take embeddings "
                         "in 16 bits; leave embeddings=8 out")  # fmt: skip
    if row.stacked_experts:
        raise LayerError(f"format {quant_method} cannot hold the experts of {row.name}, which its readers know as one "
                         "tensor of all of them")  # fmt: skip
    layers = [pair for block in decoder.decoder_blocks(model) for pair in block.linears()]
    layers += [(row.head, head)] if isinstance(head := model.get_submodule(row.head), Linear) else []
    first, grid = layers[0][0], None
    for name, layer in layers:
        if reason := _obstacle(layer, quant_method):
            raise LayerError(f"format {quant_method} cannot hold {name}: {reason}")
        own = layer.weight_part.grid
        grid = grid or own
        if own != grid:
            raise LayerError(f"format {quant_method} has one setting for all layers, but {name} has {own} and "
                             f"{first} {grid}")  # fmt: skip
    version = "gptq_v2" if quant_method == "gptq" and not grid.symmetric else VERSIONS[quant_method][0]
    published = Published(
        quant_method=quant_method, bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric,
        version=version, desc_act=any(layer.weight_part.permutation is not None for _, layer in layers),
    )  # fmt: skip
    for name, layer in layers:
        if reason := module_of(published).check_shape(published, layer.out_features, layer.in_features):
            raise LayerError(f"format {quant_method} cannot hold {name}: {reason}")
    return published


def _obstacle(layer: nn.Linear | Linear, quant_method: str) -> str | None:
    """Why the format has no place for such a layer, or None."""
    if not isinstance(layer, Linear):
        return "it is not quantized, and readers take every linear layer of the blocks for quantized"
    first, *beside = layer.weight_part.summands
    if first.kind != "codes":
        return f"its weight is of kind {first.kind}, and readers take every linear layer of the blocks for quantized"
    if beside:
        return "it has an adapter beside its codes; recover with merge=all"
    grid = first.grid
    if not isinstance(grid, AffineGrid):
        return f"it holds evenly spaced levels, not {grid}"
    if layer.input_part is not None or layer.output_part is not None:
        parts = ", ".join(each.kind for each in (layer.input_part, layer.output_part) if each is not None)
        return f"it has no place for {parts}"
    if grid.bits not in BITS[quant_method]:
        return f"it has {grid.bits} bits; allowed are {_words(BITS[quant_method])}"
    if grid.group_size not in GROUP_SIZES[quant_method]:
        return f"its groups are of {grid.group_size}; readers take {_words(GROUP_SIZES[quant_method])}"
    if quant_method == "awq" and first.permutation is not None:
        return "its columns are in activation order, for which there is no g_idx"
    return None


def _to_stored(part: Codes, name: str) -> StoredLayer:
    _, zeros = part.grid.expand(part.parameters_of_grid(), *part.shape)
    permutation = None if part.permutation is None else part.permutation.long()
    return StoredLayer(part.canonical(), _half_scales(part, name), zeros.to(torch.uint8), permutation)


def _half_scales(part: Codes, name: str) -> Tensor:
    """The scales in fp16, (rows, groups).

    Raises:
        LayerError: fp16 would round one.
    """
    half = part.scales.half()
    if not torch.equal(half.float(), part.scales.float()):
        raise LayerError(f"the published formats store scales in fp16, which would round those of {name} "
                         f"({part.scales.dtype}); compress a checkpoint of fp16 or bf16")  # fmt: skip
    return half


def _config(published: Published, recipe: Recipe, lm_head: bool) -> dict[str, Any]:
    config = {
        "quant_method": published.quant_method,
        "bits": published.bits,
        "group_size": published.group_size,
        "lm_head": lm_head,
        "meta": {"quantizer": ["compression-bench"], "recipe": recipe.to_json()},
    }
    if published.quant_method == "awq":
        return config | {"zero_point": True, "version": published.version}
    return config | {
        "sym": published.symmetric,
        "desc_act": published.desc_act,
        "checkpoint_format": published.version,
        "pack_dtype": "int32",
    }


def _words(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


class PublishedFormat(Format):
    """The formats that GPTQModel opens; the file of one layer is in the module of its name."""

    runtimes = ("gptqmodel",)

    def __init__(self, name: str):
        self.name = name

    def accepts(self, layer: Any) -> str | None:
        return _obstacle(layer, self.name)

    def check_shapes(self, model: nn.Module) -> None:
        describe_shapes(model, self.name)

    def check(self, model: nn.Module) -> None:
        check(model, self.name)

    def write(self, model: nn.Module, recipe: Recipe) -> Written:
        tensors, said = convert(model, self.name, recipe)
        return Written(tensors, {"config.json": {"quantization_config": said}, "quantize_config.json": said})

    def reads(self, folder: Path) -> bool:
        path = folder / "config.json"
        published = read_config(folder, base._read_json(path)) if path.exists() else None
        return published is not None and published.quant_method == self.name

    def read(self, source: BaseSource) -> tuple[nn.Module, Recipe]:
        assert source.published is not None
        return reading.open_model(source), recipe_of(source.published)

    def limits(self, model: nn.Module) -> list[str]:
        refusal = vllm_refusal(model) if self.name == "gptq" else None
        return [f"written for transformers with gptqmodel: {refusal}"] if refusal else []


GPTQ, AWQ = PublishedFormat("gptq"), PublishedFormat("awq")
