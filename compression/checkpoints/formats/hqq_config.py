"""What config.json says of a checkpoint that the hqq library quantized, as transformers writes it. Needs no torch.

One setting for all linear layers, or one to each tag: the name of a layer without `model`, `layers` and numbers, such
as `self_attn.q_proj`. What comes out are the groups of `compressed_tensors_config`, whose targets are patterns for
tags.

Source: transformers 4.57, `HqqConfig`, `integrations/hqq.py`; hqq 0.2.8, `BaseQuantizeConfig`.
"""

import re
from collections.abc import Mapping
from typing import Any

from compression.checkpoints.formats.compressed_tensors_config import CLASS, CompressedTensors, Scheme
from compression.errors import CheckpointError

METHOD = "hqq"
BITS = (2, 3, 4, 8)
_LEFT_OUT = r"(?:(?:model|layers|\d+)\.)*"  # of a name, for its tag
_MOST = 2**31


def parse(fields: Mapping[str, Any], where: str) -> CompressedTensors:
    """What a `quantization_config` says.

    Raises:
        CheckpointError: it is of a kind that is not read, or no setting; the message names the field.
    """
    said, skipped = fields.get("quant_config"), fields.get("skip_modules", [])
    if not isinstance(said, Mapping) or not said:
        raise CheckpointError(f"{where}: quant_config must be a table of settings, not {said!r:.80}")
    if not isinstance(skipped, list) or not all(isinstance(each, str) for each in skipped):
        raise CheckpointError(f"{where}: skip_modules must be a list of names, not {skipped!r:.80}")
    ignore = tuple(map(_pattern, skipped))
    if "weight_quant_params" in said:
        groups = {"quant_config": ((CLASS,), _scheme(said, f"{where}: quant_config"))}
    else:
        groups = {tag: ((_pattern(tag),), _scheme(each, f"{where}: quant_config.{tag}")) for tag, each in said.items()}
    return CompressedTensors(groups=groups, ignore=ignore, quant_method=METHOD)


def _pattern(tag: str) -> str:
    """Of the names that have this tag."""
    parts = [re.escape(f"{part}.") for part in tag.split(".")[:-1]] + [re.escape(tag.rpartition(".")[2])]
    return f"re:{_LEFT_OUT}{_LEFT_OUT.join(parts)}$"


def _scheme(setting: Any, where: str) -> Scheme:
    weights = setting.get("weight_quant_params") if isinstance(setting, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} must be a table with weight_quant_params, not {setting!r:.80}")
    for key in ("scale_quant_params", "zero_quant_params", "offload_meta"):
        if setting.get(key):
            raise CheckpointError(f"{where}.{key}: scales and zero points that are quantized or stored in one are not "
                                  "read; it must be null")  # fmt: skip
    bits, size, axis = weights.get("nbits"), weights.get("group_size"), weights.get("axis")
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{where}: nbits={bits!r:.80} is not read; it must be {', '.join(map(str, BITS))}")
    if size is not None and (type(size) is not int or not 8 <= size < _MOST):
        raise CheckpointError(f"{where}: group_size={size!r:.80} must be null or a whole number of at least 8")
    if axis != 1 or type(axis) is not int:
        raise CheckpointError(f"{where}: axis={axis!r:.80} is not read: layers here have scales for groups of the "
                              "inputs of one output, which are those of axis=1; quantize with it")  # fmt: skip
    if weights.get("channel_wise", True) is not True:
        raise CheckpointError(f"{where}: channel_wise must be true, not {weights['channel_wise']!r:.80}")
    return Scheme(format=METHOD, bits=bits, float=False, symmetric=False, group_size=size,
                  strategy="channel" if size is None else "group")  # fmt: skip
