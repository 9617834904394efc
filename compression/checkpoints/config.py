"""Checks of config.json before a model is built: supported model types and valid sizes.

transformers builds whatever it is told to: a million layers take hours, and a width of -1 or 4.5 fails far from its
cause. An unknown model type would have it look for code beside the weights.
"""

from collections.abc import Mapping
from typing import Any

from compression.errors import CheckpointError
from compression.files.strict_json import finite_field, flag_field, whole_field

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ARCHITECTURES = tuple(MODEL_TYPES)

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
}
_NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")  # none is below 0
_NOT_OF_THE_MODEL = ("architectures", "auto_map", "attn_implementation", "trust_remote_code")


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """The architecture that a configuration names, its sizes and model type checked.

    Raises:
        CheckpointError: one that is not supported, another model type than it has, or a size that cannot be.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: architecture {name!r:.200} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if config.get("model_type") != MODEL_TYPES[name]:
        raise CheckpointError(f"{where}: model_type {config.get('model_type')!r:.200} is not that of {name}, "
                              f"{MODEL_TYPES[name]!r}; code shipped with weights is never run")  # fmt: skip
    try:
        for key in (key for key in _MOST if config.get(key) is not None):
            whole_field(config, key, 1, _MOST[key])
        for key in (key for key in _NUMBERS if config.get(key) is not None):
            if finite_field(key, config[key]) < 0:
                raise ValueError(f"{key} must be at least 0, not {config[key]!r}")
        if "tie_word_embeddings" in config:
            flag_field(config, "tie_word_embeddings")
        heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if heads and shared and heads % shared:
            raise ValueError(f"num_key_value_heads={shared} does not divide num_attention_heads={heads}")
    except ValueError as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from None
    return name


def model_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told of a configuration: nothing of how, or by whose code, it is to be run."""
    return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL and not key.startswith("_")}
