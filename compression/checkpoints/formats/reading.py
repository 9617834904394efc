"""Whole checkpoints of the published formats, read into a model with packed layers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compression.architectures import embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of, named
from compression.checkpoints import base, weights
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats.description import Published
from compression.checkpoints.formats.layer import StoredLayer, module_of
from compression.errors import CheckpointError, LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear
from compression.numeric import grouping, packing
from compression.numeric.grids import AffineGrid

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
    tensors = _renamed(weights.read_tensors(source.files), source)
    embedding = tensors.get(named(source.config["architectures"][0], where).embeddings_weight)
    dtype = torch.float32 if embedding is None else embedding.dtype  # without it, `fill` refuses
    model = base.build(source.config, dtype, device="meta")
    packed: dict[str, Tensor] = {}
    for each in _linears(model):
        if not (stored := _take(tensors, each.name, each.whole, published, where)):
            continue
        for (name, linear), own in zip(each.parts, _read(stored, each, published, where), strict=True):
            layer, buffers = _to_packed(own, linear, published, dtype)
            model.set_submodule(name, layer)
            packed |= {f"{name}.{key}": value for key, value in buffers.items()}
    if not packed:
        raise CheckpointError(f"{where}: {published.quant_method} is what the configuration names, but no layer of the "
                              "model has a qweight")  # fmt: skip
    row = architecture_of(model)
    head = row.head
    if isinstance(model.get_submodule(head), Linear) and embeddings.tied(model):
        raise CheckpointError(f"{where}: {head} is quantized, and config.json ties it to the embeddings")
    dense = {
        name: t.to(dtype) if t.dtype in _FLOATS and not row.kept_in_float32(name) else t
        for name, t in _apart(tensors, model).items()
    }
    weights.fill(model, dense | packed, where=where)
    return model


def _check_headers(source: BaseSource, headers: dict[str, Tensor], where: str) -> None:
    """Refuse tensors of other names, shapes or types than the model's, before one of them is read."""
    assert source.published is not None
    model = base.build(source.config, torch.float32, device="meta")
    rest, there = _renamed(weights.not_stale(headers), source), {}
    for each in _linears(model):
        if _take(rest, each.name, each.whole, source.published, where):
            for name, linear in each.parts:
                if linear.bias is not None:
                    there[f"{name}.weight"] = linear.weight  # the bias is one of the dense tensors
                else:
                    model.set_submodule(name, nn.Identity())
    weights.fit(model, _apart(rest, model) | there, where=where)


@dataclass(frozen=True)
class _Stored:
    """A layer as the formats know it: a linear layer, or the fused one of several, `parts` by name."""

    name: str
    whole: nn.Linear
    parts: tuple[tuple[str, nn.Linear], ...]
    sizes: tuple[int, ...] = ()
    by_head: bool = False


def _linears(model: nn.Module) -> list[_Stored]:
    """All that a model has, those that are opened apart together."""
    found, inside = [], set()
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            parts = tuple((f"{name}.{each}", module.get_submodule(each)) for each in module.names)
            inside |= {each for each, _ in parts}
            first, outputs = parts[0][1], sum(part.out_features for _, part in parts)  # type: ignore[misc]
            whole = nn.Linear(first.in_features, outputs, bias=first.bias is not None, device="meta")  # type: ignore[arg-type]
            found.append(_Stored(name, whole, parts, module.sizes, module.by_head))  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear) and name not in inside:
            found.append(_Stored(name, module, ((name, module),)))
    return found


def _renamed(tensors: dict[str, Tensor], source: BaseSource) -> dict[str, Tensor]:
    """Tensors under the names that the model has them by, fused layers as they are."""
    row = named(source.config["architectures"][0], str(source.folder))
    return {layouts.our_name(name, row): tensor for name, tensor in tensors.items()}


def _apart(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Dense tensors of fused layers as those of their parts."""
    row, found = architecture_of(model), {}
    for name, tensor in tensors.items():
        found |= layouts.apart(name, tensor, row, model.config)
    return found


def _read(tensors: dict[str, Tensor], each: _Stored, published: Published, where: str) -> list[StoredLayer]:
    """Of each part what the formats store.

    Raises:
        CheckpointError: groups are not of one size, scales not finite, or zero points not what `sym` says.
    """
    try:
        layer = module_of(published).read(tensors, published)
    except ValueError as error:
        raise CheckpointError(f"{where}: {each.name}: {error}") from error
    if not torch.isfinite(layer.scales).all():
        raise CheckpointError(f"{where}: {each.name}.scales holds NaN or infinite values")
    middle = 2 ** (published.bits - 1)
    if published.symmetric and not (layer.zeros == middle).all():
        raise CheckpointError(f"{where}: {each.name}: sym is true, but there are zero points other than {middle}: "
                              "programs that trust sym read other weights than those that read qzeros")  # fmt: skip
    return layer.parts(each.sizes, by_head=each.by_head) if each.sizes else [layer]


def _take(
    tensors: dict[str, Tensor], name: str, linear: nn.Linear, published: Published, where: str
) -> dict[str, Tensor]:
    """Removes the tensors of a quantized layer from `tensors` and returns them, checked; empty for a dense layer."""
    format = module_of(published)
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
    layer: StoredLayer, linear: nn.Linear, published: Published, dtype: torch.dtype
) -> tuple[Linear, dict[str, Tensor]]:
    """The layer without its tensors, and those by the name of their buffer, but for the bias."""
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
