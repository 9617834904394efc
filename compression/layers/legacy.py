"""Descriptions of layers as schema 1 and 2 of compression.json had them, and the names of their tensors.

There were three kinds of layer, each with fields of its own: packed codes (`grid`), sparse weights (`store`), and an
adapter around one of the two (`adapter`, `base`). They are read as what `stored.describe` says of the same layer; the
names of tensors are translated likewise.
"""

from collections.abc import Mapping
from typing import Any

from compression.errors import LayerError
from compression.files.strict_json import exact_fields, flag_field
from compression.numeric.checks import check_one_of

_COMMON = {"in_features", "out_features", "bias", "dtype"}


def translated(description: Any) -> dict[str, Any]:
    """What `stored.describe` says of the layer that schema 2 described so.

    Raises:
        LayerError: it describes no layer.
    """
    try:
        if not isinstance(description, dict):
            raise ValueError(f"{description!r:.80} is not a table of names and values")
        if "embedding" in description:
            stored = exact_fields(description, {"embedding"})["embedding"]
            return {"embedding": stored if stored == "tied" else translated(stored)}
        if "adapter" in description:
            return _adapted(description)
        return _sparse(description) if "store" in description else _packed(description)
    except ValueError as error:
        raise LayerError(str(error)) from None


def tensor_names(descriptions: Mapping[str, Any]) -> dict[str, str]:
    """By the name of schema 2, the name of every tensor of these layers that is called otherwise now."""
    names = {}
    for layer, description in descriptions.items():
        table = isinstance(description.get("embedding"), dict)
        now = f"{layer}.table" if table else layer
        stored = description["embedding"] if table else description
        if "adapter" in stored:
            within = {f"base.{name}": f"weight_part.0.{name}" for name in _tensors(stored["base"])}
            within |= {"base.bias": "bias", "lora_a": "weight_part.1.a", "lora_b": "weight_part.1.b"}
        else:
            within = {name: f"weight_part.{name}" for name in _tensors(stored)}
        names |= {f"{now}.{before}": f"{now}.{after}" for before, after in within.items()}
    return names


def _tensors(stored: Mapping[str, Any]) -> tuple[str, ...]:
    if "store" in stored:
        return ("values", "mask", "indices")
    return ("codes", "permutation", "scales", "zero_points", "absmax", "absmax_codes", "absmax_scales", "absmax_offset")


def _adapted(description: dict[str, Any]) -> dict[str, Any]:
    exact_fields(description, {"adapter", "base"})
    adapter = exact_fields(description["adapter"], {"rank", "scale", "dtype"})
    if isinstance(description["base"], dict) and "adapter" in description["base"]:
        raise ValueError("the base of an adapter must be a layer without one")
    base = translated(description["base"])
    if "weight" not in base:
        raise ValueError("the base of an adapter must be a linear layer")
    return base | {"weight": {"kind": "sum", "parts": [base["weight"], {"kind": "low_rank", **adapter}]}}


def _sparse(description: dict[str, Any]) -> dict[str, Any]:
    exact_fields(description, {"store", "pattern", "kept", *_COMMON})
    check_one_of("store", description["store"], ("bitmask", "nm"))
    pattern = description["pattern"]
    if description["store"] == "bitmask":
        if pattern is not None:
            raise ValueError(f"pattern={pattern!r:.80} of a bitmask must be null")
    elif not (isinstance(pattern, list | tuple) and len(pattern) == 2):
        raise ValueError(f"pattern={pattern!r:.80} must be two numbers, n and m")
    weight = {"kind": "sparse", "pattern": pattern, "kept": description["kept"], "dtype": description["dtype"]}
    return _layer(description, weight)


def _packed(description: dict[str, Any]) -> dict[str, Any]:
    exact_fields(description, {"grid", "compute_dtype", "backend", "threshold", "permuted", *_COMMON})
    permuted = flag_field(description, "permuted")
    weight = {"kind": "codes", "grid": description["grid"], "dtype": description["dtype"], "permuted": permuted}
    threshold = description["threshold"]
    return _layer(description, weight) | {
        "compute_dtype": description["compute_dtype"],
        "backend": description["backend"],
        "input": None if threshold is None else {"kind": "outlier_columns", "threshold": threshold},
    }


def _layer(description: dict[str, Any], weight: dict[str, Any]) -> dict[str, Any]:
    return {
        "in_features": description["in_features"],
        "out_features": description["out_features"],
        "bias": description["dtype"] if flag_field(description, "bias") else None,
        "compute_dtype": None,
        "backend": "auto",
        "input": None,
        "weight": weight,
        "output": None,
    }
