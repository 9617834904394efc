"""Checks of config.json before a model is built: supported model types and valid sizes.

transformers builds whatever it is told to: a million layers take hours, and a width of -1 or 4.5 fails far from its
cause. An unknown model type would have it look for code beside the weights.
"""

from collections.abc import Mapping
from typing import Any

from compression.architectures import table
from compression.errors import CheckpointError
from compression.files.strict_json import finite_field, flag_field, whole_field

_MOST = {  # each well above the largest model that is published
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "ffn_dim": 2**22,
    "num_local_experts": 2**14,
    "num_experts": 2**14,
    "n_routed_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "n_group": 2**14,
    "topk_group": 2**14,
    "moe_intermediate_size": 2**22,
    "shared_expert_intermediate_size": 2**22,
    "kv_lora_rank": 2**20,
    "q_lora_rank": 2**20,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
}
_LEAST = {"sliding_window": 0}  # which is none; of all others 1
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "initializer_range")  # none is below 0
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """The architecture that a configuration names, its sizes and model type checked.

    Raises:
        CheckpointError: one that is not supported, another model type than it has, a size that cannot be, or a setting
            that makes another anatomy of it (`Architecture.required`).
    """
    names = config.get("architectures")
    row = table.named(names[0] if isinstance(names, list) and names else names, where)
    if config.get("model_type") != row.model_type:
        raise CheckpointError(f"{where}: model_type {config.get('model_type')!r:.200} is not that of {row.name}, "
                              f"{row.model_type!r}; code shipped with weights is never run")  # fmt: skip
    try:
        for key in (key for key in _MOST if config.get(key) is not None):
            whole_field(config, key, _LEAST.get(key, 1), _MOST[key])
        for key in (key for key in _NUMBERS if config.get(key) is not None):
            if finite_field(key, config[key]) < 0:
                raise ValueError(f"{key} must be at least 0, not {config[key]!r}")
        if "tie_word_embeddings" in config:
            flag_field(config, "tie_word_embeddings")
        heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if heads and shared and heads % shared:
            raise ValueError(f"num_key_value_heads={shared} does not divide num_attention_heads={heads}")
        _check_experts(config)
        for key, needed in row.required.items():
            needed = config.get(needed[1:]) if isinstance(needed, str) and needed.startswith("=") else needed
            if config.get(key, needed) != needed:
                raise ValueError(f"{key} must be {needed!r}, not {config[key]!r:.80}: what it makes of {row.name} is "
                                 "not supported")  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from None
    return row.name


def _check_experts(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a token cannot have so many of the experts."""
    count = next((config[key] for key in _EXPERTS if config.get(key)), None)
    each, groups, chosen = (config.get(key) for key in ("num_experts_per_tok", "n_group", "topk_group"))
    if count and each and each > count:
        raise ValueError(f"num_experts_per_tok={each} is more than the {count} experts")
    if count and groups and count % groups:
        raise ValueError(f"n_group={groups} does not divide the {count} experts")
    if groups and chosen and chosen > groups:
        raise ValueError(f"topk_group={chosen} is more than n_group={groups}")
