"""Stored layers as JSON: `describe` says what a layer is, `restore` makes it of that, without its tensors.

Its constructors check what is described, and its `check` the tensors once they are there, whichever way they come
(`compression.layers.checks`): an artefact is opened, a run is gone on with and a method builds by the same rules.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from compression.errors import CompressionError, LayerError
from compression.files.strict_json import exact_fields, flag_field
from compression.layers.checks import FLOATS, check_one_of
from compression.layers.embedding import EMBEDDINGS, HEAD, PackedEmbedding
from compression.layers.low_rank import LoraLinear
from compression.layers.packed import PackedLinear
from compression.layers.sparse import SparseLinear
from compression.numeric.grids import GRIDS

StoredLinear = PackedLinear | SparseLinear | LoraLinear

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_COMMON = {"in_features", "out_features", "bias", "dtype"}


def describe(layer: StoredLinear | PackedEmbedding) -> dict[str, Any]:
    """What compression.json says of a layer."""
    if isinstance(layer, PackedEmbedding):
        return {"embedding": "tied" if layer.tied else describe(layer.table)}
    if isinstance(layer, LoraLinear):
        adapter = {"rank": layer.rank, "scale": layer.scale, "dtype": _name(layer.lora_a.dtype)}
        return {"adapter": adapter, "base": describe(layer.base)}  # type: ignore[arg-type]
    common = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "dtype": _name(layer.dtype),
    }
    if isinstance(layer, SparseLinear):
        store = "bitmask" if layer.pattern is None else "nm"
        return {"store": store, "pattern": layer.pattern, "kept": layer.values.numel(), **common}
    return {
        "grid": {"kind": layer.grid.kind, **dataclasses.asdict(layer.grid)},  # type: ignore[attr-defined, call-overload]
        **common,
        "compute_dtype": None if layer.compute_dtype is None else _name(layer.compute_dtype),
        "backend": layer.backend,
        "threshold": layer.threshold,
        "permuted": layer.permutation is not None,
    }


def restore(description: Any) -> StoredLinear:
    """The layer that `describe` gave this of, on the meta device.

    Raises:
        LayerError: it describes no layer that can be.
    """
    try:
        if not isinstance(description, dict):
            raise ValueError(f"{description!r:.80} is not a table of names and values")
        if "adapter" in description:
            return _adapted(description)
        return _sparse(description) if "store" in description else _packed(description)
    except (CompressionError, ValueError) as error:
        raise LayerError(str(error)) from None


def check_all(descriptions: dict[str, Any]) -> None:
    """Raise LayerError unless each describes what can be stored; of which model, `put_all` looks at."""
    for name, description in descriptions.items():
        stored = description.get("embedding") if isinstance(description, dict) else None
        if stored == "tied":  # to the head, which has a description of its own
            continue
        try:
            restore(description if stored is None else stored)
        except LayerError as error:
            raise LayerError(f"{name}: {error}") from None


def put_all(model: nn.Module, descriptions: dict[str, Any]) -> None:
    """Restore layers by name, each in the place of the dense one.

    Raises:
        LayerError: one of them describes no layer that can be, or another one than the dense one.
    """
    embeddings = [name for name, each in descriptions.items() if isinstance(each, dict) and "embedding" in each]
    for name, description in descriptions.items():
        if name not in embeddings:
            _put(model, name, description)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and HEAD in descriptions and not embeddings:
        raise LayerError(f"{HEAD} is stored as a layer of its own, and config.json ties it to the embeddings")
    if embeddings:
        _put_embeddings(model, embeddings, descriptions[embeddings[0]], tied)


def _put_embeddings(model: nn.Module, names: list[str], description: dict[str, Any], tied: bool) -> None:
    """Packed embeddings, on a head that is packed already where the model ties the two."""
    stored = exact_fields(description, {"embedding"})["embedding"]
    dense, head = model.get_submodule(EMBEDDINGS), model.get_submodule(HEAD)
    if names != [EMBEDDINGS] or (stored == "tied") != tied or not isinstance(head, PackedLinear):
        raise LayerError(
            f"{names[0]}: packed embeddings are those of {EMBEDDINGS}, on the head where config.json ties them"
        )
    try:
        table = head if tied else restore(stored)
    except LayerError as error:
        raise LayerError(f"{EMBEDDINGS}: {error}") from None
    shape = table.out_features, table.in_features
    if not isinstance(table, PackedLinear) or shape != (dense.num_embeddings, dense.embedding_dim):
        raise LayerError(f"{EMBEDDINGS} is stored as {table}, and by the configuration {dense}")
    model.set_submodule(EMBEDDINGS, PackedEmbedding(table, tied=tied))


def _put(model: nn.Module, name: str, description: Any) -> None:
    """Restore a layer in the place of the dense one of that name.

    Raises:
        LayerError: it describes no layer that can be, or another one than the dense one.
    """
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        dense = None
    if type(dense) is not nn.Linear:
        raise LayerError(f"{name} is no linear layer of the model")
    try:
        layer = restore(description)
    except LayerError as error:
        raise LayerError(f"{name}: {error}") from None
    wanted, got = ((each.in_features, each.out_features, each.bias is not None) for each in (dense, layer))
    if wanted != got:
        raise LayerError(f"{name} is {layer}, bias={got[2]}, and by the configuration {dense}")
    model.set_submodule(name, layer)


def _adapted(description: dict[str, Any]) -> LoraLinear:
    exact_fields(description, {"adapter", "base"})
    adapter = exact_fields(description["adapter"], {"rank", "scale", "dtype"})
    base = restore(description["base"])
    return LoraLinear(base, adapter["rank"], adapter["scale"], dtype=_dtype(adapter, "dtype"), device="meta")


def _sparse(description: dict[str, Any]) -> SparseLinear:
    exact_fields(description, {"store", "pattern", "kept", *_COMMON})
    check_one_of("store", description["store"], ("bitmask", "nm"))
    pattern = description["pattern"]
    if description["store"] == "bitmask":
        if pattern is not None:
            raise ValueError(f"pattern={pattern!r:.80} of a bitmask must be null")
    elif not (isinstance(pattern, list | tuple) and len(pattern) == 2):
        raise ValueError(f"pattern={pattern!r:.80} must be two numbers, n and m")
    else:
        pattern = tuple(pattern)
    layer = SparseLinear(
        description["in_features"], description["out_features"], bias=flag_field(description, "bias"),
        dtype=_dtype(description, "dtype"), kept=description["kept"], pattern=pattern, device="meta",
    )  # fmt: skip
    if layer.values.numel() != description["kept"]:
        raise ValueError(f"kept={description['kept']!r:.80}, but the pattern keeps {layer.values.numel()}")
    return layer


def _packed(description: dict[str, Any]) -> PackedLinear:
    exact_fields(description, {"grid", "compute_dtype", "backend", "threshold", "permuted", *_COMMON})
    kind = GRIDS.get(str(description["grid"].get("kind"))) if isinstance(description["grid"], dict) else None
    if kind is None:
        raise ValueError(f"grid={description['grid']!r:.80} must be a table whose kind is one of {', '.join(GRIDS)}")
    fields = exact_fields(description["grid"], {"kind", *(field.name for field in dataclasses.fields(kind))})
    return PackedLinear(
        kind(**{name: value for name, value in fields.items() if name != "kind"}),
        description["in_features"], description["out_features"], bias=flag_field(description, "bias"),
        dtype=_dtype(description, "dtype"), threshold=description["threshold"], backend=description["backend"],
        permuted=flag_field(description, "permuted"), device="meta",
        compute_dtype=None if description["compute_dtype"] is None else _dtype(description, "compute_dtype"),
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(description: dict[str, Any], name: str) -> torch.dtype:
    value = description[name]
    if not isinstance(value, str) or value not in _DTYPES:
        raise ValueError(f"{name}={value!r:.80} must be one of {', '.join(sorted(_DTYPES))}")
    return _DTYPES[value]
