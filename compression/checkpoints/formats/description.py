"""Published checkpoint formats, and how a folder describes itself.

`registry` has the formats by name. A folder tells its format in config.json (`quantization_config`), in
quantize_config.json as AutoGPTQ wrote it, in quant_config.json as llm-awq wrote it, or in several of them, which then
have to agree. `gptq`, `awq` and `compressed_tensors` translate the tensors of one layer, `reading` and `writing` those
of a whole folder. Nothing here needs torch.

Sources: GPTQModel 7.6 (`quantization/config.py`, `utils/model.py`), AutoGPTQ (`nn_modules/qlinear/qlinear_cuda.py`),
AutoAWQ (`modules/linear/gemm.py`), `GPTQConfig` and `AwqConfig` of transformers 5.23.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoints.formats import bitsandbytes_config, compressed_tensors_config, hqq_config, torchao_config
from compression.checkpoints.formats.bitsandbytes_config import BitsAndBytes
from compression.checkpoints.formats.compressed_tensors_config import CompressedTensors
from compression.checkpoints.weight_files import weight_files
from compression.errors import CheckpointError
from compression.files.strict_json import read_json

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
VERSIONS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
GROUP_SIZES = {"gptq": (-1, 16, 32, 64, 128, 256, 512, 1024), "awq": (-1, 16, 32, 64, 128)}  # that GPTQModel takes
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # and the method of those that name none

_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], "Description"]] = {
    compressed_tensors_config.METHOD: compressed_tensors_config.parse,
    bitsandbytes_config.METHOD: bitsandbytes_config.parse,
    hqq_config.METHOD: hqq_config.parse,
}
_OTHERS = (*_PARSERS, torchao_config.METHOD)
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size", "method": "quant_method"}
_COMPARED = ("quant_method", "bits", "group_size", "sym", "zero_point", "desc_act", "version")
_UNSUPPORTED = {  # field: the values that change nothing
    "is_marlin_format": (None, False),
    "pack_dtype": (None, "int32"),
    "adapter": (None, {}),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """How the linear layers of a published checkpoint are stored.

    Attributes:
        quant_method: "gptq" or "awq".
        bits: of a code.
        group_size: inputs that share a scale; -1 for all of a row.
        symmetric: whether every zero point is the middle, 2**(bits - 1).
        version: "gptq" (zero points stored less one) or "gptq_v2" (as they are); "gemm".
        desc_act: whether columns were rounded in activation order; then groups may be of inputs that are not
            neighbours, as each layer's `g_idx` tells.
        static_groups: whether they are of neighbours all the same.
        recipe: what a checkpoint of our own says that it was made by: a recipe in JSON.
    """

    quant_method: str
    bits: int
    group_size: int
    symmetric: bool
    version: str
    desc_act: bool = False
    static_groups: bool = False
    recipe: Any = None


@dataclass(frozen=True, kw_only=True)
class GGUFTypes:
    """A GGUF file with quantized tensors.

    Attributes:
        recipe: that it was made by, or the method `gguf` with the types of its layers, in JSON; without steps where
            that method does not make them.
    """

    recipe: Any
    quant_method: str = "gguf"


Description = Published | CompressedTensors | BitsAndBytes | GGUFTypes


def read_config(folder: Path, config: Mapping[str, Any]) -> Description | None:
    """The format of a folder by its `config` (config.json) and the files beside it; None if it is not quantized.

    Raises:
        CheckpointError: unreadable, contradictory, or of a kind that is not read; the message says what is.
    """
    said: dict[str, dict[str, Any]] = {}
    if (own := config.get("quantization_config")) not in (None, {}):
        said["config.json"] = _spelled(own, folder / "config.json")
    for name, method in SIDE_FILES.items():
        if (folder / name).exists():
            said[name] = {"quant_method": method} | _spelled(_read(folder / name), folder / name)
    if not said:
        return None
    for key in _COMPARED:
        values = {name: fields[key] for name, fields in said.items() if key in fields}
        if len({json.dumps(value) for value in values.values()}) > 1:
            both = " and ".join(f"{name} says {key}={value!r}" for name, value in values.items())
            raise CheckpointError(f"{folder}: {both}; set both to what the weights were stored with")
    merged = {key: value for fields in reversed(said.values()) for key, value in fields.items()}
    method, where = merged.get("quant_method"), f"{folder} ({', '.join(said)})"
    if method == torchao_config.METHOD:
        return torchao_config.parse(merged, weight_files(folder, config), where)
    parser = _PARSERS.get(method, _parse) if isinstance(method, str) else _parse
    return parser(merged, where)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _spelled(fields: Any, path: Path) -> dict[str, Any]:
    """The fields under the names of `Published` and GPTQModel, whatever the writer called them; nulls left out."""
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path}: this checkpoint is already quantized, and described by no JSON object but "
                              f"{fields!r}; give the uncompressed one as the base")  # fmt: skip
    known = {_SPELLINGS.get(key, key): value for key, value in fields.items() if value is not None}
    version = known.get("checkpoint_format", known.get("version", known.get("format")))
    if version is not None:
        known["version"] = version.lower() if isinstance(version, str) else version
    return known


def _parse(fields: Mapping[str, Any], where: str) -> Published:
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in BITS:
        raise CheckpointError(
            f"{where}: this checkpoint is already quantized, by quant_method {method!r}, which is not read; those that "
            f"are: {', '.join((*BITS, *_OTHERS))}; give the uncompressed one as the base"
        )
    bits = _one_of(fields, "bits", BITS[method], where)
    version = _one_of({"version": VERSIONS[method][0]} | fields, "version", VERSIONS[method], where)
    group_size = fields.get("group_size")
    if type(group_size) is not int or (group_size != -1 and group_size < 8):
        raise CheckpointError(f"{where}: group_size={group_size!r}; it must be -1 (per channel) or at least 8")
    for key, harmless in _UNSUPPORTED.items():
        if fields.get(key) not in harmless:
            raise CheckpointError(f"{where}: {key}={fields[key]!r} is not supported; it must be {_words(harmless)}")
    if overriding := sorted(name for name, value in _dynamic(fields, where).items() if value is not False):
        raise CheckpointError(f"{where}: dynamic sets other parameters for {', '.join(overriding)}; only layers left "
                              'uncompressed ("-:<pattern>") are read')  # fmt: skip
    if method == "awq":
        _one_of({"zero_point": True} | fields, "zero_point", (True,), where)
        if fields.get("backend") == "llm-awq":
            raise CheckpointError(f"{where}: backend='llm-awq' packs in an order of its own, which is not read")
        symmetric, desc_act, static_groups = False, False, False
    else:
        symmetric = _one_of({"sym": True} | fields, "sym", (True, False), where)
        desc_act = _one_of({"desc_act": False} | fields, "desc_act", (True, False), where)
        static_groups = _one_of({"static_groups": False} | fields, "static_groups", (True, False), where)
    meta = fields.get("meta")
    return Published(
        quant_method=method, bits=bits, group_size=group_size, symmetric=symmetric, version=version,
        desc_act=desc_act, static_groups=static_groups,
        recipe=meta.get("recipe") if isinstance(meta, Mapping) else None,
    )  # fmt: skip


def _dynamic(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """GPTQModel's overrides by pattern; False for "-:<pattern>", which leaves layers uncompressed."""
    dynamic = fields.get("dynamic", {})
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"{where}: dynamic must map patterns to parameters, not {dynamic!r}")
    return {name: False if name.startswith("-:") else value for name, value in dynamic.items()}


def _one_of(fields: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> Any:
    value = fields.get(key)
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise CheckpointError(f"{where}: {key}={value!r} is not supported; it must be {_words(allowed)}")
    return value


def _words(values: tuple[Any, ...]) -> str:
    return ", ".join(json.dumps(value) for value in values)
