"""Scaled positions in GGUF files: what their keys say as transformers' `rope_parameters`, and back.

    linear    rope.scaling.type linear, or none said, and rope.scaling.factor; in old files rope.scale_linear
    yarn      rope.scaling.type yarn, rope.scaling.factor, rope.scaling.original_context_length, by default the context
              length; beta_fast and beta_slow are 32 and 1: llama.cpp passes over the keys that say otherwise
    llama3    no key but the tensor rope_freqs: what each frequency is divided by, fp32 (head size / 2,), of Llama alone

A file of llama3 does not say its settings. They are those that this package wrote beside the tensor, or those of Llama
3.1 to 3.3 with the largest factor of the tensor, if they make the tensor; else the file is refused. Factors of yarn for
attention are those that follow from `factor` in both programs.

Source: llama.cpp, `conversion/llama.py` (rope_freqs), `ggml_rope_yarn_corr_dims` and `rope_yarn`; transformers 5.23,
`modeling_rope_utils`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compression.files.strict_json import strict_json

TENSOR = "rope_freqs.weight"
SETTINGS = "compression_bench.rope_parameters"  # of llama3, JSON
_NEUTRAL = {"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
            "rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0}  # fmt: skip
_BETAS = {"beta_fast": 32, "beta_slow": 1}
_OLD = "rope.scale_linear"
KEYS = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", _OLD,
    *_NEUTRAL,
}  # fmt: skip
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_CLOSE = 1e-5  # powers differ in the last bits from one machine to another


def read(
    values: Mapping[str, Any], config: Mapping[str, Any], factors: Tensor | None, settings: Any
) -> dict[str, Any] | None:
    """`rope_parameters`; None for positions that are not scaled.

    Args:
        values: those of `KEYS` that a file has.
        config: what config.json would say.
        factors: the tensor rope_freqs, if there is one.
        settings: what the file says under `SETTINGS`.

    Raises:
        ValueError: transformers has no setting for them, or they contradict each other.
    """
    kind, theta = values.get("rope.scaling.type", "linear"), config["rope_theta"]
    factor = values.get("rope.scaling.factor", values.get(_OLD, 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type = {kind!r:.80} is not read; read are none, linear, yarn")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(f"rope.scaling.factor = {factor!r:.80} must be a finite number of at least 1")
    for key, harmless in _NEUTRAL.items():
        if values.get(key, harmless) != harmless:
            raise ValueError(f"{key} = {values[key]!r:.80} is not read; it must be {harmless}")
    factor = 1 if kind == "none" else factor
    if factors is not None and not (factors == 1).all():
        if factor != 1:
            raise ValueError(f"positions are scaled twice: by {TENSOR}, and {kind} by {factor}")
        return _llama3(factors, theta, settings, config["head_dim"])
    if factor == 1:
        return None
    found = {"rope_type": kind, "rope_theta": theta, "factor": float(factor)}
    if kind == "linear":
        return found
    length = values.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if type(length) is not int or length < 1:
        raise ValueError(f"rope.scaling.original_context_length = {length!r:.80} must be a whole number of at least 1")
    found["original_max_position_embeddings"] = length
    return found


def written(rope: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of `rope_parameters` in a file of an architecture, without that of the tensor of llama3.

    Raises:
        ValueError: llama.cpp has no setting for them, or fp32 would round one.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    known = {"linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"},
             "llama3": {"factor", *_LLAMA3}}  # fmt: skip
    if kind not in known or (kind == "llama3" and architecture != "llama"):
        raise ValueError(f"rope_type {kind!r}; written are linear, yarn, and of Llama llama3")
    more = {name: value for name, value in rope.items() if name not in (*known[kind], "rope_type", "rope_theta")}
    if kind == "yarn":
        more = {name: value for name, value in more.items() if value != (_BETAS | {"truncate": True}).get(name)}
    if unheld := [name for name, value in more.items() if value is not None]:
        raise ValueError(f"{unheld[0]} = {more[unheld[0]]!r} of rope_type {kind!r}, which it has no place for")
    if kind == "llama3":
        return {SETTINGS: json.dumps({name: rope[name] for name in sorted(known[kind])})}
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    for key, value in found.items():
        if isinstance(value, float) and torch.tensor(value, dtype=torch.float32).item() != value:
            raise ValueError(f"{key} = {value}, which fp32 would round")
    return found


def factors_of(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """The tensor rope_freqs of llama3, as llama.cpp's converter makes it: fp32 (head_dim / 2,)."""
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    waves, length = 2 * math.pi / frequencies, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    long = torch.where(waves > length / low, torch.full_like(waves, factor), between)
    return torch.where(waves < length / high, torch.ones_like(waves), long)


def _llama3(factors: Tensor, theta: float, settings: Any, head_dim: int) -> dict[str, Any]:
    common = {"rope_type": "llama3", "rope_theta": theta}
    tried = [common | {"factor": float(factors.max())} | _LLAMA3]
    if settings is not None:
        try:
            own = strict_json(settings)
            if not isinstance(own, dict) or own.keys() != {"factor", *_LLAMA3}:
                raise ValueError(f"it must have {', '.join(['factor', *_LLAMA3])}")
            if not all(type(value) in (int, float) and 0 < value < math.inf for value in own.values()):
                raise ValueError("its values must be finite numbers above 0")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{SETTINGS} is no setting of llama3: {error}") from error
        tried = [common | own]
    for rope in tried:
        if factors.shape == (head_dim // 2,) and torch.allclose(factors, factors_of(rope, head_dim), _CLOSE, 0):
            return rope
    said = "it contradicts " + SETTINGS if settings is not None else "its settings are not those of Llama 3.1 to 3.3"
    raise ValueError(f"{TENSOR} scales positions in a way that transformers has no known setting for: {said}; take the "
                     "checkpoint that the file was made of")  # fmt: skip
