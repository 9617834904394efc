"""The format compressed-tensors: whole models, written and opened. It holds settings of their own for each layer, and
layers that stay dense."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from compression.architectures import decoder
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats import grouped, reading, writing
from compression.checkpoints.formats.compressed_tensors import scheme_of, store_of
from compression.checkpoints.formats.compressed_tensors_config import ACTIVATIONS, CLASS, METHOD, MIXED, Scheme
from compression.checkpoints.formats.registry import Format, Written
from compression.checkpoints.pieces import Unread
from compression.errors import LayerError
from compression.layers.linear import Linear
from compression.recipes.recipe import Recipe


class CompressedTensorsFormat(Format):
    """See the module."""

    name = METHOD
    engines = ("vllm", "transformers")

    def accepts(self, layer: Any) -> str | None:
        if not isinstance(layer, Linear):
            return None
        scheme = scheme_of(layer)
        return scheme if isinstance(scheme, str) else None

    def check_shapes(self, model: nn.Module) -> None:
        writing.check_outside(self.name, model)
        layers = decoder.stored_layers(model)
        for name, layer in layers.items():
            if reason := self.accepts(layer):
                raise LayerError(f"format {self.name} cannot hold {name}: {reason}")
        if not layers:
            raise LayerError(f"format {self.name} describes quantized layers, and the model has none; save it as it is")
        for name, module in model.named_modules():
            if isinstance(module, Fused):
                parts = [layers.get(f"{name}.{each}") for each in module.names]
                schemes = {None if part is None else scheme_of(part) for part in parts}
                if len(schemes) > 1:
                    raise LayerError(f"format {self.name} cannot hold {name}: its parts have different settings, and "
                                     "are one layer there")  # fmt: skip

    def check(self, model: nn.Module) -> None:
        writer, _ = self._writer(model)
        writer.check(writer.layers)

    def write(self, model: nn.Module, recipe: Recipe) -> Written:
        writer, schemes = self._writer(model)
        return Written(writer.tensors, {"config.json": {"quantization_config": _config(model, schemes, recipe)}})

    def _writer(self, model: nn.Module) -> tuple[writing.Writer, dict[str, Scheme]]:
        """What writes a model that the format holds by its shapes, and the scheme of each layer."""
        self.check_shapes(model)
        schemes = {name: scheme_of(layer) for name, layer in decoder.stored_layers(model).items()}
        stores = {name: store_of(each) for name, each in schemes.items()}  # type: ignore[arg-type]
        return writing.Writer(self.name, model, stores), schemes  # type: ignore[return-value]

    def reads(self, folder: Path) -> bool:
        return reading.describes(folder, self.name)

    def read(self, source: BaseSource) -> tuple[Unread, Recipe]:
        return grouped.read(source)

    def refusal(self, engine: str, layers: Iterable[Any]) -> str | None:
        """vLLM 0.32, tried on a CPU, by its kernel tables on GPUs; transformers 5.23."""
        schemes = [scheme_of(layer) for layer in layers]
        whole = [each for each in schemes if isinstance(each, Scheme) and not each.float]
        if engine == "transformers":
            odd = any(not each.symmetric for each in whole)
            return "transformers 5.23 makes new zero points: take symmetric=true" if odd else None
        if odd := sorted({each.bits for each in whole} - {4, 8}):
            return f"vLLM opens 4 bits, and 8 on GPUs, not {', '.join(map(str, odd))}"
        return None

    def needs_gpu(self, engine: str, layers: Iterable[Any]) -> bool:
        """vLLM 0.32 has kernels on CPUs for whole numbers of 4 bits, and for int8 and FP8 activations."""
        schemes = [scheme for layer in layers if isinstance(scheme := scheme_of(layer), Scheme)]
        here = (each.activations in ("int8", "fp8") or (each.activations, each.float, each.bits) == (None, False, 4)
                for each in schemes)  # fmt: skip
        return engine == "vllm" and not all(here)


def _config(model: nn.Module, schemes: dict[str, Scheme], recipe: Recipe) -> dict[str, Any]:
    """`quantization_config`: one group of all linear layers, or one to each setting, which names its layers."""
    row = architecture_of(model)
    fused = {f"{name}.{each}": name for name, module in model.named_modules() if isinstance(module, Fused)
             for each in module.names}  # fmt: skip
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(layouts.their_name(fused.get(name, name), row))
    formats = {scheme.format for scheme in members}
    groups = {
        f"group_{i}": {
            "targets": [CLASS] if len(members) == 1 else list(dict.fromkeys(names)),
            "weights": _arguments(scheme), "input_activations": _activations(scheme), "output_activations": None,
            "format": scheme.format,
        }
        for i, (scheme, names) in enumerate(members.items())
    }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": MIXED if len(formats) > 1 else next(iter(formats)),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": writing.dense_layers(model),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "meta": {"quantizer": ["compression-bench"], "recipe": recipe.to_json()},
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """The library's `QuantizationArgs`."""
    return {
        "num_bits": scheme.bits, "type": "float" if scheme.float else "int", "symmetric": scheme.symmetric,
        "strategy": scheme.strategy, "group_size": scheme.group_size, "block_structure": None, "dynamic": False,
        "actorder": None,
    }  # fmt: skip


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    common: dict[str, Any] = {"symmetric": True, "block_structure": None, "actorder": None}
    if scheme.activations == "nvfp4":
        common["scale_dtype"] = "torch.float8_e4m3fn"  # without it the library leaves them unrounded
    return ACTIVATIONS[scheme.activations] | common


COMPRESSED_TENSORS = CompressedTensorsFormat()
