"""Models without weights: built from a configuration, and finished once their tensors are there."""

from collections.abc import Mapping
from typing import Any

from compression.architectures.table import architecture_of
from compression.errors import CheckpointError
from compression.files.libraries import failures_as

_NOT_OF_THE_MODEL = ("architectures", "auto_map", "attn_implementation", "trust_remote_code")


def model_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told of a configuration: nothing of how, or by whose code, it is to be run."""
    return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL and not key.startswith("_")}


def build(config: Mapping[str, Any], dtype: Any, device: str) -> Any:
    """The transformers model of a configuration with unset weights.

    Raises:
        CheckpointError: there is no such model, or it is not of the architecture that the configuration names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = model_values(config)
    with failures_as(lambda why: CheckpointError(f"config.json does not describe a model: {why}")):
        known = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                known, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    if type(model).__name__ != config["architectures"][0]:
        raise CheckpointError(f"config.json names the architecture {config['architectures'][0]}, but its model_type "
                              f"{config['model_type']!r} is that of {type(model).__name__}")  # fmt: skip
    return model


def finish(model: Any, device: str, generation_config: Any) -> Any:
    """Ties what the configuration ties, makes the tables that no checkpoint stores, freezes.

    How texts are generated is in no configuration of the model: `generation_config` is transformers', or None.
    """
    tie(model)
    with failures_as(lambda why: CheckpointError(f"config.json does not describe positions: {why}")):
        if not renew_positions(model).inv_freq.isfinite().all():
            raise ValueError("their frequencies are not finite")
    model.generation_config = generation_config
    return model.to(device).eval().requires_grad_(False)


def renew_positions(model: Any) -> Any:
    """Make the module of rotary positions anew from the configuration, put it in its place and return it."""
    place = architecture_of(model).rotary
    fresh = type(model.get_submodule(place))(model.config)
    model.set_submodule(place, fresh)
    return fresh


def tie(model: Any) -> None:
    """Ties what the configuration ties; packed embeddings are on their head already."""
    from torch import nn

    if isinstance(model.get_submodule(architecture_of(model).embeddings), nn.Embedding):
        model.tie_weights()
