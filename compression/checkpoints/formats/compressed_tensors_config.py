"""What config.json says of a checkpoint in the format compressed-tensors: `quantization_config`.

Groups of layers have a scheme each. A layer is matched by its name, by a pattern "re:...", or by the class "Linear"; a
name goes before a pattern, a pattern before the class, as in the library. Nothing here needs torch.

Source: compressed-tensors 0.20 (`quantization/quant_config.py`, `quant_args.py`, `utils/match.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from compression.errors import CheckpointError

METHOD = "compressed-tensors"
PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, NAIVE = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "naive-quantized"
FORMATS = (PACKED, INT, FLOAT, NVFP4, MXFP4, NAIVE)
MIXED = "mixed-precision"  # of a checkpoint whose groups have formats of their own
CLASS = "Linear"
_SECONDS = 1.0  # for one pattern and one name
_MOST = 2**31
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
STATIC = "-static"
ACTIVATIONS: dict[str, dict[str, Any]] = {  # that are read and written, as the library describes them
    "int8": {"num_bits": 8, "type": "int", "strategy": "token", "group_size": None, "dynamic": True},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "token", "group_size": None, "dynamic": True},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    "int8-static": {"num_bits": 8, "type": "int", "strategy": "tensor", "group_size": None, "dynamic": False},
    "fp8-static": {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None, "dynamic": False},
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a group of layers are stored.

    Attributes:
        format: one of `FORMATS`; "hqq" for its packings.
        bits: of a code.
        float: whether codes are floating-point numbers.
        symmetric: whether no zero points are stored.
        strategy: what shares a scale: "tensor", "channel", "group", "block", or "tensor_group" (NVFP4).
        group_size: inputs of a group; None for other strategies.
        block: (rows, columns) of a block; None for other strategies.
        ordered: whether groups are of inputs that are not neighbours, as `weight_g_idx` tells.
        activations: one of `ACTIVATIONS`, on which inputs are rounded; None where they are not.
    """

    format: str
    bits: int
    float: bool
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    ordered: bool = False
    activations: str | None = None

    @property
    def words(self) -> str:
        unit = f"groups of {self.group_size}" if self.group_size else f"strategy {self.strategy}"
        inputs = f", activations in {self.activations}" if self.activations else ""
        return f"{self.format}, {self.bits} bits, {unit}{inputs}"


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """The schemes of a checkpoint; also what the configurations of hqq and torchao are translated to.

    Attributes:
        groups: targets and scheme of each, by name.
        ignore: layers, patterns or classes that stay as they were.
        recipe: what a checkpoint of our own says that it was made by: a recipe in JSON.
    """

    groups: Mapping[str, tuple[tuple[str, ...], Scheme]]
    ignore: tuple[str, ...]
    recipe: Any = None
    quant_method: str = METHOD

    def scheme_of(self, name: str) -> Scheme | None:
        """That of a linear layer; None for one that stays as it was.

        Raises:
            CheckpointError: two groups match the layer in the same way.
        """
        if any(_rank(each, name) is not None for each in self.ignore):
            return None
        found: dict[int, dict[str, Scheme]] = {}
        for group, (targets, scheme) in self.groups.items():
            ranks = [rank for each in targets if (rank := _rank(each, name)) is not None]
            if ranks:
                found.setdefault(min(ranks), {})[group] = scheme
        if not found:
            return None
        best = found[min(found)]
        if len(set(best.values())) > 1:
            raise CheckpointError(f"quantization_config: {name} is a target of {' and of '.join(best)}, with different "
                                  "schemes; name it in one of them")  # fmt: skip
        return next(iter(best.values()))

    def check_targets(self, names: Sequence[str]) -> None:
        """Raise CheckpointError if a target matches none of the linear layers of a model."""
        for group, (targets, _) in self.groups.items():
            for target in targets:
                if not any(_rank(target, name) is not None for name in names):
                    raise CheckpointError(f"quantization_config: {target!r}, a target of {group}, is no linear layer "
                                          f"of the model, which has {names[0]} and others")  # fmt: skip


def _rank(target: str, name: str) -> int | None:
    """How closely a target matches the name of a linear layer, 0 most; None if it does not."""
    if target == name:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if regex.match(target[3:], name, timeout=_SECONDS) else None
        except TimeoutError:
            raise CheckpointError(f"quantization_config: the pattern {target!r:.80} takes too long on {name}; name the "
                                  "layers, or leave out quantifiers within quantifiers") from None  # fmt: skip
    return 2 if target == CLASS else None


def parse(fields: Mapping[str, Any], where: str) -> CompressedTensors:
    """What a `quantization_config` says.

    Raises:
        CheckpointError: it says something that is not read, or contradicts itself; the message names the field.
    """
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.get(key) not in (None, {}) and not (key == "sparsity_config" and _dense(fields[key])):
            raise CheckpointError(f"{where}: {key} is not read: the weights alone would be another model; it must be "
                                  "null")  # fmt: skip
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups must be a table of at least one group, not {groups!r:.80}")
    ignore = fields.get("ignore") or []
    found = {}
    for name, group in groups.items():
        here = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{here} must be a table with targets and weights, not {group!r:.80}")
        found[name] = (_names(group.get("targets"), f"{here}.targets"), _scheme(group, fields.get("format"), here))
    meta = fields.get("meta")
    recipe = meta.get("recipe") if isinstance(meta, Mapping) else None
    return CompressedTensors(groups=found, ignore=_names(ignore, f"{where}: ignore"), recipe=recipe)


def _dense(config: Any) -> bool:
    return isinstance(config, Mapping) and config.get("format") == "dense"


def _names(names: Any, where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise CheckpointError(f'{where} must be a list of names, of patterns "re:..." or {CLASS}, not {names!r:.80}')
    for each in names:
        if each.startswith("re:"):
            try:
                regex.compile(each[3:])
            except (regex.error, OverflowError, RecursionError) as error:
                raise CheckpointError(f"{where}: {each!r} is no regular expression: {error}") from error
    return tuple(names)


def _scheme(group: Mapping[str, Any], format: Any, where: str) -> Scheme:
    if group.get("output_activations") is not None:
        raise CheckpointError(f"{where}.output_activations: quantized outputs are not read; the weights alone would be "
                              "another model")  # fmt: skip
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}.weights must be a table, not {weights!r:.80}")
    here, format = f"{where}.weights", group.get("format") or format
    if format not in FORMATS:
        raise CheckpointError(f"{where}: format {format!r:.80} is not read; it must be {', '.join(FORMATS)}")
    kind, bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    if kind not in ("int", "float"):
        raise CheckpointError(f"{here}.type must be int or float, not {kind!r:.80}")
    most = {"int": range(2, 9), "float": (4,) if format in (NVFP4, MXFP4) else (8,)}[kind]
    if type(bits) is not int or bits not in most:
        raise CheckpointError(f"{here}.num_bits={bits!r:.80} cannot be in {format} of type {kind}")
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool or (kind == "float" and not symmetric):
        raise CheckpointError(
            f"{here}.symmetric={symmetric!r:.80} must be true{'' if kind == 'float' else ' or false'}"
        )
    if weights.get("dynamic", False):
        raise CheckpointError(f"{here}.dynamic: weights are stored with their scales; it must be false")
    if (kind == "float") == (format in (PACKED, INT)):
        raise CheckpointError(f"{where}: format {format} does not hold weights of type {kind}")
    strategy, size, block = _strategy(weights, here)
    order = weights.get("actorder")
    if format in (NVFP4, MXFP4) and size != (wanted := 16 if format == NVFP4 else 32):
        raise CheckpointError(f"{here}.group_size={size!r}: that of {format} is {wanted}")
    activations = _activations(group.get("input_activations"), f"{where}.input_activations")
    beside = {"int8": kind == "int" and bits == 8 and symmetric, "fp8": kind == "float" and bits == 8,
              "mxfp4": format == MXFP4, "nvfp4": format == NVFP4}  # fmt: skip
    wanted = (activations or "").removesuffix(STATIC)
    if activations and not (beside[wanted] and (wanted in ("mxfp4", "nvfp4") or strategy in ("channel", "tensor"))):
        raise CheckpointError(f"{where}: activations in {activations} are read beside weights of the same kind with a "
                              f"scale to each output, not {format}, {bits} bits, strategy {strategy}")  # fmt: skip
    return Scheme(
        format=format, bits=bits, float=kind == "float", symmetric=symmetric, strategy=strategy, group_size=size,
        block=block, ordered=order in (True, "group", "dynamic"),
        activations=activations,
    )  # fmt: skip


def _activations(given: Any, where: str) -> str | None:
    """The name of what `input_activations` says."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} must be a table or null, not {given!r:.80}")
    if given.get("symmetric", True) is not True:
        raise CheckpointError(f"{where}: activations with zero points are not read; read are symmetric ones")
    defaults = (("num_bits", 8), ("type", "int"), ("strategy", "tensor"), ("group_size", None), ("dynamic", False))
    said = {key: default if given.get(key) is None else given[key] for key, default in defaults}
    for name, known in ACTIVATIONS.items():
        if said == known and type(said["dynamic"]) is type(known["dynamic"]):
            return name
    raise CheckpointError(f"{where}: {said} is not read; read are {', '.join(ACTIVATIONS)}: int8 and FP8 by token, or "
                          "with one stored scale, MXFP4, and NVFP4 under a stored one")  # fmt: skip


def _strategy(weights: Mapping[str, Any], where: str) -> tuple[str, int | None, tuple[int, int] | None]:
    size, block = weights.get("group_size"), weights.get("block_structure")
    if size is not None and (type(size) is not int or (size != -1 and not 8 <= size < _MOST)):
        raise CheckpointError(f"{where}.group_size={size!r:.80} must be -1 or a whole number of at least 8")
    alone = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or alone
    if strategy not in STRATEGIES:
        raise CheckpointError(f"{where}.strategy={strategy!r:.80} must be {', '.join(STRATEGIES)}")
    grouped = strategy in ("group", "tensor_group")
    if grouped != (size is not None and size > 0):
        raise CheckpointError(f"{where}: strategy {strategy} contradicts group_size={size!r}")
    if (strategy == "block") != (block is not None):
        raise CheckpointError(f"{where}: strategy {strategy} contradicts block_structure={block!r:.80}")
    if block is None:
        return strategy, size if grouped else None, None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 8 <= n < _MOST for n in block):
        raise CheckpointError(f"{where}.block_structure={block!r:.80} must be rows and columns of a block, at least 8")
    return strategy, None, (block[0], block[1])
