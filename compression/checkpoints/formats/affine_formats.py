"""The formats GPTQ and AWQ: one setting for all layers of a checkpoint, whole models written and opened."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from compression.architectures import decoder
from compression.architectures.table import architecture_of
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import reading, writing
from compression.checkpoints.formats.description import BITS, GROUP_SIZES, VERSIONS, Published
from compression.checkpoints.formats.recipes import recipe_of
from compression.checkpoints.formats.registry import Format, Written
from compression.checkpoints.formats.stores import affine_store
from compression.checkpoints.pieces import Unread
from compression.errors import LayerError
from compression.layers.linear import Linear
from compression.numeric.grids import AffineGrid
from compression.recipes.recipe import Recipe


def describe_shapes(model: nn.Module, quant_method: str) -> Published:
    """The one description that fits every layer; values are not looked at.

    Raises:
        LayerError: there is none.
    """
    row = architecture_of(model)
    writing.check_outside(quant_method, model)
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
        if reason := affine_store(published).unfit(layer.out_features, layer.in_features):
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
    if grid.float_zeros:
        return "its zero points are real numbers, and are whole ones there"
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
    """GPTQ or AWQ, which GPTQModel opens, and transformers with it."""

    engines = ("vllm", "gptqmodel")

    def __init__(self, name: str):
        self.name = name

    def accepts(self, layer: Any) -> str | None:
        return _obstacle(layer, self.name)

    def check_shapes(self, model: nn.Module) -> None:
        describe_shapes(model, self.name)

    def check(self, model: nn.Module) -> None:
        writer = self._writer(model, describe_shapes(model, self.name))
        writer.check(writer.layers)

    def write(self, model: nn.Module, recipe: Recipe) -> Written:
        """GPTQ is written as version "gptq" where all zero points are the middle, which every reader reads alike, and
        as "gptq_v2" where they are not."""
        published = describe_shapes(model, self.name)
        writer = self._writer(model, published)
        said = _config(published, recipe, architecture_of(model).head in writer.layers)
        described = {"config.json": {"quantization_config": said}, "quantize_config.json": said}
        return Written(writer.tensors, described)

    def _writer(self, model: nn.Module, published: Published) -> writing.Writer:
        stores = dict.fromkeys(decoder.stored_layers(model), affine_store(published))
        return writing.Writer(self.name, model, stores)

    def reads(self, folder: Path) -> bool:
        return reading.describes(folder, self.name)

    def read(self, source: BaseSource) -> tuple[Unread, Recipe]:
        assert source.published is not None
        return reading.open_model(source), recipe_of(source.published)

    def refusal(self, engine: str, layers: Iterable[Any]) -> str | None:
        """vLLM 0.32: symmetric GPTQ in order; on CPUs with 4 bits alone."""
        if engine != "vllm" or self.name != "gptq":
            return None
        parts, reasons = [layer.weight_part for layer in layers], []
        if not all(part.grid.symmetric for part in parts):
            reasons.append("vLLM opens GPTQ with symmetric=true alone")
        if any(part.permutation is not None for part in parts):
            reasons.append("vLLM refuses columns in activation order: leave static_groups=true")
        if odd := sorted({part.grid.bits for part in parts} - {4, 8}):
            reasons.append(f"vLLM opens GPTQ with 4 bits, and with 8 on GPUs, not with {_words(odd)}")
        return "; ".join(reasons) or None

    def needs_gpu(self, engine: str, layers: Iterable[Any]) -> bool:
        """vLLM opens 8 bits on GPUs alone."""
        return engine == "vllm" and any(layer.weight_part.grid.bits != 4 for layer in layers)


GPTQ, AWQ = PublishedFormat("gptq"), PublishedFormat("awq")
