"""What a checkpoint that torchao quantized says of its layers, as transformers writes it. Needs no torch.

config.json has the setting (`quant_type`); the metadata of the safetensors files has, by the name of every tensor, the
class that it was of and how large its blocks are. Both have to agree. What comes out are the groups of
`compressed_tensors_config`, whose formats stand for classes:

    Int8Tensor, IntxUnpackedToInt8Tensor    int-quantized
    Float8Tensor                            float-quantized

Not read: quantized activations, and the int4 layouts of GPUs (Int4Tensor, Int4TilePackedTo4dTensor,
Int4PlainInt32Tensor), which hold W = scale * code + offset or tiles of a kernel: codes here stand for scale * (code -
zero point), which would round the offsets.

Source: torchao 0.18, `prototype/safetensors`, `quantization/quant_api.py`, `core/config.py`; transformers 5.23,
`TorchAoConfig`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compression.checkpoints.formats.compressed_tensors_config import FLOAT, INT, CompressedTensors, Scheme
from compression.errors import CheckpointError
from compression.files.strict_json import strict_json

METHOD = "torchao"
QDATA = "_weight_qdata"  # of a layer: where its codes are
_CONFIGS = {  # by type: the version that is read, and the classes of its weights
    "Int8WeightOnlyConfig": (2, ("Int8Tensor",)),
    "IntxWeightOnlyConfig": (2, ("IntxUnpackedToInt8Tensor",)),
    "Float8WeightOnlyConfig": (2, ("Float8Tensor",)),
    "Int4WeightOnlyConfig": (2, ("Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor")),
}
_PER_LAYER = ("FqnToConfig", "ModuleFqnToConfig")  # a setting to each name
_FORMATS = {"Int8Tensor": INT, "IntxUnpackedToInt8Tensor": INT, "Float8Tensor": FLOAT}
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "mm_config", "act_pre_scale", "activation_dtype")
_PARTS = {"qdata", "scale", "zero_point"}
_DENSE = ("Tensor", "torch.Tensor")
_MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_INT_BITS = {f"int{bits}": bits for bits in range(2, 9)}


def parse(fields: Mapping[str, Any], files: Iterable[Path], where: str) -> CompressedTensors:
    """What `quantization_config` and the metadata of the weight files say.

    Raises:
        CheckpointError: they are of a kind that is not read, or contradict each other.
    """
    allowed = _classes(fields, where)
    groups: dict[Scheme, list[str]] = {}
    described, shapes = _headers(files)
    for name, said in described.items():
        if said.get("_type") in _DENSE:
            continue
        here, layer = f"{where}: {name}", name.removesuffix(".weight")
        if layer == name:
            raise CheckpointError(f"{here} is quantized, and no weight of a layer")
        groups.setdefault(_scheme(said, allowed, shapes.get(f"{layer}.{QDATA}"), here), []).append(layer)
    return CompressedTensors(
        groups={f"group_{i}": (tuple(names), scheme) for i, (scheme, names) in enumerate(groups.items())},
        ignore=(), quant_method=METHOD,
    )  # fmt: skip


def _classes(fields: Mapping[str, Any], where: str) -> dict[str, bool]:
    """Of weights that `quant_type` may make; whether each has zero points in the middle."""
    said = fields.get("quant_type")
    if isinstance(said, str):
        raise CheckpointError(f"{where}: quant_type={said!r:.80} is that of an old torchao, whose checkpoints are "
                              "pickles, which are not read; save it with a current transformers")  # fmt: skip
    config = said.get("default") if isinstance(said, Mapping) and len(said) == 1 else None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: quant_type must be a table with one setting, default, not {said!r:.80}")
    found: dict[str, bool] = {}
    for each in _each_config(config, where):
        kind, data = each.get("_type"), each.get("_data")
        if not isinstance(kind, str) or kind not in _CONFIGS or not isinstance(data, Mapping):
            more = "activations are quantized too, and the weights alone would be another model; "
            why = more if "Activation" in str(kind) else ""
            raise CheckpointError(f"{where}: quant_type {kind!r:.80} is not read: {why}read are {', '.join(_CONFIGS)}")
        version, classes = _CONFIGS[kind]
        if each.get("_version") != version:
            raise CheckpointError(f"{where}: {kind} has _version={each.get('_version')!r:.80}; read is {version}")
        mapping = data.get("mapping_type")
        symmetric = not (isinstance(mapping, Mapping) and mapping.get("_data") == "ASYMMETRIC")
        for name in classes:
            found[name] = symmetric and found.get(name, True)
    return found


def _each_config(config: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The setting, or all of those that have names."""
    if config.get("_type") not in _PER_LAYER:
        return [config]
    data = config.get("_data")
    each = [value for value in data.values() if isinstance(value, Mapping)] if isinstance(data, Mapping) else []
    inner = [
        value for table in each for value in ([table] if "_type" in table else table.values()) if value is not None
    ]
    if not inner or not all(isinstance(value, Mapping) for value in inner):
        raise CheckpointError(f"{where}: quant_type {config.get('_type')} must have a setting to each name")
    return inner


def _headers(files: Iterable[Path]) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """What the metadata of all files say of tensors, and the shapes of what is stored, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    shapes: dict[str, Any] = {}
    for path in files:
        header = _header(path)
        metadata = header.pop("__metadata__", {})
        shapes |= {name: each.get("shape") for name, each in header.items() if isinstance(each, Mapping)}
        if not isinstance(metadata, Mapping) or "tensor_names" not in metadata:
            raise CheckpointError(f"{path} has no tensor_names in its metadata, where torchao says what tensors are; "
                                  "save the model with a current transformers")  # fmt: skip
        names = _parsed(metadata["tensor_names"], f"{path}: tensor_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: tensor_names in its metadata must be a list of names, not {names!r:.80}")
        for name in names:
            if name not in metadata:
                raise CheckpointError(f"{path}: its metadata names {name!r:.200} and does not say what it is")
            said = _parsed(metadata[name], f"{path}: {name}")
            if not isinstance(said, Mapping) or found.setdefault(name, said) != said:
                raise CheckpointError(f"{path}: its metadata says of {name!r:.200} what is no table, or another thing "
                                      "than that of another file")  # fmt: skip
    return found, shapes


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its content."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(_MOST_HEADER, path.stat().st_size):
                raise ValueError(f"its header would take {size:,} bytes")
            header = strict_json(file.read(size))
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        return header
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors: {error}; download it again") from error


def _parsed(text: Any, where: str) -> Any:
    try:
        return strict_json(text)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} in the metadata is not JSON: {error}") from error


def _scheme(said: Mapping[str, Any], allowed: Mapping[str, bool], shape: Any, where: str) -> Scheme:
    """Of a tensor that is stored in this shape, (outputs, inputs)."""
    kind, data, parts = said.get("_type"), said.get("_data"), said.get("_tensor_data_names")
    if not isinstance(kind, str) or kind not in allowed:
        raise CheckpointError(f"{where} is of class {kind!r:.80}; quant_type in config.json makes {', '.join(allowed)}")
    if kind not in _FORMATS:
        raise CheckpointError(f"{where} is of class {kind}, the int4 layout of a GPU, which holds offsets beside "
                              "scales or tiles of a kernel and is not read; one that is makes IntxWeightOnlyConfig("
                              "weight_dtype=torch.int4)")  # fmt: skip
    if not isinstance(data, Mapping) or not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise CheckpointError(f"{where}: its metadata must have _data and _tensor_data_names, not {dict(said)!r:.200}")
    if quantized := [key for key in _ACTIVATIONS if data.get(key) is not None]:
        raise CheckpointError(f"{where}: {quantized[0]} is set: inputs are quantized or scaled too, and the weights "
                              "alone would be another model")  # fmt: skip
    if unread := sorted(set(parts) - _PARTS):
        raise CheckpointError(f"{where} holds {', '.join(unread)}, which is not read")
    bits = 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = data.get("target_dtype")
        named = target.get("_data") if isinstance(target, Mapping) else None
        if named not in _INT_BITS:
            raise CheckpointError(f"{where}: target_dtype={target!r:.80} is not read; it must be int2 to int8")
        bits = _INT_BITS[named]
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 <= n < 2**31 for n in block):
        raise CheckpointError(f"{where}: block_size must be rows and columns that share a scale, not {block!r:.80}")
    strategy, size = "block", None
    if block == shape:
        strategy = "tensor"
    elif block[0] == 1:
        size = None if isinstance(shape, list) and block == [1, *shape[1:]] else block[1]
        strategy = "channel" if size is None else "group"
    return Scheme(
        format=_FORMATS[kind], bits=bits, float=kind == "Float8Tensor", symmetric=allowed[kind], strategy=strategy,
        group_size=size, block=(block[0], block[1]) if strategy == "block" else None,
    )  # fmt: skip
