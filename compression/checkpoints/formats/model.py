"""Whole checkpoints of the published formats: to a model with packed layers, and from one."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.architectures import decoder, embeddings
from compression.architectures.table import architecture_of, named
from compression.checkpoints import base, weights
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats.description import BITS, GROUP_SIZES, VERSIONS, Published, read_config
from compression.checkpoints.formats.layer import StoredLayer
from compression.checkpoints.formats.recipes import recipe_of
from compression.checkpoints.formats.registry import Format, Written
from compression.errors import CheckpointError, LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.numeric import grouping, packing
from compression.numeric.grids import AffineGrid
from compression.recipes.recipe import Recipe

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def open_model(source: BaseSource) -> nn.Module:
    """The model of a published checkpoint on the CPU, its quantized layers packed; scales keep their dtype.

    Layers that are stored uncompressed stay dense, and all dense tensors take the dtype of the embeddings.

    Raises:
        CheckpointError: see `_checkpoint.open_base`; and a layer whose tensors are incomplete or contradict the shapes,
            the group size or the symmetry that the configuration names.
    """
    published, where = source.published, str(source.folder)
    assert published is not None
    _check_headers(source, weights.index(source.files)[1], where)
    tensors = weights.read_tensors(source.files)
    embedding = tensors.get(named(source.config["architectures"][0], where).embeddings_weight)
    dtype = torch.float32 if embedding is None else embedding.dtype  # without it, `fill` refuses
    model = base.build(source.config, dtype, device="meta")
    packed: dict[str, Tensor] = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            stored = _take(tensors, name, linear, published, where)
            if stored:
                layer, buffers = _to_packed(stored, linear, published, dtype, f"{where}: {name}")
                model.set_submodule(name, layer)
                packed |= {f"{name}.{key}": value for key, value in buffers.items()}
    if not packed:
        raise CheckpointError(f"{where}: {published.quant_method} is what the configuration names, but no layer of the "
                              "model has a qweight")  # fmt: skip
    head = architecture_of(model).head
    if isinstance(model.get_submodule(head), Linear) and embeddings.tied(model):
        raise CheckpointError(f"{where}: {head} is quantized, and config.json ties it to the embeddings")
    dense = {name: t.to(dtype) if t.dtype in _FLOATS else t for name, t in tensors.items()}
    weights.fill(model, dense | packed, where=where)
    return model


def _check_headers(source: BaseSource, headers: dict[str, Tensor], where: str) -> None:
    """Refuse tensors of other names, shapes or types than the model's, before one of them is read."""
    assert source.published is not None
    model, rest = base.build(source.config, torch.float32, device="meta"), weights.not_stale(headers)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and _take(rest, name, linear, source.published, where):
            if linear.bias is not None:
                rest[f"{name}.weight"] = linear.weight  # the bias is one of the dense tensors
            else:
                model.set_submodule(name, nn.Identity())
    weights.fit(model, rest, where=where)


def _take(
    tensors: dict[str, Tensor], name: str, linear: nn.Linear, published: Published, where: str
) -> dict[str, Tensor]:
    """Removes the tensors of a quantized layer from `tensors` and returns them, checked; empty for a dense layer."""
    format = _format(published)
    groups = grouping.groups_of(linear.in_features, published.group_size)
    shapes = format.shapes(published, linear.out_features, linear.in_features, groups)
    stored = {key: tensors.pop(f"{name}.{key}") for key in shapes if f"{name}.{key}" in tensors}
    if not stored:
        return {}
    if f"{name}.weight" in tensors:
        raise CheckpointError(f"{where}: {name} is stored twice: as weight and as {', '.join(stored)}")
    optional = () if published.desc_act else format.OPTIONAL
    if missing := [f"{name}.{key}" for key in shapes if key not in stored and key not in optional]:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}; the layer cannot be read without it; "
                              "download the checkpoint again")  # fmt: skip
    try:
        grouping.check_group(linear.in_features, published.group_size, name)
    except LayerError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if reason := format.check_shape(published, linear.out_features, linear.in_features):
        raise CheckpointError(f"{where}: {name} does not fit the {published.quant_method} format: {reason}")
    for key, tensor in stored.items():
        if tuple(tensor.shape) != shapes[key]:
            raise CheckpointError(
                f"{where}: {name}.{key} has shape {tuple(tensor.shape)}; {published.bits} bits in groups of "
                f"{published.group_size} make it {shapes[key]}"
            )
        allowed = _FLOATS if key == "scales" else (torch.int32,)
        if tensor.dtype not in allowed:
            raise CheckpointError(f"{where}: {name}.{key} is stored as {tensor.dtype}, expected "
                                  f"{' or '.join(map(str, allowed))}")  # fmt: skip
    bias = f"{name}.bias"
    given = tensors.get(bias)  # AutoGPTQ wrote one of zeros everywhere
    if linear.bias is None and given is not None and (given.is_meta or not given.any()):
        del tensors[bias]
    return stored


def _to_packed(
    stored: dict[str, Tensor], linear: nn.Linear, published: Published, dtype: torch.dtype, where: str
) -> tuple[Linear, dict[str, Tensor]]:
    """The layer without its tensors, and those by the name of their buffer, but for the bias."""
    try:
        layer = _format(published).read(stored, published)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if not torch.isfinite(layer.scales).all():
        raise CheckpointError(f"{where}.scales holds NaN or infinite values")
    middle = 2 ** (published.bits - 1)
    if published.symmetric and not (layer.zeros == middle).all():
        raise CheckpointError(f"{where}: sym is true, but there are zero points other than {middle}: programs that "
                              "trust sym read other weights than those that read qzeros")  # fmt: skip
    grid = AffineGrid(bits=published.bits, group_size=published.group_size, symmetric=published.symmetric)
    permuted = layer.permutation is not None
    part = Codes(grid, linear.out_features, linear.in_features, dtype=dtype, permuted=permuted)
    bias = None if linear.bias is None else torch.empty(linear.out_features, dtype=dtype, device="meta")
    buffers = {"codes": layer.codes, "scales": layer.scales}
    if not published.symmetric:
        buffers["zero_points"] = packing.pack(layer.zeros, published.bits)
    if layer.permutation is not None:
        buffers["permutation"] = layer.permutation.int()
    return Linear(part, bias), {f"weight_part.{name}": tensor for name, tensor in buffers.items()}


def convert(model: nn.Module, quant_method: str, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model in a published format: its tensors, and what stands as `quantization_config` in config.json.

    GPTQ is written as version "gptq" where all zero points are the middle, which every reader reads alike, and as
    "gptq_v2" where they are not.

    Raises:
        LayerError: the format cannot hold a layer exactly; the message names it, and why.
    """
    published = describe_shapes(model, quant_method)
    format, layers = _format(published), decoder.stored_layers(model)
    inside = tuple(f"{name}.weight_part." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        stored = _to_stored(layer.weight_part, name)
        state |= {f"{name}.{key}": tensor for key, tensor in format.write(stored, published).items()}
    return state, _config(published, recipe, architecture_of(model).head in layers)


def check(model: nn.Module, quant_method: str) -> None:
    """Raise LayerError if the format cannot hold the model exactly; nothing is converted."""
    describe_shapes(model, quant_method)
    for name, layer in decoder.stored_layers(model).items():
        _half_scales(layer.weight_part, name)


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
        if reason := _format(published).check_shape(published, layer.out_features, layer.in_features):
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
        return open_model(source), recipe_of(source.published)

    def limits(self, model: nn.Module) -> list[str]:
        refusal = vllm_refusal(model) if self.name == "gptq" else None
        return [f"written for transformers with gptqmodel: {refusal}"] if refusal else []


GPTQ, AWQ = PublishedFormat("gptq"), PublishedFormat("awq")


def _format(published: Published) -> Any:
    """The module that translates the tensors of a layer."""
    return importlib.import_module(f"compression.checkpoints.formats.{published.quant_method}")
