"""Whole checkpoints of the published formats, read into a model with packed layers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.architectures import embeddings
from compression.architectures import published as layouts
from compression.architectures.fused import Fused
from compression.architectures.table import architecture_of, named
from compression.checkpoints import base, weights
from compression.checkpoints.base import BaseSource
from compression.checkpoints.formats.description import read_config
from compression.checkpoints.formats.layer import LayerStore, split
from compression.checkpoints.formats.stores import stores_of
from compression.errors import CheckpointError, LayerError
from compression.layers.codes import Codes
from compression.layers.linear import Linear

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def describes(folder: Path, quant_method: str) -> bool:
    """Whether a folder says that it was quantized so. Raises CheckpointError where it contradicts itself."""
    path = folder / "config.json"
    published = read_config(folder, base._read_json(path)) if path.exists() else None
    return published is not None and published.quant_method == quant_method


def open_model(source: BaseSource) -> nn.Module:
    """The model of a published checkpoint on the CPU, its quantized layers packed; scales keep their dtype.

    Layers that are stored uncompressed stay dense, and all dense tensors take the dtype of the embeddings.

    Raises:
        CheckpointError: see `_checkpoint.open_base`; and a layer whose tensors are incomplete or contradict the shapes,
            the group size or the symmetry that the configuration names.
    """
    published, where = source.published, str(source.folder)
    assert published is not None
    stores = _check_headers(source, weights.index(source.files)[1], where)
    tensors = _renamed(weights.read_tensors(source.files), source)
    embedding = tensors.get(named(source.config["architectures"][0], where).embeddings_weight)
    dtype = torch.float32 if embedding is None else embedding.dtype  # without it, `fill` refuses
    model = base.build(source.config, dtype, device="meta")
    packed: dict[str, Tensor] = {}
    for each in _linears(model):
        store = stores.get(each.name)
        if store is None or not (stored := _take(tensors, each.name, each.whole, store, where)):
            continue
        for (name, linear), part in zip(each.parts, _read(stored, each, store, dtype, where), strict=True):
            bias = None if linear.bias is None else torch.empty(linear.out_features, dtype=dtype, device="meta")
            model.set_submodule(name, Linear(part, bias))
            packed |= {f"{name}.weight_part.{key}": value for key, value in part.state_dict().items()}
    if not packed:
        raise CheckpointError(f"{where}: {published.quant_method} is what the configuration names, but no layer of the "
                              "model is stored so")  # fmt: skip
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


def _check_headers(source: BaseSource, headers: dict[str, Tensor], where: str) -> dict[str, LayerStore]:
    """How each layer is stored, by its name; refuses tensors of other names, shapes or types than the model's, before
    one of them is read."""
    assert source.published is not None
    model = base.build(source.config, torch.float32, device="meta")
    linears, row = _linears(model), architecture_of(model)
    theirs = {each.name: layouts.their_name(each.name, row) for each in linears}
    try:
        stores = stores_of(source.published, theirs)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    rest, there = _renamed(weights.not_stale(headers), source), {}
    for each in linears:
        if each.name in stores and _take(rest, each.name, each.whole, stores[each.name], where):
            for name, linear in each.parts:
                if linear.bias is not None:
                    there[f"{name}.weight"] = linear.weight  # the bias is one of the dense tensors
                else:
                    model.set_submodule(name, nn.Identity())
    weights.fit(model, _apart(rest, model) | there, where=where)
    return stores


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


def _read(tensors: dict[str, Tensor], each: _Stored, store: LayerStore, dtype: torch.dtype, where: str) -> list[Codes]:
    """The weight of each part.

    Raises:
        CheckpointError: groups are not of one size, scales not finite, or zero points not what the description says.
    """
    try:
        whole = store.read(tensors, each.whole.out_features, each.whole.in_features, dtype)
        return split(whole, each.sizes, by_head=each.by_head) if each.sizes else [whole]
    except (ValueError, LayerError) as error:
        raise CheckpointError(f"{where}: {each.name}: {error}") from error


def _take(tensors: dict[str, Tensor], name: str, linear: nn.Linear, store: LayerStore, where: str) -> dict[str, Tensor]:
    """Removes the tensors of a quantized layer from `tensors` and returns them, checked; empty for a dense layer."""
    rows, cols = linear.out_features, linear.in_features
    wanted = store.tensors(rows, cols)
    if store.mark is not None and f"{name}.{store.mark}" not in tensors:
        return {}
    stored = {key: tensors.pop(f"{name}.{key}") for key in wanted if f"{name}.{key}" in tensors}
    if not stored and not store.required:
        return {}
    if f"{name}.weight" in tensors:
        if not stored:
            raise CheckpointError(f"{where}: {name} is stored as a dense weight, and its configuration says "
                                  f"{store.words}")  # fmt: skip
        raise CheckpointError(f"{where}: {name} is stored twice: as weight and as {', '.join(stored)}")
    if missing := [f"{name}.{key}" for key, each in wanted.items() if key not in stored and not each.optional]:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}; the layer cannot be read without it; "
                              "download the checkpoint again")  # fmt: skip
    if reason := store.refusal(rows, cols):
        raise CheckpointError(f"{where}: {name} does not fit its format: {reason}")
    for key, tensor in stored.items():
        known = wanted[key].shapes
        if known is not None and tuple(tensor.shape) not in known:
            shapes = " or ".join(map(str, known))
            raise CheckpointError(f"{where}: {name}.{key} has shape {tuple(tensor.shape)}; {store.words} make it "
                                  f"{shapes}")  # fmt: skip
        if tensor.dtype not in wanted[key].dtypes:
            raise CheckpointError(f"{where}: {name}.{key} is stored as {tensor.dtype}, expected "
                                  f"{' or '.join(map(str, wanted[key].dtypes))}")  # fmt: skip
    bias = f"{name}.bias"
    given = tensors.get(bias)  # AutoGPTQ wrote one of zeros everywhere
    if linear.bias is None and given is not None and (given.is_meta or not given.any()):
        del tensors[bias]
    return stored
