"""The format of bitsandbytes: whole models, written and opened. Layers that stay dense are named in config.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from compression.architectures import decoder
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import reading, writing
from compression.checkpoints.formats.bitsandbytes import Int8Store, NF4Store
from compression.checkpoints.formats.bitsandbytes_config import METHOD, BitsAndBytes
from compression.checkpoints.formats.layer import LayerStore
from compression.checkpoints.formats.recipes import recipe_of
from compression.checkpoints.formats.registry import Format, Written
from compression.checkpoints.pieces import Unread
from compression.errors import LayerError
from compression.layers.activations import OutlierColumns
from compression.layers.linear import Linear
from compression.numeric.grids import Int8RowGrid
from compression.numeric.normal_float import NF4Grid
from compression.recipes.recipe import Recipe


class BitsAndBytesFormat(Format):
    """See the module."""

    name = METHOD
    engines = ("transformers", "vllm")

    def accepts(self, layer: Any) -> str | None:
        if not isinstance(layer, Linear):
            return None
        first, *beside = layer.weight_part.summands
        if first.kind != "codes" or not isinstance(first.grid, NF4Grid | Int8RowGrid):
            return f"it holds NF4 and LLM.int8(), not {first.words}"
        if beside:
            return "it has an adapter beside its codes; recover with merge=all"
        outliers = isinstance(first.grid, Int8RowGrid)
        if layer.output_part is not None or isinstance(layer.input_part, OutlierColumns) != outliers:
            return "its inputs and outputs are not those of bitsandbytes"
        return None

    def check_shapes(self, model: nn.Module) -> None:
        layers = decoder.stored_layers(model)
        writing.check_outside(self.name, model)
        if any(isinstance(module, Fused) for module in model.modules()):
            raise LayerError(f"format {self.name} cannot hold the fused layers of {architecture_of(model).name}, whose "
                             "parts are quantized one by one")  # fmt: skip
        for name, layer in layers.items():
            if reason := self.accepts(layer):
                raise LayerError(f"format {self.name} cannot hold {name}: {reason}")
        if len(found := {_kind(layer) for layer in layers.values()}) != 1:
            said = " and ".join(sorted(map(str, found))) or "no quantized layer"
            raise LayerError(f"format {self.name} holds layers of one kind, not {said}")

    def write(self, model: nn.Module, recipe: Recipe) -> Written:
        self.check_shapes(model)
        layers = decoder.stored_layers(model)
        store = _store(next(iter(layers.values())))
        writer = writing.Writer(self.name, model, dict.fromkeys(layers, store))
        return Written(writer.tensors, {"config.json": {"quantization_config": _config(model, recipe)}})

    def reads(self, folder: Path) -> bool:
        return reading.describes(folder, self.name)

    def read(self, source: BaseSource) -> tuple[Unread, Recipe]:
        published = source.published
        assert isinstance(published, BitsAndBytes)
        unread = reading.open_model(source)
        if published.bits == 8:
            for layer in decoder.stored_layers(unread.model).values():
                layer.input_part = OutlierColumns(published.threshold)
                layer.backend = "bitsandbytes"
        return unread, recipe_of(published)

    def needs_gpu(self, engine: str, layers: Iterable[Any]) -> bool:
        """vLLM has bitsandbytes on GPUs alone."""
        return engine == "vllm"


def _kind(layer: Linear) -> tuple[str, Any]:
    grid = layer.weight_part.grid
    detail = grid.double_quant if isinstance(grid, NF4Grid) else layer.input_part.threshold  # type: ignore[union-attr]
    return grid.kind, detail


def _store(layer: Linear) -> LayerStore:
    grid = layer.weight_part.grid
    return NF4Store(grid.double_quant) if isinstance(grid, NF4Grid) else Int8Store()


def _config(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """transformers' `BitsAndBytesConfig`."""
    layers = decoder.stored_layers(model)
    kind, detail = _kind(next(iter(layers.values())))
    four = kind == NF4Grid.kind
    config: dict[str, Any] = {
        "quant_method": METHOD, "load_in_4bit": four, "load_in_8bit": not four,
        "llm_int8_skip_modules": writing.dense_layers(model),
    }  # fmt: skip
    if four:
        dtype = str(next(iter(layers.values())).dtype).removeprefix("torch.")
        config |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": detail, "bnb_4bit_compute_dtype": dtype,
                   "bnb_4bit_quant_storage": "uint8"}  # fmt: skip
    else:
        config |= {"llm_int8_threshold": detail, "llm_int8_has_fp16_weight": False}
    return config | {"meta": {"quantizer": ["compression-bench"], "recipe": recipe.to_json()}}


BITSANDBYTES = BitsAndBytesFormat()
